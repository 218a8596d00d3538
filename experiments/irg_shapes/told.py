"""What a reflection is worth: the second pictures of a trained run where its reflections are replaced, everything else as it was (same first pictures, same seeds).

    python experiments/irg_shapes/told.py <trained run> world <folder>     # run.py does this for every seed

`world`: the world's own reflection on the very picture, what perfect eyes would say. `another`: the world's on another prompt's picture, a control. `stop`: always
that nothing is wrong, which shows what drawing again changes by itself.
"""

import argparse
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.irg.trajectory import Written
from t2i_rl.irg.world import World
from t2i_rl.shapes.reflections import NO_CHANGE
from t2i_rl.tasks.train import build_method

KINDS = ("world", "another", "stop")


class Told:
    """A model that writes its own plans, and as reflections what it is told."""

    def __init__(self, interleaved, kind: str, prompts: list):
        self.inner, self.own, self.kind = interleaved, interleaved.write, kind
        self.prompts, self.world = {prompt.text: prompt for prompt in prompts}, World()

    def write(self, contexts, role, seeds, max_tokens, temperature) -> list[Written]:
        if role != "reflect":
            return self.own(contexts, role, seeds, max_tokens, temperature)
        prompts = [self.prompts[next(each.text for each in context if each.role == "prompt")] for context in contexts]
        texts = [self.reflection(prompt, context[-1].image, seed) for prompt, context, seed in zip(prompts, contexts, seeds, strict=True)]  # fmt: skip
        if self.kind == "another":
            texts = texts[len(texts) // 2 :] + texts[: len(texts) // 2]
        return [Written(text, True, len(self.inner.janus.tokenizer(text)["input_ids"])) for text in texts]

    def reflection(self, prompt, image, seed: int) -> str:
        return NO_CHANGE if self.kind == "stop" else self.world.improve([prompt], image[None], [seed])[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of method=irg")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    cfg = OmegaConf.load(options.run / "config.yaml")
    cfg.paths.output_dir = str(options.out)
    model, benchmark = instantiate(cfg.model), instantiate(cfg.benchmark)
    method = build_method(cfg, model, reward=None, watch={})
    steps = method.load(str(options.run / "checkpoints" / "last.ckpt"))
    method.judge = None
    method.interleaved.write = Told(method.interleaved, options.kind, benchmark.prompts()).write
    trainer = instantiate(cfg.trainer, callbacks=[], logger=False)
    stages = Stages(trainer, model, benchmark, options.out / "evaluation", cfg.evaluation.seed, cfg.evaluation.batch_size, method.turns)  # fmt: skip
    stages.draw("trained_turns")
    write_summary(cfg, stages, steps)


if __name__ == "__main__":
    main()
