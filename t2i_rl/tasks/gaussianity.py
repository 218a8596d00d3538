"""`task=gaussianity`: whether latents in a file look like Gaussian noise."""

import json
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from t2i_rl.errors import UserError
from t2i_rl.evaluation.results import write_atomic
from t2i_rl.evaluation.tables import Table
from t2i_rl.gaussianity.health import GaussianityReport


def run(cfg) -> dict:
    """Report on every tensor of `cfg.latents`, a safetensors file of `(C, h, w)` or `(B, C, h, w)`, in natural order and unpacked.

    Raises:
        UserError: the file is broken, or a tensor is no latent.
    """
    try:
        latents = load_file(cfg.latents)
    except (OSError, SafetensorError) as error:
        raise UserError(f"latents={cfg.latents}: {error}") from error
    found, console = {}, Console()
    for name, value in latents.items():
        if value.ndim not in (3, 4) or not value.is_floating_point():
            raise UserError(
                f"latents={cfg.latents}: {name} has shape {tuple(value.shape)} and dtype {value.dtype}; a latent is (C, h, w) or (B, C, h, w), of floats"
            )
        if not torch.isfinite(value).all():
            raise UserError(f"latents={cfg.latents}: {name} holds values that are not finite")
        report = GaussianityReport.of(value.float() if value.ndim == 4 else value[None].float())
        inside = report.inside()
        rows = [
            [
                figure,
                f"{low:.4f} to {high:.4f}",
                f"{float(report.figures[figure].mean()):.4f}",
                f"{100 * float(inside[figure].float().mean()):.0f} %",
            ]
            for figure, (low, high) in report.bands.items()
        ]
        note = "The band holds 99 % of true noise of this shape. In natural order; a shuffled penalty's value does not tell."
        console.print(
            Table(
                f"{name} {' x '.join(map(str, value.shape))}", ["", "true noise", "mean", "within the band"], rows, note
            )
        )
        found[name] = {
            figure: {"values": report.figures[figure].tolist(), "band": report.bands[figure]} for figure in report.bands
        }
    out = Path(cfg.paths.output_dir) / "gaussianity.json"
    write_atomic(out, json.dumps(found, indent=1))
    console.print(f"figures: {out}", soft_wrap=True)
    return {"latents": found}
