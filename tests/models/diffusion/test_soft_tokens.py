"""The bank itself: buckets of time, branches, files; and the import of the authors' tokens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_rl.core.errors import UserError
from t2i_rl.models.diffusion.soft_tokens import Attached, SoftTokens, TokenSpec, load_soft_tokens, spec_for
from t2i_rl.tasks.import_soft_tokens import SPECS, imported
from tests.support.small_diffusers import denoiser

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "softrepa_tokens"


def bank(**options) -> SoftTokens:
    layout = {"transformer_blocks.0": 0, "transformer_blocks.1": 1}
    return SoftTokens(
        TokenSpec("SD3Transformer2DModel", layout, 3, 32, **options), generator=torch.Generator().manual_seed(0)
    )


def test_a_time_falls_into_its_bucket_and_the_offset_is_the_same_for_all_tokens_of_a_layer():
    tokens_bank = bank()
    times = torch.tensor([0.0, 9.99, 10.0, 505.3, 999.0, 1000.0])
    tokens = tokens_bank(times)
    assert tokens.shape == (6, 2, 3, 32) and tokens.dtype == torch.float32
    for row, bucket in enumerate((0, 0, 1, 50, 99, 99)):
        for layer in range(2):
            for token in range(3):
                assert torch.equal(
                    tokens[row, layer, token], tokens_bank.tokens[0, layer, token] + tokens_bank.time[0, bucket, layer]
                )


def test_interpolation_meets_the_buckets_at_their_centres_and_is_straight_between():
    tokens_bank = bank(buckets=4, interpolate=True)
    table = tokens_bank.time[0, :, 1]
    offset = (
        tokens_bank(torch.tensor([0.0, 125.0, 250.0, 375.0, 437.5, 875.0, 1000.0]))[:, 1, 0]
        - tokens_bank.tokens[0, 1, 0]
    )
    expected = [
        table[0],
        table[0],
        (table[0] + table[1]) / 2,
        table[1],
        0.75 * table[1] + 0.25 * table[2],
        table[3],
        table[3],
    ]
    torch.testing.assert_close(offset, torch.stack(expected))


def test_branches_have_tokens_of_their_own_and_share_the_table_unless_told_otherwise():
    t = torch.tensor([100.0, 700.0])
    shared, apart = bank(branches=2), bank(branches=2, tables=2)
    both = shared(t, torch.tensor([0, 1]))
    assert torch.equal(both[0], shared(t, 0)[0]) and torch.equal(both[1], shared(t, 1)[1])
    torch.testing.assert_close(shared(t, 1) - shared.tokens[1], shared(t, 0) - shared.tokens[0])
    assert (apart(t, 1) - apart.tokens[1] - apart(t, 0) + apart.tokens[0]).abs().max() > 1e-3
    assert bank(buckets=0).time is None and torch.equal(bank(buckets=0)(t)[1], bank(buckets=0).tokens[0])


def test_parameter_counts_are_the_documented_ones():
    """Those of SoftREPA's released files; AGSM's two banks share one table, 829,440 in all."""
    counts = {name: sum(p.numel() for p in SoftTokens(spec).parameters()) for name, spec in SPECS.items()}
    assert counts == {"sd15": 79_872, "sdxl": 8_192, "sd3": 798_720}
    agsm = TokenSpec("SD3Transformer2DModel", SPECS["sd3"].layout, 4, 1536, branches=2)
    assert sum(p.numel() for p in SoftTokens(agsm).parameters()) == 829_440


def test_a_file_holds_everything_and_comes_back(tmp_path):
    tokens_bank = bank(branches=2, buckets=5, interpolate=True, position="after_bos")
    file = tokens_bank.save(tmp_path / "a.safetensors", method="agsm", steps=7)
    again = SoftTokens.load(file)
    assert again.spec == tokens_bank.spec and again.facts == {"method": "agsm", "steps": "7"}
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tokens_bank.parameters(), strict=True))
    assert set(load_file(file)) == {"tokens", "time"} and not list(tmp_path.glob("*.tmp"))


def test_wrong_files_and_wrong_models_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        SoftTokens.load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        SoftTokens.load(tmp_path / "broken.safetensors")
    save_file({"tokens": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="import_soft_tokens"):
        SoftTokens.load(tmp_path / "other.safetensors")
    tokens_bank = bank()
    for name, words in (("sd15", "not for UNet2DConditionModel"), ("flux", "not for Flux")):
        with pytest.raises(UserError, match=words):
            Attached(denoiser(name), tokens_bank)
    wide = SoftTokens(TokenSpec("SD3Transformer2DModel", {"transformer_blocks.0": 0}, 3, 64))
    with pytest.raises(UserError, match="64 wide"):
        Attached(denoiser("sd3"), wide)
    deep = SoftTokens(TokenSpec("SD3Transformer2DModel", {"transformer_blocks.9": 0}, 3, 32))
    with pytest.raises(UserError, match="transformer_blocks.9"):
        Attached(denoiser("sd3"), deep)
    with pytest.raises(UserError, match="no branch 1"):
        Attached(denoiser("sd3"), tokens_bank, branch=1)
    for wrong in ({"position": "middle"}, {"tables": 2}):
        with pytest.raises(UserError):
            bank(**wrong)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the authors' files are not beside this checkout")
def test_the_authors_tokens_import_with_their_documented_shapes_and_values():
    """In the files SD1.5's four tokens are the same to the bit, with norm 40.24; SD3's layers have
    an RMS of 0.113 to 0.138."""
    sd15 = imported("sd15", str(PUBLISHED / "sd1.5-dc_tokens.pth"), str(PUBLISHED / "sd1.5-dc_t_tokens.pth"))
    assert sd15.tokens.shape == (1, 1, 4, 768) and sd15.time.shape == (1, 100, 1, 768)
    assert torch.equal(sd15.tokens[0, 0, 0].expand(4, -1), sd15.tokens[0, 0])
    assert float(sd15.tokens[0, 0, 0].norm()) == pytest.approx(40.24, abs=0.01)
    sd3 = imported("sd3", str(PUBLISHED / "sd3-dc_tokens.pth"), str(PUBLISHED / "sd3-dc_t_tokens.pth"))
    assert sd3.tokens.shape == (1, 5, 4, 1536) and sd3.time.shape == (1, 100, 5, 1536)
    rms = sd3.tokens[0].square().mean(dim=(1, 2)).sqrt()
    assert float(rms.min()) == pytest.approx(0.113, abs=1e-3) and float(rms.max()) == pytest.approx(0.138, abs=1e-3)
    early = sd3.time[0, :3].square().mean(dim=(1, 2)).sqrt().tolist()
    assert early == pytest.approx([0.023, 0.025, 0.027], abs=6e-4)
    with torch.serialization.safe_globals([torch.nn.Embedding]):
        raw = torch.load(PUBLISHED / "sd3-dc_t_tokens.pth", map_location="cpu", weights_only=True).weight
    assert torch.equal(sd3.time[0, 42, 3], raw[42].chunk(5)[3])
    sdxl = imported("sdxl", str(PUBLISHED / "sdxl-dc_tokens.pth"), None)
    assert sdxl.tokens.shape == (1, 1, 4, 2048) and sdxl.time is None
    norms = sdxl.tokens[0, 0].norm(dim=1)
    assert float(norms.min()) > 8.55 and float(norms.max()) < 10.05


def test_import_refuses_what_is_no_token_file(tmp_path):
    torch.save(torch.zeros(3, 3), tmp_path / "small.pth")
    torch.save(torch.zeros(4, 2048), tmp_path / "sdxl.pth")
    torch.save({"a": Path("x")}, tmp_path / "dict.pth")
    (tmp_path / "text.pth").write_text("hello")

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    torch.save(Harm(), tmp_path / "harm.pth")
    for name in ("small.pth", "dict.pth", "text.pth", "harm.pth", "nowhere.pth"):
        with pytest.raises(UserError):
            imported("sdxl", str(tmp_path / name), None)
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(UserError, match="leave out task.times"):
        imported("sdxl", str(tmp_path / "sdxl.pth"), str(tmp_path / "sdxl.pth"))
    with pytest.raises(UserError, match="give task.times"):
        imported("sd15", str(tmp_path / "sdxl.pth"), None)
    with pytest.raises(UserError, match="published for"):
        imported("flux", str(tmp_path / "sdxl.pth"), None)
    assert imported("sdxl", str(tmp_path / "sdxl.pth"), None).tokens.shape == (1, 1, 4, 2048)


def test_load_soft_tokens_takes_any_pipeline(tmp_path):
    model = denoiser("sd3")
    file = SoftTokens(spec_for(model, 2, 3)).save(tmp_path / "t.safetensors")
    pipe = type("Pipe", (), {"transformer": model})()
    handle = load_soft_tokens(pipe, file)
    assert handle.enabled and not any(parameter.requires_grad for parameter in handle.bank.parameters())
    handle.remove()
