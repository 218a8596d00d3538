"""Regularisers, constraints and health figures against closed forms, finite differences and figures
of Gaussian noise."""

import math

import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.gaussianity.autocorrelation import AutoCorrelation
from t2i_rl.gaussianity.constraints import Renorm, WhitenedNoise, project_block
from t2i_rl.gaussianity.health import SPECTRUM, GaussianityReport, bands, measures
from t2i_rl.gaussianity.moments import KL, ChiNorm, Moment, normal_moment
from t2i_rl.gaussianity.prno import PRNO
from t2i_rl.gaussianity.regularizer import Regularizer
from t2i_rl.gaussianity.spectrum import Spectrum, pack, shuffle, unpack

SHAPE = (16, 64, 64)
D = math.prod(SHAPE)


def noise(rows: int = 1, shape=SHAPE, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(count: int = 1, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def checkerboard() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return (1.0 - 2.0 * ((rows + columns) % 2)).expand(1, *SHAPE).contiguous()


def numeric_gradient(function, x: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Central differences of a scalar function, float64, one value at a time."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        moved = torch.zeros_like(x).flatten()
        moved[i] = step
        moved = moved.view(x.shape)
        gradient.flatten()[i] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


TERMS = {
    "moment 1": Moment(1),
    "moment 2": Moment(2),
    "moment 3, smooth": Moment(3, smooth=1e-3),
    "moment 4": Moment(4),
    "moment 4, standardised": Moment(4, root=False, about="mean and scale"),
    "moment 2, central, squared": Moment(2, about="mean", p=2),
    "kl": KL(),
    "chi norm": ChiNorm(),
    "prno": PRNO(k=4, shuffles=2),
    "magnitude": Spectrum(group=4),
    "magnitude, full": Spectrum(group=4, bins="full", mu=0.875),
    "magnitude, half, strided": Spectrum(group=4, bins="half", grouping="strided"),
    "power, squared, random": Spectrum(stat="power", group=4, distance="l2", grouping="random"),
    "log": Spectrum(stat="log", group=4),
    "nll": Spectrum(group=1, distance="nll"),
    "channels": Spectrum(layout="channels", group=4),
    "fixed": Spectrum(group=4, permutation="fixed"),
    "fresh": Spectrum(group=4, permutation="fresh", shuffles=2),
    "natural+fresh": Spectrum(group=4, permutation="natural+fresh"),
    "floor": Spectrum(group=4, floor=0.01),
    "autocorrelation": AutoCorrelation(rolls=2, smallest=2),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences(name):
    term = TERMS[name]
    x = 1.3 * noise(2, (2, 4, 8), dtype=torch.float64) + 0.2
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(term(x, generators(2)).sum(), x)
    numeric = numeric_gradient(lambda moved: term(moved, generators(2)).sum(), x.detach())
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-7)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("name", TERMS)
def test_rows_do_not_meet(name):
    x = 1.2 * noise(3, (2, 8, 8))
    together = TERMS[name](x, generators(3))
    alone = torch.cat([TERMS[name](x[i : i + 1], generators(3)[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert together.shape == (3,)


@pytest.mark.parametrize("name", ["fresh", "prno", "natural+fresh", "autocorrelation"])
def test_shuffles_leave_the_global_generator_alone(name):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    TERMS[name](noise(1, (2, 8, 8)), generators())
    assert torch.equal(torch.rand(1), expected)


def test_magnitudes_are_rayleigh_and_real_bins_half_normal():
    x = noise(40, (65536,), dtype=torch.float64)
    bins = torch.fft.fft(x, norm="ortho")
    inner = bins[:, 1 : D // 2].abs()
    assert inner.mean().item() == pytest.approx(math.sqrt(math.pi) / 2, abs=3e-3)
    assert inner.std().item() == pytest.approx(math.sqrt(1 - math.pi / 4), abs=3e-3)
    assert inner.square().mean().item() == pytest.approx(1.0, abs=3e-3)
    real = torch.fft.fft(noise(4000, (8,), dtype=torch.float64), norm="ortho")[:, [0, 4]]
    assert real.abs().mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.03)
    assert (
        normal_moment(2) == 1
        and normal_moment(4) == 3
        and normal_moment(6) == 15
        and normal_moment(8) == 105
        and normal_moment(5) == 0
    )


@pytest.mark.parametrize("shape", [(32,), (4, 8), (6, 10), (2, 2, 4)])
def test_packing_is_orthonormal_and_undone(shape):
    x = noise(3, shape, dtype=torch.float64)
    y = pack(x, len(shape))
    assert y.shape == (3, math.prod(shape) // 2)
    torch.testing.assert_close(2 * y.abs().square().sum(dim=1), x.flatten(1).square().sum(dim=1))
    torch.testing.assert_close(unpack(y, shape), x)
    with pytest.raises(UserError, match="sides must be even"):
        pack(noise(1, (9,)))


def test_packed_bins_are_the_stated_ones():
    x = noise(1, (8,), dtype=torch.float64)
    bins, y = torch.fft.fft(x[0], norm="ortho"), pack(x)[0]
    torch.testing.assert_close(y[0], torch.complex(bins[0].real, bins[4].real) / math.sqrt(2))
    torch.testing.assert_close(y[1:], bins[1:4])


def test_packed_gradient_has_the_stated_norm():
    x = noise().requires_grad_()
    (gradient,) = torch.autograd.grad(25 * Spectrum()(x, generators()).sum(), x)
    assert gradient.norm().item() == pytest.approx(25 / math.sqrt(D), rel=1e-4)


def test_natural_order_sees_a_checkerboard_and_a_fresh_shuffle_does_not():
    for x, natural in ((noise(), (2.31, 0.12)), (checkerboard(), (22.14, 0.05))):
        value = 25 * Spectrum()(x, generators()).item()
        assert value == pytest.approx(natural[0], abs=natural[1])
        for permutation in ("fresh", "fixed"):
            shuffled = 25 * Spectrum(permutation=permutation)(x, generators()).item()
            assert shuffled == pytest.approx(2.31, abs=0.12)


def test_published_form_uses_all_bins_and_its_own_mean():
    """Full spectrum, contiguous groups of 16, 0.875: written out."""
    x = noise(1, (256,), dtype=torch.float64)
    magnitudes = torch.stack(
        [
            (x[0] * torch.exp(-2j * math.pi * k * torch.arange(256, dtype=torch.float64) / 256)).sum().abs() / 16
            for k in range(256)
        ]
    )
    expected = (magnitudes.view(16, 16).mean(dim=1) - 0.875).abs().mean()
    torch.testing.assert_close(Spectrum(bins="full", mu=0.875)(x, generators())[0], expected)


def test_more_shuffles_inject_less_noise():
    """The gradient's part across the radius falls as one over the root of their number."""
    x = noise()
    norms = {}
    for count in (1, 4, 16):
        leaf = x.clone().requires_grad_()
        term = Spectrum(bins="full", permutation="fresh", shuffles=count, weight=25.0)
        (gradient,) = torch.autograd.grad(25 * term(leaf, generators()).sum(), leaf)
        direction = (x / x.norm()).flatten()
        across = gradient.flatten() - (gradient.flatten() @ direction) * direction
        norms[count] = across.norm().item()
    assert norms[1] == pytest.approx(0.0905, rel=0.02)
    assert norms[1] / norms[4] == pytest.approx(2, rel=0.03) and norms[4] / norms[16] == pytest.approx(2, rel=0.03)


def test_fresh_shuffles_turn_a_latent_as_white_noise_would():
    """cos(x_T, x_0) = prod 1 / sqrt(1 + r_t^2) under normalised steps of rms r_t with the radius
    held."""
    start = checkerboard()
    x, rms, term, own = start.clone(), 0.1, Spectrum(bins="full", permutation="fresh"), generators()
    for _ in range(40):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(term(leaf, own).sum(), leaf)
        x = x - rms * gradient / gradient.square().mean().sqrt()
        x = x / x.square().mean().sqrt()
    cosine = torch.cosine_similarity(x.flatten(), start.flatten(), dim=0).item()
    assert cosine == pytest.approx((1 + rms**2) ** -20, abs=0.01)


def test_norm_kl_and_kurtosis_are_moments_near_the_gaussian():
    x = noise(1, (65536,), dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0)
    for scale in (1.1, 0.98):
        second = Moment(2)(scale * x, generators()).item()
        assert second == pytest.approx(abs(scale - 1), rel=1e-6)
        assert ChiNorm()(scale * x, generators()).item() / D == pytest.approx(
            (scale**2 - 1) / 2 - math.log(scale), rel=1e-3, abs=1e-7
        )
    moved = 1.02 * x + 0.05
    expected = (0.05**2 + 1.02**2 - math.log(1.02**2) - 1) / 2
    assert KL()(moved, generators()).item() == pytest.approx(expected, rel=1e-9)
    fitted = Moment(1)(moved, generators()).item() ** 2 / 2 + Moment(2, about="mean")(moved, generators()).item() ** 2
    assert KL()(moved, generators()).item() == pytest.approx(fitted, rel=0.05)
    flattened = torch.sign(x) * x.abs() ** 0.99
    flattened = (flattened - flattened.mean()) / flattened.std(correction=0)
    kurtosis = Moment(4, root=False, about="mean and scale")(flattened, generators()).item()
    assert kurtosis == pytest.approx(4 * 3**0.75 * Moment(4)(flattened, generators()).item(), rel=0.05)


def test_a_flat_spectrum_is_an_identity_covariance():
    """Circular autocovariance, its circulant matrix, and the spectrum: PRNO and MPGR measure the
    same thing."""
    count = 256
    x = noise(1, (count,), dtype=torch.float64)[0]
    power = torch.fft.fft(x, norm="ortho").abs().square()
    covariance = torch.stack([(x * x.roll(-lag)).mean() for lag in range(count)])
    torch.testing.assert_close(torch.fft.fft(covariance).real, power, atol=1e-10, rtol=1e-10)
    circulant = torch.stack([covariance.roll(row) for row in range(count)])
    gap = circulant - torch.eye(count, dtype=torch.float64)
    assert torch.linalg.matrix_norm(gap, ord=2).item() == pytest.approx((power - 1).abs().max().item(), abs=1e-10)
    assert gap.square().sum().item() / count == pytest.approx((power - 1).square().mean().item(), abs=1e-10)


def test_projection_onto_whitened_noise():
    x = noise(2)
    held = WhitenedNoise()(x, x)
    cosines = torch.cosine_similarity(x.flatten(1), held.flatten(1), dim=1)
    assert all(value == pytest.approx(0.9894, abs=1e-3) for value in cosines.tolist())
    torch.testing.assert_close(WhitenedNoise()(held, held), held, atol=1e-5, rtol=0)
    blocks = pack(held.flatten(1).double()).abs().unflatten(1, (-1, 16))
    torch.testing.assert_close(
        blocks.sum(-1), torch.full_like(blocks.sum(-1), 8 * math.sqrt(math.pi)), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(blocks.square().sum(-1), torch.full_like(blocks.sum(-1), 16.0), atol=1e-3, rtol=0)
    assert blocks.square().max() <= 7.19
    with pytest.raises(UserError, match="does not split into blocks of 7"):
        WhitenedNoise(block=7)(noise(1, (64,)), noise(1, (64,)))


def test_a_pattern_with_empty_bins_projects_onto_noise():
    """A wave has one bin; the phases of the others are free, and must not agree."""
    wave = torch.sin(2 * math.pi * 5 * torch.arange(4096) / 4096)[None]
    held = WhitenedNoise()(wave, wave)
    assert held.std().item() == pytest.approx(1, abs=1e-2)
    assert held.pow(4).mean().item() == pytest.approx(3, abs=0.3) and held.abs().max() < 5
    zeros = torch.zeros(2, 8, 8)
    assert WhitenedNoise()(zeros, zeros).equal(zeros)


def test_a_projected_block_is_the_nearest_in_its_set():
    """Against random members of the set."""
    w = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    nearest = project_block(w)
    candidates = project_block(
        torch.rand(5000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 2 * 3
    )
    assert (candidates - w).norm(dim=1).min() >= (nearest - w).norm()
    tied = project_block(torch.ones(16, dtype=torch.float64))
    assert tied.sum().item() == pytest.approx(8 * math.sqrt(math.pi)) and tied.square().sum().item() == pytest.approx(
        16, rel=1e-6
    )


def test_renorm_puts_the_length_back():
    x, start = 3 * noise(2, (2, 4, 4)), noise(2, (2, 4, 4), seed=1)
    assert Renorm()(x, start).flatten(1).norm(dim=1).tolist() == pytest.approx([math.sqrt(32)] * 2)
    assert Renorm("initial")(x, start).flatten(1).norm(dim=1).tolist() == pytest.approx(
        start.flatten(1).norm(dim=1).tolist()
    )


def test_prno_is_as_released_and_never_below_its_floor():
    x = noise()
    assert PRNO(k=64, shuffles=0)(x, generators()).item() == pytest.approx(2 * math.log(2))
    assert PRNO(k=64, shuffles=3)(x, generators()).item() == pytest.approx(4 * math.log(2))
    assert PRNO(k=64, shuffles=0)(checkerboard(), generators()).item() == pytest.approx(23_329, rel=1e-3)
    small = 1.5 * noise(1, (2, 4, 8), dtype=torch.float64)
    blocks = small.flatten().view(16, 4)
    mean, covariance = blocks.mean(0).norm(), blocks.T @ blocks / 16
    spread = torch.linalg.svdvals(covariance - torch.eye(4, dtype=torch.float64))[0]
    expected = -min(-16 * mean**2 / 8, -math.log(2)) - min(
        -8 * max((1 + spread) ** 0.5 - 1 - 0.5, 0) ** 2, -math.log(2)
    )
    assert PRNO(k=4, shuffles=0)(small, generators()).item() == pytest.approx(expected.item(), rel=1e-9)


def test_autocorrelation_sees_structure():
    smooth = torch.nn.functional.interpolate(noise(1, (16, 8, 8)), 64, mode="bicubic")
    smooth = smooth / smooth.std()
    assert AutoCorrelation()(smooth, generators()) > 20 * AutoCorrelation()(noise(), generators())


def test_noise_is_within_its_bands_and_structure_is_not():
    """Bands as measured on other draws of noise; for KS they are Kolmogorov's own quantiles."""
    limits = bands(SHAPE)
    expected = {
        "mean": (-0.0095, 0.0095),
        "std": (0.9933, 1.0067),
        "kurtosis": (2.952, 3.051),
        "ks": (0.4224, 1.7308),
        "lag1_x": (-0.0105, 0.0105),
        "max_power": (8.9, 17.1),
        "spectrum": (2.22, 2.41),
    }
    for name, (low, high) in expected.items():
        width = high - low
        assert limits[name][0] == pytest.approx(low, abs=0.25 * width) and limits[name][1] == pytest.approx(
            high, abs=0.25 * width
        )
    report = GaussianityReport.of(torch.cat([noise(seed=5), checkerboard(), 1.05 * noise(seed=5)]))
    inside = report.inside()
    assert all(value[0] for value in inside.values())
    assert (
        not inside["spectrum"][1]
        and not inside["lag1_x"][1]
        and not inside["kurtosis"][1]
        and not inside["max_power"][1]
    )
    assert not inside["std"][2] and inside["kurtosis"][2]


def test_kolmogorov_smirnov_against_its_definition():
    x = noise(1, (128,), dtype=torch.float64)
    values, grid = x[0], torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    empirical = torch.searchsorted(values.sort().values, grid, right=True) / 128
    expected = (empirical - torch.special.ndtr(grid)).abs().max() * 128**0.5
    assert measures(x)["ks"].item() == pytest.approx(expected.item(), abs=1e-3)


def test_a_regularizer_is_the_weighted_sum_of_its_terms():
    x = 1.1 * noise(2, (2, 4, 8))
    regularizer = Regularizer({"a": Moment(1, weight=2.0), "b": Spectrum(group=4, weight=25.0), "c": None})
    total, parts = regularizer(x, generators(2))
    assert set(parts) == {"a", "b"}
    torch.testing.assert_close(total, 2 * parts["a"] + 25 * parts["b"])
    nothing, none = Regularizer()(x, generators(2))
    assert none == {} and torch.equal(nothing, torch.zeros(2))


def test_half_precision_is_read_in_float32():
    x = (300 * noise(1, (64,))).half()
    assert torch.isfinite(ChiNorm()(x, generators())).all() and Moment(2)(x, generators()).dtype == torch.float32
    torch.testing.assert_close(shuffle(x.float(), generators()).sort().values, x.float().sort().values)
    assert SPECTRUM.weight == 25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Moment(3), "infinite slope"),
        (lambda: Moment(0), "n of 1 or more"),
        (lambda: Spectrum(stat="phase"), "spectrum.stat must be one of"),
        (lambda: Spectrum(permutation="often"), "spectrum.permutation must be one of"),
        (lambda: Spectrum(distance="nll"), "group=1"),
        (lambda: Spectrum(layout="channels", permutation="fresh"), "permutation=none"),
        (lambda: Spectrum(group=0), "1 or more"),
        (lambda: Spectrum(group=5)(noise(1, (64,)), generators()), "does not split into groups of 5"),
        (lambda: PRNO(shuffles=0, sequential=False), "sequential=true"),
        (lambda: Renorm("zero"), "gaussian or initial"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
