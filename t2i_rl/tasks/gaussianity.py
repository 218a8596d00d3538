"""`task=gaussianity`: whether latents in a file look like Gaussian noise."""

import json
import math
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.tables import Table
from t2i_rl.gaussianity.health import GaussianityReport


def check(cfg) -> None:
    """Refuse to look at nothing.

    Raises:
        UserError: no file is named.
    """
    if not cfg.latents:
        raise UserError("task=gaussianity takes latents=<file>.safetensors")


def run(cfg) -> dict:
    """Report on every tensor of `cfg.latents`, in natural order and unpacked.

    `cfg.latents` is a safetensors file of tensors `(C, h, w)` or `(B, C, h, w)`.

    Raises:
        UserError: the file is broken or empty, or a tensor is no latent.
    """
    latents, reports, console = read_latents(cfg.latents, cfg.task.packed), {}, Console()
    for name, value in latents.items():
        report = GaussianityReport.of(value)
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
        title = f"{name}: {len(value)} of {' x '.join(map(str, value.shape[1:]))}"
        note = (
            "The band holds 99 % of true noise of this shape. In natural order; a shuffled penalty's value does not "
            "tell."
        )
        console.print(Table(title, ["", "true noise", "mean", "within the band"], rows, note))
        reports[name] = {
            figure: {"values": report.figures[figure].tolist(), "band": report.bands[figure]} for figure in report.bands
        }
    out = Path(cfg.paths.output_dir) / "gaussianity.json"
    write_atomic(out, json.dumps(reports, indent=1))
    console.print(f"figures: {out}", soft_wrap=True)
    return {"latents": reports}


def read_latents(path: str, packed: bool | None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, each as float32 `(B, C, h, w)`.

    Raises:
        UserError: one line that names the file, the tensor, and what is wrong with it.
    """
    try:
        latents = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"latents={path} must be a safetensors file: {error}") from error
    if not latents:
        raise UserError(f"latents={path} holds no tensors")
    pictures = {}
    for name, value in latents.items():
        where = f"latents={path}: {name}"
        if value.ndim not in (3, 4) or not value.is_floating_point() or not value.numel():
            raise UserError(
                f"{where} has shape {tuple(value.shape)} and dtype {value.dtype}; a latent is (C, h, w) or "
                "(B, C, h, w), of floats"
            )
        if not torch.isfinite(value).all():
            raise UserError(f"{where} holds values that are not finite")
        pictures[name] = as_pictures(value.float(), packed, where)
        if not (pictures[name].flatten(1).std(dim=1, correction=0) > 0).all():
            raise UserError(
                f"{where} holds a latent whose values are all the same: it has no kurtosis and no correlations"
            )
    return pictures


def as_pictures(latents: torch.Tensor, packed: bool | None, where: str) -> torch.Tensor:
    """Latents `(B, C, h, w)` of `(C, h, w)`, or of FLUX's packed `(B, h w / 4, 4 C)`, which must be square.

    Raises:
        UserError: it looks packed and nobody has said whether it is; or it is said to be, and cannot be.
    """
    side = math.isqrt(latents.shape[-2])
    square = latents.ndim == 3 and side**2 == latents.shape[1] and latents.shape[2] % 4 == 0
    if packed is None and square and latents.shape[2] == 64 and side != 8:
        raise UserError(
            f"{where}, {tuple(latents.shape)}, may be FLUX's packed latents: say task.packed=true, or task.packed=false"
        )
    if not packed:
        return latents if latents.ndim == 4 else latents[None]
    if not square:
        raise UserError(f"{where}, {tuple(latents.shape)}, is not FLUX's packed (B, tokens, 64) of a square picture")
    return (
        latents.unflatten(1, (side, side))
        .unflatten(3, (-1, 2, 2))
        .permute(0, 3, 1, 4, 2, 5)
        .flatten(4, 5)
        .flatten(2, 3)
    )
