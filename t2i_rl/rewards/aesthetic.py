"""LAION's aesthetic predictor v2: how well an image would be rated, by a head on CLIP."""

from pathlib import Path

import torch
from torch import nn

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.loading import first_line, load_model, load_part
from t2i_rl.core.numbers import Count, Device, Dtype
from t2i_rl.core.prompts import Prompt
from t2i_rl.rewards.open_clip import read_state
from t2i_rl.rewards.pixels import prepared, to_unit


class Aesthetic(Reward):
    """Rating, about 1 to 10; the prompt is not read.

    Two heads are published, trained on different ratings: `sac+logos+ava1-l14-linearMSE.pth` (DDPO,
    DNO) and `ava+logos-l14-linearMSE.pth` (ReNO). Which one was used is part of the number, so
    that `parts` carries its name.

    Args:
        path: CLIP ViT-L/14, a folder or hub id.
        head: a file, read as plain tensors.

    Raises:
        UserError: a checkpoint that cannot be loaded, or a head for embeddings of another width.
    """

    differentiable = True

    def __init__(
        self,
        path: str,
        head: str,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: Device | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoImageProcessor, CLIPModel

        self.batch_size, self.head_name = batch_size, Path(head).stem
        if not Path(head).is_file():
            source = "github.com/christophschuhmann/improved-aesthetic-predictor"
            raise UserError(f"reward.head={head}: there is no such file; it is on {source}")
        state = read_state(str(Path(head).parent), Path(head).name, None)
        self.image_processor = load_part(AutoImageProcessor, path, revision)
        self.model = load_model(CLIPModel, path, kind="clip", dtype=dtype, device=device, revision=revision)
        self.model.requires_grad_(False)
        self.head = build_head(state, head, self.model.config.projection_dim).to(self.model.device)

    def __call__(self, drawn: Drawn) -> RewardOutput:
        """Of uint8 images, through the same differentiable preparation."""
        pixels = to_unit(drawn.images)
        with torch.no_grad():
            parts = [self.score_pixels(part) for part in pixels.split(self.batch_size)]
        total = torch.cat(parts).double().cpu()
        return RewardOutput(total, {self.head_name: total})

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt] | None = None) -> torch.Tensor:
        """Ratings `(B,)`, float32, with gradients to float32 pixels `(B, 3, H, W)` in [0, 1]."""
        pixel_values = prepared(pixels.to(self.model.device), self.image_processor).to(self.model.dtype)
        embeds = self.model.get_image_features(pixel_values=pixel_values).pooler_output.float()
        return self.head(embeds / embeds.norm(dim=-1, keepdim=True)).squeeze(-1)


def build_head(state: dict[str, torch.Tensor], file: str, width: int) -> nn.Sequential:
    """The published head: linear layers under `layers.<n>`, without activations.

    Dropout stands between some of them.

    Raises:
        UserError: the file holds no such head, or one for another CLIP.
    """
    names = [name for name in state if name.startswith("layers.") and name.endswith("weight")]
    shapes = {int(name.split(".")[1]): state[name].shape for name in names}
    if 0 not in shapes or shapes[0][1] != width:
        raise UserError(f"{file} is no aesthetic head for embeddings of {width}")
    layers = [nn.Linear(*shapes[i][::-1]) if i in shapes else nn.Identity() for i in range(max(shapes) + 1)]
    head = nn.Sequential(*layers)
    try:
        head.load_state_dict({name.removeprefix("layers."): value.float() for name, value in state.items()})
    except RuntimeError as error:
        raise UserError(f"{file} is no aesthetic head: {first_line(error)}") from error
    return head.eval().requires_grad_(False)
