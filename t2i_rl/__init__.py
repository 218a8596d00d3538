"""t2i_rl: post-training of text-to-image models, with numbers that can be trusted."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# What a part of a user's own derives from or returns. It is read at its first use: it stands on torch, which the
# manual page does without.
_OWN = {
    "Benchmark": "core.contracts",
    "Column": "core.contracts",
    "Data": "data.base",
    "Defect": "core.contracts",
    "Drawn": "core.contracts",
    "Generation": "core.contracts",
    "Learner": "methods.base",
    "ImageModel": "core.contracts",
    "Method": "methods.base",
    "Prompt": "core.prompts",
    "Reward": "core.contracts",
    "RewardOutput": "core.contracts",
    "TokenRollout": "models.autoregressive.rollout",
    "UserError": "core.errors",
    "Verdict": "core.contracts",
}
__all__ = sorted(_OWN)


def __getattr__(name: str) -> Any:
    if name not in _OWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OWN[name]}"), name)
