"""Where version 0.1 had its soft tokens: files that it exported say `from t2i_rl.models.soft_tokens import ...`."""

from t2i_rl.models.diffusion.soft_tokens import load_soft_tokens

__all__ = ["load_soft_tokens"]
