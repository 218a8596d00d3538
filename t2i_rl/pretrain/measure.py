"""The figures of a freshly made janus_tiny, stage by stage, each with its n and a 95% interval."""

import re

import numpy as np
import torch

from t2i_rl.evaluation.stats import wilson
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.engine.decode import decode_text
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.pretrain.janus_lm import look_ids
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.render import render, to_pixels
from t2i_rl.shapes.suites import select_prompts
from t2i_rl.shapes.text import plan

_PLAN_ITEM = re.compile(r"(?:at the (\w+ \w+) )?an? (\w+) (\w+)(?: at the (\w+ \w+))?\.")
_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}


def held_back_scenes(count: int, seed: int) -> list:
    """Scenes that no training batch drew: the stream of another seed."""
    rng = np.random.default_rng((seed, 3))
    return [sample_example(rng)[1] for _ in range(count)]


@torch.no_grad()
def vq_figures(janus: Janus, count: int = 1000, seed: int = 1) -> dict:
    """Reconstruction: PSNR in dB, share of scenes that the oracle reads back unchanged, codes in use."""
    codes = []

    def there_and_back(images: np.ndarray) -> np.ndarray:
        codes.append(nearest_codes(janus.model.model.vqmodel, to_pixels(images)))
        return janus.decode(codes[-1])

    figures = reconstruction_figures(there_and_back, count, seed)
    used = int(torch.cat(codes).unique().numel())
    return figures | {"codes_used": used, "codes": janus.model.config.vq_config.num_embeddings}


def reconstruction_figures(there_and_back, count: int = 1000, seed: int = 1) -> dict:
    """An autoencoder on held-back scenes: PSNR in dB, share of scenes that the oracle reads back unchanged.

    `there_and_back` takes uint8 images and returns them, uint8 again, as the autoencoder decodes
    them.
    """
    scenes = held_back_scenes(count, seed)
    images = np.stack([render(scene) for scene in scenes])
    back = np.concatenate([there_and_back(part) for part in np.array_split(images, 10)])
    error = ((back.astype(float) - images) ** 2).mean(axis=(1, 2, 3))
    agree = sum(contents(found) == contents(scene.objects) for found, scene in zip(detect(back), scenes, strict=True))
    return {"psnr_db": float(np.mean(10 * np.log10(255**2 / error))), "oracle_agreement": wilson(agree, count)}


def contents(objects) -> list[str]:
    """What a scene holds, regardless of place; a malformed blob is never equal to an object."""
    return sorted(
        "malformed" if getattr(item, "malformed", False) else f"{item.color} {item.shape}" for item in objects
    )


def plan_holds(text: str, include: list[dict]) -> bool:
    """Whether a plan lists exactly the objects that the clauses ask for, and says rightly how many."""
    items = _PLAN_ITEM.findall(text)
    first = text.split(" ", 1)[0]
    if _COUNTS.get(first) != len(items) or len(items) != sum(clause["count"] for clause in include):
        return False
    left = [(color, shape) for _, color, shape, _ in items]
    for clause in sorted(include, key=lambda clause: "color" not in clause):
        for _ in range(clause["count"]):
            fits = [item for item in left if item[1] == clause["class"] and clause.get("color", item[0]) == item[0]]
            if not fits:
                return False
            left.remove(fits[0])
    return True


def plan_figures(janus: Janus, per_task: int = 40, samples: int = 2) -> dict:
    """Plan text: share of plans for test prompts that list exactly the objects asked for (places are not judged)."""
    prompts = select_prompts("test", per_task) * samples
    _, _, plans = janus.draw_plans([prompt.text for prompt in prompts], list(range(len(prompts))))
    hits = sum(plan_holds(text, prompt.meta["include"]) for text, prompt in zip(plans, prompts, strict=True))
    return {"names_what_is_asked": wilson(hits, len(prompts)), "distinct": len(set(plans)) / len(plans)}


@torch.no_grad()
def look_figures(janus: Janus, count: int = 500, seed: int = 1) -> dict:
    """Understanding: share of held-back images that are described rightly, by greedy decoding.

    `description_exact` asks for the scene's own plan word for word, `objects_exact` for its objects
    alone.
    """
    scenes = held_back_scenes(count, seed + 1)
    pixels = to_pixels(np.stack([render(scene) for scene in scenes]))
    row = look_ids(janus.tokenizer, janus.special, janus.model.config.vision_config.num_image_tokens)
    ids = torch.tensor([row] * count)
    exact = objects = 0
    for first in range(0, count, 100):
        part = slice(first, first + 100)
        embeds = janus.model.model.get_image_features(pixels[part]).pooler_output
        texts = describe(janus, ids[part], embeds)
        for text, scene in zip(texts, scenes[part], strict=True):
            exact += text == plan(scene)
            objects += sorted(f"{color} {shape}" for _, color, shape, _ in _PLAN_ITEM.findall(text)) == contents(
                scene.objects
            )
    return {"description_exact": wilson(exact, count), "objects_exact": wilson(objects, count)}


def describe(janus: Janus, ids: torch.Tensor, image_embeds: torch.Tensor) -> list[str]:
    """Greedy descriptions of images given as aligned features, placed where the placeholder ids stand."""
    embeds = janus.model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == janus.special["image"]).unsqueeze(-1), image_embeds.to(embeds.dtype))
    janus.prepare()
    tokens, _ = decode_text(
        janus.engine,
        ids,
        torch.ones_like(ids),
        [0] * len(ids),
        max_tokens=64,
        eos=janus.special["eos"],
        temperature=0,
        embeds=embeds,
    )
    return [text.strip() for text in janus.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
