"""The figures of a freshly made janus_tiny, stage by stage, each with its n and a 95% interval; and its model card."""

import math
import re
from datetime import date

import numpy as np
import torch

from t2i_rl.models.janus import Janus
from t2i_rl.pretrain.janus_lm import look_ids
from t2i_rl.pretrain.vq import nearest_codes
from t2i_rl.rollout.decode import decode_text
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.render import render, to_pixels
from t2i_rl.shapes.suites import select_prompts
from t2i_rl.shapes.text import plan

_PLAN_ITEM = re.compile(r"(?:at the (\w+ \w+) )?an? (\w+) (\w+)(?: at the (\w+ \w+))?\.")
_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}


def wilson(hits: int, n: int) -> dict:
    """Share with Wilson's 95% interval."""
    z, p = 1.959964, hits / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"mean": p, "low": (center - half) / (1 + z * z / n), "high": (center + half) / (1 + z * z / n), "n": n}


def held_back_scenes(count: int, seed: int) -> list:
    """Scenes that no training batch drew: the stream of another seed."""
    rng = np.random.default_rng((seed, 3))
    return [sample_example(rng)[1] for _ in range(count)]


@torch.no_grad()
def vq_figures(janus: Janus, count: int = 1000, seed: int = 1) -> dict:
    """Reconstruction: PSNR in dB, share of scenes that the oracle reads back unchanged, codes in use."""
    scenes = held_back_scenes(count, seed)
    images = np.stack([render(scene) for scene in scenes])
    codes = torch.cat(
        [nearest_codes(janus.model.model.vqmodel, to_pixels(part)) for part in np.array_split(images, 10)]
    )
    back = np.concatenate([janus.decode(part) for part in codes.chunk(10)])
    error = ((back.astype(float) - images) ** 2).mean(axis=(1, 2, 3))
    agree = sum(contents(found) == contents(scene.objects) for found, scene in zip(detect(back), scenes, strict=True))
    return {
        "psnr_db": float(np.mean(10 * np.log10(255**2 / error))),
        "oracle_agreement": wilson(agree, count),
        "codes_used": int(codes.unique().numel()),
        "codes": janus.model.config.vq_config.num_embeddings,
    }


def contents(objects) -> list[str]:
    """What a scene holds, regardless of place; a malformed blob is never equal to an object."""
    return sorted(
        "malformed" if getattr(item, "malformed", False) else f"{item.color} {item.shape}" for item in objects
    )


def plan_holds(text: str, include: list[dict]) -> bool:
    """Whether a plan says how many objects there are, lists as many, and lists exactly those that the clauses ask for."""
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
    """Understanding: share of held-back images whose greedy description is the scene's own plan, word for word; and objects alone."""
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


def card(figures: dict, results: dict, recipe: dict, facts: dict) -> str:
    """The model card as Markdown: recipe, figures by stage, benchmark with intervals."""

    def interval(cell: dict, digits: int = 1) -> str:
        return f"{100 * cell['mean']:.{digits}f} % [{100 * cell['low']:.{digits}f}, {100 * cell['high']:.{digits}f}]"

    vq, plans, look = figures["vq"], figures["plan"], figures["look"]
    stages = [stage for stage in ("base_direct", "base_plan") if stage in results["stages"]]
    names = [
        "overall",
        *(name for name in results["stages"][stages[0]]["metrics"] if name.startswith("task/")),
        "seen",
        "held_out",
        "lenient",
    ]
    rows = [
        "| "
        + name.removeprefix("task/")
        + " | "
        + " | ".join(interval(results["stages"][stage]["metrics"][name]) for stage in stages)
        + " |"
        for name in names
        if name in results["stages"][stages[0]]["metrics"]
    ]
    benchmark = results["benchmark"]
    return "\n".join([
        "---", "license: apache-2.0", "library_name: transformers", "---", "# janus_tiny", "",
        "transformers' own `JanusForConditionalGeneration` (language model, generation head, VQ model, understanding tower) trained from nothing on",
        "the embedded world `shapes`. It is a test bench, not a picture model: an effect seen on it is evidence about the implementation of an",
        "algorithm, not about Janus-Pro.", "",
        f"Made on {date.today()} by `{facts['command']}` (seed {facts['seed']}, commit {facts['commit']}, {facts['device']}, {facts['minutes']:.0f} minutes).",
        f"{facts['parameters'] / 1e6:.2f} M parameters, stored in float16 ({facts['megabytes']:.1f} MB).", "",
        "## Recipe", "", "```yaml", recipe["yaml"].rstrip(), "```", "",
        "## Figures by stage", "", "| stage | figure | value |", "|---|---|---|",
        f"| VQ reconstruction | PSNR | {vq['psnr_db']:.1f} dB |",
        f"| | oracle reads the same objects (n={vq['oracle_agreement']['n']}) | {interval(vq['oracle_agreement'])} |",
        f"| | codes in use | {vq['codes_used']} of {vq['codes']} |",
        f"| plan text | names exactly what the test prompt asks (n={plans['names_what_is_asked']['n']}) | {interval(plans['names_what_is_asked'])} |",
        f"| image understanding | objects read exactly (n={look['objects_exact']['n']}) | {interval(look['objects_exact'])} |",
        f"| | whole description word for word | {interval(look['description_exact'])} |", "",
        f"## `shapes` v{benchmark['version']}, strict, guidance {results['sampling']['guidance_scale']}, temperature {results['sampling']['temperature']}", "",
        f"{benchmark['n_prompts']} test prompts x {benchmark['samples_per_prompt']} images, seed {results['seed']}, 95 % bootstrap over prompts, "
        f"prompts sha256 `{benchmark['prompts_sha256'][:12]}`.", "",
        "| | " + " | ".join(stage.removeprefix("base_") for stage in stages) + " |", "|---|" + "---|" * len(stages), *rows, "",
    ])  # fmt: skip
