"""How much the images of one prompt differ from one another: mean cosine distance and Vendi score."""

from collections.abc import Sequence

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.stats import RESAMPLES, bootstrap, percentile_interval, two_sided_p


def mean_cosine_distance(features: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of unit vectors (n, D): 0 for identical images, 1 for orthogonal ones."""
    pairs = np.triu_indices(len(features), k=1)
    return float(1.0 - (features @ features.T)[pairs].mean())


def vendi_score(features: np.ndarray) -> float:
    """Effective number of different images among n unit vectors (n, D): exp of the entropy of kernel / n.

    1 for identical images, n for orthogonal ones (Friedman and Dieng, 2023).
    """
    eigenvalues = np.linalg.eigvalsh(features @ features.T / len(features))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def diversity_by_prompt(features: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """`diversity` (mean cosine distance) and `vendi` of each prompt, prompts sorted: arrays (P,), float64.

    Args:
        features: (N, D), one row per image.
        prompts: N prompt ids.

    Raises:
        UserError: a prompt has fewer than two images.
        ValueError: shapes that do not fit, or a feature vector that is zero or not finite.
    """
    names, index, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
    if features.ndim != 2 or len(features) != len(index):
        raise ValueError(f"features of shape {features.shape} for {len(index)} images")
    if counts.min() < 2:
        raise UserError(
            f"diversity needs 2 or more samples per prompt; {(counts < 2).sum()} of {len(names)} prompts have one"
        )
    features = features.astype(np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError("a feature vector is zero or not finite")
    groups = [(features / norms)[index == number] for number in range(len(names))]
    return {
        "diversity": np.array([mean_cosine_distance(group) for group in groups]),
        "vendi": np.array([vendi_score(group) for group in groups]),
    }


def bootstrap_over_prompts(values: np.ndarray, resamples: int, seed: int) -> tuple[float, np.ndarray]:
    """Mean over prompts (P,) and its bootstrap draws (R,), all prompts in one stratum."""
    prompts = np.arange(len(values))
    means, draws = bootstrap(values[None], prompts, np.zeros_like(prompts), resamples, np.random.default_rng(seed))
    return float(means[0]), draws[0]


def diversity(
    features: np.ndarray, prompts: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict]:
    """Within-prompt diversity of one stage: `{"diversity" | "vendi": {mean, low, high, n_prompts, n_images}}`.

    Raises: see `diversity_by_prompt`.
    """
    table = {}
    for name, values in diversity_by_prompt(features, prompts).items():
        mean, draws = bootstrap_over_prompts(values, resamples, seed)
        counts = {"n_prompts": len(values), "n_images": len(features)}
        table[name] = {"mean": mean, **percentile_interval(draws), **counts}
    return table


def compare_diversity(
    features_a: np.ndarray,
    features_b: np.ndarray,
    prompts: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict]:
    """Paired difference `b - a` of within-prompt diversity; both features (N, D) in the order of `prompts`.

    Raises: see `diversity_by_prompt`.
    """
    before, after = diversity_by_prompt(features_a, prompts), diversity_by_prompt(features_b, prompts)
    table = {}
    for name in before:
        difference, draws = bootstrap_over_prompts(after[name] - before[name], resamples, seed)
        counts = {"n_prompts": len(before[name]), "n_images": len(features_a)}
        table[name] = {"difference": difference, **percentile_interval(draws), "p_value": two_sided_p(draws), **counts}
    return table
