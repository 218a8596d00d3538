"""What a text is worth: the pictures of a trained run where its reflections, or its plans, are replaced.

Everything else is as it was (same seeds):

    python experiments/irg_shapes/told.py <trained run> world <folder>     # run.py does this for every seed

`world`: the world's own reflection on the very picture, what perfect eyes would say. `another`: the world's on another
prompt's picture, a control. `stop`: always that nothing is wrong, which shows what drawing again changes by itself.
`plan`: its own reflections, and the world's plan in front of the first picture: a true reflection ends with such a
plan, and this is what one is worth by itself.
"""

import argparse
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import OmegaConf

from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.methods.irg.world import World
from t2i_rl.models.autoregressive.segments import Written
from t2i_rl.shapes.reflections import NO_CHANGE
from t2i_rl.shapes.scene import sample_scene
from t2i_rl.shapes.suites import wishes
from t2i_rl.shapes.text import plan
from t2i_rl.tasks.train import build_method

KINDS = {"world": "reflect", "another": "reflect", "stop": "reflect", "plan": "think"}  # and the role of the text


def prompt_text(context) -> str:
    return next(segment.text for segment in context if segment.role == "prompt")


class Told:
    """A model that is told one kind of its texts, and writes the other."""

    def __init__(self, interleaved, kind: str, prompts: list):
        self.inner, self.own, self.kind = interleaved, interleaved.write, kind
        self.prompts, self.world = {prompt.text: prompt for prompt in prompts}, World()

    def write(self, contexts, role, seeds, max_tokens, temperature) -> list[Written]:
        if role != KINDS[self.kind]:
            return self.own(contexts, role, seeds, max_tokens, temperature)
        prompts = [self.prompts[prompt_text(context)] for context in contexts]
        texts = [
            self.told(prompt, context[-1].image, seed)
            for prompt, context, seed in zip(prompts, contexts, seeds, strict=True)
        ]
        if self.kind == "another":
            texts = texts[len(texts) // 2 :] + texts[: len(texts) // 2]
        return [Written(text, True, len(self.inner.janus.tokenizer(text)["input_ids"])) for text in texts]

    def told(self, prompt, image, seed: int) -> str:
        if self.kind == "stop":
            return NO_CHANGE
        if self.kind == "plan":
            return plan(sample_scene(wishes(prompt), np.random.default_rng(derive_seed(seed, "told")), self.world.size))
        return self.world.improve([prompt], image[None], [image], [seed])[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of method=irg")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    cfg = OmegaConf.load(options.run / "config.yaml")
    cfg.paths.output_dir = str(options.out)
    model, benchmark = instantiate(cfg.model), instantiate(cfg.benchmark)
    method = build_method(cfg, model)
    steps = method.load(str(options.run / "checkpoints" / "last.ckpt"))
    method.interleaved.write = Told(method.interleaved, options.kind, benchmark.prompts()).write
    trainer = instantiate(cfg.trainer, callbacks=[], logger=False)
    folder, evaluation, drawer = options.out / "evaluation", cfg.evaluation, method.drawer(model, method)
    stages = Stages(trainer, drawer, benchmark, folder, evaluation.seed, evaluation.batch_size)
    stages.draw("trained_turns")
    write_summary(cfg, stages, steps)


if __name__ == "__main__":
    main()
