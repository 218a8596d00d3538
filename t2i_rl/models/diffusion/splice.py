"""Hooks that splice tokens into the text of chosen blocks of a denoiser, and take them out again.

The tokens of a call travel in its own attention arguments (`joint_attention_kwargs`,
`cross_attention_kwargs`) under a private key. Gradient checkpointing saves a block's arguments and
runs its hooks again with them, so a recomputed block reads the tokens of its own call and not those
of whichever call came last.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from t2i_rl.core.errors import UserError

KEY = "t2i_rl_soft_tokens"
EMPTY = "t2i_rl_empty_prompts"  # beside it, from a caller that says whose texts are guidance's empty prompt
POSITIONS = ("start", "after_bos", "end")
CARRIERS = {
    "UNet2DConditionModel": "cross_attention_kwargs",
    "SD3Transformer2DModel": "joint_attention_kwargs",
    "FluxTransformer2DModel": "joint_attention_kwargs",
}


def carrier(denoiser: nn.Module) -> str:
    """The name of the argument that reaches every block.

    Raises:
        UserError: a class that soft tokens are not made for.
    """
    name = type(denoiser).__name__
    if name not in CARRIERS:
        raise UserError(f"soft tokens go into {', '.join(CARRIERS)}, not into {name}")
    return CARRIERS[name]


def text_width(denoiser: nn.Module) -> int:
    """The width of the text that blocks read."""
    if type(denoiser).__name__ == "UNet2DConditionModel":
        return denoiser.config.cross_attention_dim
    return denoiser.inner_dim


def text_blocks(denoiser: nn.Module) -> list[str]:
    """Names of the blocks that read text, in the order of the forward pass."""
    carrier(denoiser)
    if type(denoiser).__name__ == "UNet2DConditionModel":
        blocks = {f"down_blocks.{i}": block for i, block in enumerate(denoiser.down_blocks)}
        blocks["mid_block"] = denoiser.mid_block
        blocks |= {f"up_blocks.{i}": block for i, block in enumerate(denoiser.up_blocks)}
        # diffusers: a block without attention to texts lacks the attribute
        return [name for name, block in blocks.items() if getattr(block, "has_cross_attention", False)]
    parts = dict(denoiser.named_children())
    lists = ("transformer_blocks", "single_transformer_blocks")  # SD3 has no single ones
    return [f"{name}.{i}" for name in lists for i in range(len(parts.get(name, ())))]


def layout_of(denoiser: nn.Module, layers: int | list[str] | None) -> dict[str, int]:
    """Block name -> layer of the bank.

    Args:
        layers: for transformers, how many of the first blocks get tokens of their own (the papers'
            "upper layers" are the first). For UNets, which parts (`down`, `mid`, `up`) share one
            set. None: 5 blocks (all, where there are fewer), or down and mid.

    Raises:
        UserError: more blocks than there are, or a part that is none.
    """
    names = text_blocks(denoiser)
    if type(denoiser).__name__ == "UNet2DConditionModel":
        parts = ["down", "mid"] if layers is None else layers
        if isinstance(parts, int) or not parts or set(parts) - {"down", "mid", "up"}:
            raise UserError(f"layers of a UNet are a list out of down, mid, up, not {layers}")
        return {name: 0 for name in names if name.split("_")[0] in parts}
    count = min(5, len(names)) if layers is None else layers
    if not isinstance(count, int) or not 1 <= count <= len(names):
        raise UserError(
            f"layers must be a number from 1 to {len(names)} for this {type(denoiser).__name__}, not {layers}"
        )
    return {name: i for i, name in enumerate(names[:count])}


class Splice:
    """Hooks on a denoiser. `provide(t, call)` gives tokens `(B, layers, K, D)` for times `t` `(B,)`
    in [0, 1000] of a call with these arguments by name, or None for none; a call that brings its
    own tokens (`carry`) is left as it is. Install before torch.compile; `remove` takes everything
    out.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layout: dict[str, int],
        position: str = "end",
        provide: Callable[[torch.Tensor, dict], torch.Tensor | None] | None = None,
    ):
        if getattr(denoiser, "soft_token_splice", None) is not None:  # set below, on a class of diffusers
            raise UserError(f"this {type(denoiser).__name__} has soft tokens already: remove them before others go in")
        denoiser.soft_token_splice = self
        self.denoiser, self.provide, self.enabled = denoiser, provide, True
        self.carrier, self.signature = carrier(denoiser), inspect.signature(denoiser.forward)
        self.handles = [denoiser.register_forward_pre_hook(self._fill, with_kwargs=True)]
        blocks = dict(denoiser.named_modules())
        for name in text_blocks(denoiser):  # all of them: whoever has no layer drops the key
            splice = BlockSplice(blocks[name], layout.get(name), self.carrier, position)
            self.handles.append(blocks[name].register_forward_pre_hook(splice.put_in, with_kwargs=True))
            if type(denoiser).__name__ != "UNet2DConditionModel":  # whose blocks return no text
                self.handles.append(blocks[name].register_forward_hook(splice.take_out))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.denoiser.soft_token_splice = [], None

    def _fill(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Before the whole model: ask for the tokens of this call and put them among its
        arguments."""
        bound = self.signature.bind_partial(*args, **kwargs).arguments
        carried = bound.get(self.carrier) or {}
        if not self.enabled or self.provide is None or KEY in carried:
            return None
        tokens = self.provide(times(module, bound["timestep"], len(latents_of(bound))), bound)
        if tokens is None:
            return None
        carried = {name: value for name, value in carried.items() if name != EMPTY}
        index = list(self.signature.parameters).index(self.carrier)
        if len(args) > index:
            return (*args[:index], {**carried, KEY: tokens}, *args[index + 1 :]), kwargs
        return args, {**kwargs, self.carrier: {**carried, KEY: tokens}}


class BlockSplice:
    """One block's two hooks: tokens into its text before it runs, out of its text after."""

    def __init__(self, block: nn.Module, layer: int | None, carrier: str, position: str):
        self.signature = inspect.signature(block.forward)
        self.layer, self.carrier, self.position = layer, carrier, position
        self.spliced = 0  # tokens in the text of the call that is running

    def put_in(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        arguments = self.signature.bind(*args, **kwargs).arguments
        carried = arguments.get(self.carrier)
        self.spliced = 0
        if not carried or KEY not in carried:
            return None
        arguments[self.carrier] = {key: value for key, value in carried.items() if key != KEY} or None
        if self.layer is not None:
            self._splice(arguments, carried[KEY][:, self.layer])
        return (), dict(arguments)

    def take_out(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        text, *image = output
        if not self.spliced or text is None:  # SD3's last block returns no text
            return None
        start = self._start(text.shape[1] - self.spliced)
        return torch.cat([text[:, :start], text[:, start + self.spliced :]], dim=1), *image

    def _splice(self, arguments: dict, tokens: torch.Tensor) -> None:
        text = arguments["encoder_hidden_states"]
        first = text[0] if isinstance(text, tuple) else text  # IP-Adapter: (text, images)
        start, self.spliced = self._start(first.shape[1]), tokens.shape[1]
        longer = torch.cat([first[:, :start], tokens.to(first), first[:, start:]], dim=1)
        arguments["encoder_hidden_states"] = (longer, *text[1:]) if isinstance(text, tuple) else longer
        bias = arguments.get("encoder_attention_mask")
        if bias is not None:  # additive, (B, 1, N)
            zeros = bias.new_zeros(*bias.shape[:-1], self.spliced)
            arguments["encoder_attention_mask"] = torch.cat([bias[..., :start], zeros, bias[..., start:]], dim=-1)
        if arguments.get("image_rotary_emb") is not None:  # Flux turns no text: its ids are all zero
            cos, sin = arguments["image_rotary_emb"]
            rows = (self.spliced, cos.shape[-1])
            arguments["image_rotary_emb"] = (
                torch.cat([cos[:start], cos.new_ones(rows), cos[start:]]),
                torch.cat([sin[:start], sin.new_zeros(rows), sin[start:]]),
            )

    def _start(self, length: int) -> int:
        """Where the tokens begin in a text of this length."""
        return {"start": 0, "after_bos": 1, "end": length}[self.position]


def latents_of(call: dict) -> torch.Tensor:
    """The latents among the arguments of a denoiser's call."""
    return call["sample"] if "sample" in call else call["hidden_states"]


def times(denoiser: nn.Module, timestep: torch.Tensor, rows: int) -> torch.Tensor:
    """A model's timestep argument as `(rows,)` in units of 0 to 1000; Flux counts from 0 to 1."""
    timestep = torch.as_tensor(timestep, device=next(denoiser.parameters()).device)
    scale = 1000 if type(denoiser).__name__ == "FluxTransformer2DModel" else 1
    return (timestep.reshape(-1) * scale).expand(rows)
