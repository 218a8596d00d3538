"""A random Janus of the real classes, small enough to make in a moment.

It is saved once a session, and loaded through the real path.
"""

import torch

from t2i_rl.core.prompts import Prompt
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.autoregressive.janus_tiny import build_model, build_processor
from t2i_rl.models.autoregressive.rollout import TokenRollout

CHAT = {"system": "", "instruction": "describe the picture: {prompt}"}
PROMPTS = [
    Prompt("0", "a red circle", "colors", {"include": [{"class": "circle", "count": 1, "color": "red"}]}),
    Prompt("1", "three blue squares", "counting", {"include": [{"class": "square", "count": 3, "color": "blue"}]}),
    Prompt(
        "2",
        "a drawing of a green cross left of a black triangle",
        "position",
        {"include": [{"class": "cross", "count": 1}]},
    ),
]


def save_tiny_janus(folder) -> str:
    """Random weights with logits spread enough for sampling to have something to choose."""
    torch.manual_seed(0)
    model = build_model(width=64, layers=2, codes=48)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
        model.model.generation_head.vision_head.weight.mul_(25)
        model.model.generation_embeddings.weight.normal_()
        model.model.vqmodel.quantize.embedding.weight.normal_()
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return str(folder)


def load_tiny_janus(folder, **settings) -> Janus:
    return Janus(folder, CHAT, **{"guidance_scale": 3.0, "max_plan_tokens": 12, **settings})


def tiny_rollout(module, prompts=PROMPTS[:2]) -> TokenRollout:
    return module.roll_out(list(enumerate(prompts)))
