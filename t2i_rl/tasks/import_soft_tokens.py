"""`task=import_soft_tokens`: the tokens that SoftREPA's authors published, as a file that any pipeline here loads."""

import pickle
import zipfile
from pathlib import Path

import torch
from hydra.utils import get_class
from rich.console import Console
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, TokenSpec

_UNET = "UNet2DConditionModel"
_DOWN, _DOWN_MID = {f"down_blocks.{i}": 0 for i in range(3)}, {"down_blocks.1": 0, "down_blocks.2": 0, "mid_block": 0}
_FIRST_5 = {f"transformer_blocks.{i}": i for i in range(5)}
SPECS = {  # what each file holds, and where the released sampler puts it (spec of the repository at ff92f4b8)
    "sd15": TokenSpec(_UNET, _DOWN, 4, 768, position="after_bos"),
    "sdxl": TokenSpec(_UNET, _DOWN_MID, 4, 2048, buckets=0, position="after_bos"),
    "sd3": TokenSpec("SD3Transformer2DModel", _FIRST_5, 4, 1536, position="start"),
}


def check(cfg) -> None:
    """Refuse to write over a file.

    Raises:
        UserError: the output is there already.
    """
    if file_of(cfg).exists():
        raise UserError(f"task.out={file_of(cfg)} is there already: name another file")


def file_of(cfg) -> Path:
    """Where the tokens are written."""
    return Path(cfg.task.out or Path(cfg.paths.output_dir) / "soft_tokens.safetensors")


def run(cfg) -> dict:
    """Convert `task.tokens` (and `task.times`, which SDXL has not) for the kind of `cfg.model`.

    No weights are read, and no pickle is executed.

    Raises:
        UserError: a file is missing or holds something else.
    """
    kind, out = get_class(cfg.model._target_).kind, file_of(cfg)
    bank = imported(kind, cfg.task.tokens, cfg.task.times)
    bank.save(out, method="softrepa", source="softrepa/SoftREPA tokens", model=kind)
    count = sum(parameter.numel() for parameter in bank.parameters())
    Console().print(
        f"soft tokens for {kind}, {count:,} numbers: {out}   (model.soft_tokens={out} draws with them)", soft_wrap=True
    )
    return {"file": str(out), "parameters": count}


def imported(kind: str, tokens: str, times: str | None) -> SoftTokens:
    """The authors' files as a bank.

    Raises:
        UserError: see `run`.
    """
    if kind not in SPECS:
        raise UserError(f"soft tokens were published for model={', '.join(SPECS)}, not for a model of kind {kind!r}")
    spec = SPECS[kind]
    if (times is None) != (spec.buckets == 0):
        fix = "leave out task.times" if times else "give task.times=<dc_t_tokens.pth>"
        raise UserError(f"model={kind}: the published tokens have {'no' if times else 'a'} time table: {fix}")
    bank = SoftTokens(spec)
    with torch.no_grad():
        bank.tokens[0].copy_(_read(tokens, (spec.layers, spec.tokens, spec.dim)))
        if times is not None:
            bank.time[0].copy_(_read(times, (spec.buckets, spec.layers, spec.dim)))
    return bank


def _read(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor out of a .pth, saved as such or as an nn.Embedding.

    Torch's restricted unpickler may fill that class, and runs nothing of it.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a file that torch.save has written")
    try:
        with torch.serialization.safe_globals([nn.Embedding]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path}: neither a tensor nor an nn.Embedding ({str(error).splitlines()[0][:100]})") from error
    tensor = held.weight if isinstance(held, nn.Embedding) else held
    if not torch.is_tensor(tensor) or tensor.numel() != torch.Size(shape).numel() or tensor.shape[-1] % shape[-1]:
        content = tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
        raise UserError(f"{path} holds {content}, where {shape} is expected")
    return tensor.detach().float().reshape(shape)
