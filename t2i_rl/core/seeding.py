"""Counter-based randomness: every row owns a seed, so that batches and ranks change nothing."""

import hashlib

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings, the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def row_uniforms(seeds: list[int], steps: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform draws in [0, 1), float64 `(B, steps)`; row `i` depends on `seeds[i]` alone."""
    draws = np.stack([np.random.Generator(np.random.Philox(seed)).random(steps) for seed in seeds])
    return torch.from_numpy(draws).to(device)


def row_normals(seeds: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Normal draws, float32 `(B, *shape)` on the CPU; row `i` depends on `seeds[i]` alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
