"""The weights that decoding reads, packed once a rollout: adapters merged, projections fused."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from t2i_rl.core.hashing import gathered


@dataclass
class LayerWeights:
    """One decoder layer; `qkv` and `gate_up` are the projections side by side.

    Biases are None where the model has none.
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, in a fixed order."""
        yield from (value for value in vars(self).values() if value is not None)


@dataclass
class Weights:
    """A Janus language model with both vocabularies: `text_embed` `(V, D)` and `text_head` `(V, D)`
    for words, `image_embed` `(codes, D)` (codebook embeddings already through the aligner) and
    `image_head` for pictures."""

    text_embed: torch.Tensor
    image_embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    text_head: torch.Tensor
    image_head: list[tuple[torch.Tensor, torch.Tensor]]
    image_activation: Callable

    def ends(self) -> Iterator[torch.Tensor]:
        """What comes before and after the layers, in a fixed order."""
        yield from (self.text_embed, self.image_embed, self.norm, self.text_head)
        for pair in self.image_head:
            yield from pair

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, in a fixed order."""
        yield from self.ends()
        for layer in self.layers:
            yield from layer.tensors()

    def bytes_per_step(self) -> int:
        """What a decoding step of image tokens has to read: trunk and image head, no embeddings."""
        unread = (self.text_embed, self.image_embed, self.text_head)
        return sum(t.nbytes for t in self.tensors() if all(t is not other for other in unread))


@torch.no_grad()
def pack(model: Any, dtype: torch.dtype, device: torch.device, into: Weights | None = None) -> Weights:
    """Read `JanusForConditionalGeneration` into `Weights`, new ones or those of `into`, a layer at
    a time: no second copy comes to be.

    LoRA adapters are added in float32 and rounded once. Under FSDP every rank must call it
    together: each weight is gathered once.
    """

    def plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else gathered(tensor).to(device=device, dtype=dtype, copy=True)

    def fused(*linears: nn.Module) -> torch.Tensor:
        return torch.cat([merged_weight(linear).to(device=device, dtype=dtype) for linear in linears])

    def linear(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        return fused(module), plain(module.bias)

    def layer(block: nn.Module) -> LayerWeights:
        attention, mlp = block.self_attn, block.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None if parts[0].bias is None else torch.cat([plain(part.bias) for part in parts])
        return LayerWeights(
            plain(block.input_layernorm.weight),
            fused(*parts),
            bias,
            *linear(attention.o_proj),
            plain(block.post_attention_layernorm.weight),
            fused(mlp.gate_proj, mlp.up_proj),
            fused(mlp.down_proj),
        )

    def ends() -> Weights:
        parts = model.model
        trunk, aligner, head = parts.language_model, parts.generation_aligner, parts.generation_head
        image_embed = plain(model.model.generation_embeddings.weight)
        for number, module in enumerate([aligner.fc1, *aligner.hidden_layers]):
            image_embed = aligner.activation_fn(image_embed) if number else image_embed
            image_embed = nn.functional.linear(image_embed, *linear(module))
        return Weights(
            text_embed=plain(trunk.embed_tokens.weight),
            image_embed=image_embed,
            layers=[],
            norm=plain(trunk.norm.weight),
            text_head=fused(model.lm_head),
            image_head=[linear(head.proj_out), linear(head.vision_head)],
            image_activation=head.activation_fn,
        )

    blocks = model.model.language_model.layers
    if into is None:
        packed = ends()
        packed.layers = [layer(block) for block in blocks]
        return packed
    for old, new in zip(into.ends(), ends().ends(), strict=True):
        old.copy_(new)
    for old_layer, block in zip(into.layers, blocks, strict=True):
        for old, new in zip(old_layer.tensors(), layer(block).tensors(), strict=True):
            old.copy_(new)
    return into


def merged_weight(linear: nn.Module) -> torch.Tensor:
    """The weight of a linear layer with its active LoRA adapters added in float32."""
    if not isinstance(linear, LoraLayer):
        return gathered(linear.weight)
    weight = gathered(linear.get_base_layer().weight)
    if linear.disable_adapters:
        return weight
    for name in linear.active_adapters:
        up, down = gathered(linear.lora_B[name].weight).float(), gathered(linear.lora_A[name].weight).float()
        weight = weight.float() + linear.scaling[name] * up @ down
    return weight
