"""FlowEdit: an image of one text into one of another, without inversion (arXiv 2412.08629)."""

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.seeding import derive_seed, row_normals
from t2i_rl.models.diffusion import guidance
from t2i_rl.models.diffusion.base import TextEncoding
from t2i_rl.models.diffusion.sd3 import SD3

CONVENTIONS = ("standard", "released")


def check_flow(steps: int, start: int, average: int, convention: str) -> None:
    """Whether an edit can be asked for so; the command line asks before any weight loads.

    Raises:
        UserError: `start`, `average` or `convention` outside its range.
    """
    if not 0 <= start <= steps or average < 1 or convention not in CONVENTIONS:
        choices = " or ".join(CONVENTIONS)
        raise UserError(
            f"task.start is from 0 to task.steps={steps}, task.average 1 or more, task.convention {choices}"
        )


def guided(cond: torch.Tensor, null: torch.Tensor, scale: float, convention: str = "standard") -> torch.Tensor:
    """Velocity under guidance. `standard`: `null + scale (cond - null)`; `released` (SoftREPA's
    editor, for the target text only): `cond + scale (cond - null)`, which is the standard one at
    `scale + 1`."""
    return guidance.guided(cond, null, scale + (convention == "released"))


@torch.no_grad()
def flow_edit(
    model: SD3,
    x_source: torch.Tensor,
    source: list[str],
    target: list[str],
    seeds: list[int],
    steps: int = 50,
    start: int = 33,
    source_guidance: float = 3.5,
    target_guidance: float = 13.5,
    average: int = 1,
    convention: str = "standard",
) -> torch.Tensor:
    """Edited latents `(B, C, h, w)` of `x_source` `(B, C, h, w)` (Alg. 1 with n_min = 0).

    Args:
        source, target: the texts of the image and of what it is to become.
        start: how many of the `steps`, counted from the clean end, are taken: more change more.
        average: noise draws a step; row `i` draws from `seeds[i]` alone.
        convention: of the target's guidance, see `guided`.

    All four predictions of a step read the model's soft tokens, if it has some, empty prompts those
    of their branch.

    Raises:
        UserError: `start`, `average` or `convention` outside its range.
    """
    check_flow(steps, start, average, convention)
    scheduler, rows = model.pipe.scheduler, len(x_source)
    scheduler.set_timesteps(steps, device=x_source.device)
    sigmas = torch.cat([scheduler.timesteps / 1000, scheduler.timesteps.new_zeros(1)]).to(x_source)
    texts = [model.encode_prompts(words) for words in ([""] * rows, source, target)]
    null_text, source_text, target_text = texts
    text = _stack([null_text, null_text, source_text, target_text])
    empty = torch.arange(4 * rows, device=x_source.device) < 2 * rows
    edited = x_source.clone()
    for step in range(steps - start, steps):
        t, ahead = sigmas[step], sigmas[step + 1]
        change = torch.zeros_like(edited)
        for draw in range(average):
            step_seeds = [derive_seed(seed, "edit", step, draw) for seed in seeds]
            noise = row_normals(step_seeds, x_source.shape[1:]).to(x_source)
            noised = (1 - t) * x_source + t * noise
            moved = edited + noised - x_source
            x_t = torch.cat([noised, moved, noised, moved])
            velocity = model.predict(x_t, (t * 1000).expand(len(x_t)), text, empty=empty)
            source_null, target_null, source_cond, target_cond = velocity.chunk(4)
            change += guided(target_cond, target_null, target_guidance, convention)
            change -= guided(source_cond, source_null, source_guidance)
        edited = edited + (ahead - t) * change / average
    return edited


def _stack(texts: list[TextEncoding]) -> TextEncoding:
    pooled = None if texts[0].pooled is None else torch.cat([text.pooled for text in texts])
    return TextEncoding(torch.cat([text.embeds for text in texts]), pooled)
