"""A benchmark of pictures of 512 px whose judge is a model goes through everything that takes a benchmark.

It is one file and one YAML.
"""

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from t2i_rl.core.prompts import Prompt, write_prompts
from t2i_rl.evaluation.report.html import write_report
from tests.support.commands import call
from tests.support.small_diffusers import pipeline
from tests.support.small_rewards import save_small_hps

SIZE, TEXTS = 512, ("a red circle", "three blue squares", "a green cross")
BENCHMARK = '''
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from t2i_rl import Benchmark, Column, Defect, Prompt, Verdict
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.loading import load_model, load_part


@dataclass(frozen=True)
class Seen(Verdict):
    cosine: float = 0.0


class Retrieval(Benchmark):
    """Is a picture closer to its own text than to the others, as a CLIP sees it?"""

    name, overall_tasks, image_sizes = "retrieval", ("one", "several"), (512,)
    columns = (
        Column("cosine", "cosine with its text", digits=3),
        Column("confused", "several taken for one", tasks=("several",), more_is_better=False),
    )

    def __init__(self, path: str, texts: tuple[str, ...], samples_per_prompt: int = 2):
        self.texts, self.samples_per_prompt = list(texts), samples_per_prompt
        self.clip = load_model(CLIPModel, path, kind="clip", dtype="float32", device="auto")
        self.pictures, words = load_part(AutoImageProcessor, path), load_part(AutoTokenizer, path)
        self.words = words(self.texts, padding=True, return_tensors="pt")
        self.weights = weights_sha256(self.clip)

    def prompts(self):
        return [Prompt(text, text, "one" if text.startswith("a ") else "several") for text in self.texts]

    @torch.no_grad()
    def look(self, images):
        assert images.shape[1:] == (512, 512, 3)
        pixels = self.pictures(images=list(images), return_tensors="pt")["pixel_values"]
        return self.clip(pixel_values=pixels, **self.words)

    def judge(self, images, prompts):
        output, verdicts = self.look(images), []
        for cosines, prompt in zip(output.image_embeds @ output.text_embeds.T, prompts, strict=True):
            own, best = self.texts.index(prompt.text), int(cosines.argmax())
            defects = [] if own == best else [Defect("mistaken", f"taken for {self.texts[best]}")]
            verdicts.append(Seen(own == best, own == best, float(own == best), defects, float(cosines[own])))
        return verdicts

    def measured(self, prompt, verdict):
        return {"cosine": verdict.cosine, "confused": not verdict.strict}

    def features(self, images):
        return self.look(images).image_embeds.numpy()

    def reference_features(self):
        colors = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3))
        return self.features(np.broadcast_to(colors, (8, 512, 512, 3)).astype(np.uint8))

    def fingerprint(self):
        return {**super().fingerprint(), "texts": self.texts, "clip": self.weights}
'''
MODEL = ["model=sd15", "model.steps=1", "model.guidance_scale=1", "model.dtype=float32", "model.device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The benchmark's file and YAML, a CLIP, a pipeline that draws 512 px from latents of 8, pictures to learn from."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "my_retrieval.py").write_text(BENCHMARK)
    (folder / "my_conf" / "benchmark").mkdir(parents=True)
    texts = f"[{', '.join(TEXTS)}]"
    yaml = f"_target_: my_retrieval.Retrieval\npath: {save_small_hps(folder / 'clip')}\ntexts: {texts}\n"
    (folder / "my_conf" / "benchmark" / "retrieval.yaml").write_text(yaml)
    write_prompts(
        folder / "prompts.jsonl", [Prompt(text, text, "several" if "squares" in text else "one") for text in TEXTS]
    )
    small = StableDiffusionPipeline.from_pretrained(pipeline("sd15", folder / "small"), vae=deep_vae())
    small.save_pretrained(folder / "model")
    (folder / "pairs").mkdir()
    for number, text in enumerate(TEXTS + TEXTS):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pairs" / f"{number}.png")
        (folder / "pairs" / f"{number}.txt").write_text(f"{text} number {number}")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("my_retrieval", None)


