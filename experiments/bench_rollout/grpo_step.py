"""One whole GRPO step (rollout, scoring, reference, backward, optimizer) on a random model: phases and memory."""

from collections.abc import Callable
from functools import partial

import lightning as L
import torch

from experiments.bench_rollout.bench import Settings
from experiments.bench_rollout.sizes import SIZES, SPECIAL, build
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.readers import Reader
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.engine.engine import Engine, EngineOptions
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.rewards.self_certainty import SelfCertainty


class Numbers:
    """Stands in for a tokenizer: words are numbers. Random weights write nothing that a real one could read."""

    def __call__(self, text: str, add_special_tokens: bool):
        words = [5 + sum(map(ord, word)) % 90 for word in text.split()]
        return type("Encoding", (), {"input_ids": words})

    def batch_decode(self, tokens, skip_special_tokens=True) -> list[str]:
        return [" ".join(map(str, row[:40].tolist())) for row in tokens]


class RandomJanus(Janus):
    """The adapter around a model that was made, not loaded."""

    def __init__(self, model, plan_tokens: int, rollout: EngineOptions):
        torch.nn.Module.__init__(self)
        self.model, self.engine, self.tokenizer = model, Engine(rollout), Numbers()
        self.reader, self.special_texts = Reader("RandomJanus", "", []), []
        self.chat, self.special = Chat("", "describe {prompt}"), {**SPECIAL, "eos": -1}
        self.guidance_scale, self.temperature, self.max_plan_tokens = 5.0, 1.0, plan_tokens


PHASES = ("rollout", "score", "reward", "update")


class Watch(L.Callback):
    """Writes down seconds by phase and GiB of every step, as soon as it is over."""

    def __init__(self, steps: list[dict], keep: Callable[[list[dict]], None]):
        self.steps, self.keep = steps, keep

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, batch_idx: int) -> None:
        self.held = 0.0
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)
            self.held = torch.cuda.memory_allocated(module.device) / 2**30

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        phases = {name: metrics[f"time/{name}"] for name in PHASES}
        self.steps.append(
            {
                "seconds": sum(phases.values()),
                "phases": phases,
                "peak_gib": metrics["memory/peak_gib"],
                "held_gib": self.held,  # before the step: weights, moments, what the engine keeps
            }
        )
        self.keep(self.steps)


def grpo_step(
    size: str,
    settings: Settings,
    device: torch.device,
    steps: int = 2,
    keep: Callable[[list[dict]], None] = lambda steps: None,
) -> dict:
    """Seconds and peak memory of the last of so many steps (the first records and allocates), and of each.

    Args:
        keep: is given the steps so far, after each.
    """
    on_gpu = device.type == "cuda"
    model = build(size, torch.float32, device)
    janus = RandomJanus(model, settings.plan_tokens, EngineOptions(dtype="bfloat16" if on_gpu else None))
    module = GRPO(
        janus,
        SelfCertainty(),
        partial(torch.optim.AdamW, lr=1e-6),
        group_size=settings.group,
        micro_batch_size=4 if SIZES[size][0] > 1000 else 16,
        gradient_checkpointing=on_gpu,
    )
    texts = [f"thing {number} beside thing {number + 1}" for number in range(settings.prompts)]
    prompts = [(number, Prompt(str(number), text)) for number, text in enumerate(texts)]
    measured: list[dict] = []
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        max_steps=steps,
        precision="bf16-mixed" if on_gpu else "32-true",
        callbacks=[Watch(measured, keep)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([prompts] * steps, batch_size=None, collate_fn=list))
    return {"rows": settings.prompts * settings.group, "steps": measured, **measured[-1]}