def deep_vae() -> AutoencoderKL:
    """An autoencoder whose latents are a 64th of the picture's side, so that the denoiser stays cheap."""
    return AutoencoderKL(
        block_out_channels=(8,) * 7,
        down_block_types=("DownEncoderBlock2D",) * 7,
        up_block_types=("UpDecoderBlock2D",) * 7,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def command(name: str, *arguments: str) -> tuple[dict, str]:
        given = [*MODEL, f"model.path={folder / 'model'}", "benchmark=retrieval", "trainer.accelerator=cpu"]
        code = call(monkeypatch, folder, "--config-dir", "my_conf", *given, *arguments, f"hydra.run.dir={name}")
        printed = capsys.readouterr()
        assert code == 0, printed.err[-3000:]
        return json.loads((folder / name / "results.json").read_text()), printed.out

    return command


def pictures_of(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r'base64,([^"]+)"', page)]


def test_an_evaluation_measures_its_columns_and_makes_a_small_page(folder, run):
    results, printed = run("evaluated", "task=evaluate", "evaluation.stages=[base_direct]")
    metrics = results["stages"]["base_direct"]["metrics"]
    assert {"overall", "task/one", "task/several", "cosine", "confused", "diversity", "vendi"} <= set(metrics)
    assert metrics["cosine"]["n_images"] == 6 and metrics["confused"]["n_images"] == 2
    assert "several taken for one" in printed and "cosine with its text" in printed and "malformed" not in printed
    page = write_report(folder / "evaluated").read_text()  # from the disk alone
    pictures = pictures_of(page)
    assert len(pictures) == 3 and {picture.size for picture in pictures} == {(256, 256)}
    whole = sorted((folder / "evaluated" / "evaluation" / "base_direct" / "images").glob("*.png"))
    assert Image.open(whole[0]).size == (SIZE, SIZE) and len(page) < 300_000
    links = re.findall(r'<a href="([^"]+)"><img', page)
    assert len(links) == 3 and all((folder / "evaluated" / link).is_file() for link in links)


def test_validation_draws_judges_and_compares_pictures_while_training(folder, run):
    results, _ = run(
        "trained",
        *(
            "method=denoising",
            "data=image_text",
            f"data.path={folder / 'pairs'}",
            "data.held_out=2",
            "data.batch_size=2",
        ),
        *("trainer.max_steps=1", "evaluation.stages=[]", "callbacks.validation.benchmark=${benchmark}"),
        *("callbacks.validation.best=val/confused", "~callbacks.sample_grid"),
    )
    assert results["steps"] == 1
    header, *rows = (folder / "trained" / "metrics.csv").read_text().splitlines()
    names = {name for name in header.split(",") if name.startswith("val/")}
    columns = {"val/cosine", "val/confused"}
    assert names == {"val/overall", "val/score", "val/one", "val/several", "val/fid", *columns} and rows


def test_a_search_over_noise_is_judged_and_has_its_page(folder, run):
    results, printed = run(
        "searched",
        *("method=noise_search", "method.evaluations=2", "data=prompts", f"data.path={folder / 'prompts.jsonl'}"),
        *("reward=clip", f"reward.path={folder / 'clip'}", "reward.device=cpu"),
        *("evaluation.stages=[]", "trainer.precision=32-true", "method.image_every=1", "++watch.oracle=null"),
    )
    best = results["stages"]["best"]["metrics"]
    assert results["headline"]["metric"] == "overall" and {"cosine", "confused", "target"} <= set(best)
    assert results["benchmark"]["clip"] and "several taken for one" in (folder / "searched" / "report.html").read_text()
    page = (folder / "searched" / "report.html").read_text()
    assert len(page) < 2_000_000 and "cannot judge" not in printed
    assert max(max(picture.size) for picture in pictures_of(page)) <= 1400
