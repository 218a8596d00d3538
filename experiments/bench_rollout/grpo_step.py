"""One whole GRPO step (rollout, scoring, reference, backward, optimizer) on a random model: time and memory of each phase."""

import time
from functools import partial

import lightning as L
import torch

from experiments.bench_rollout.sizes import SIZES, SPECIAL, build
from t2i_rl.core.encoder_texts import Reader
from t2i_rl.core.prompts import Prompt
from t2i_rl.methods.policy.metrics import peak_memory_gib
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


def grpo_step(size: str, args, device: torch.device) -> dict:
    """Seconds and peak memory of the second of two steps (the first records and allocates)."""
    on_gpu = device.type == "cuda"
    model = build(size, torch.float32, device)
    janus = RandomJanus(model, args.plan_tokens, EngineOptions(dtype="bfloat16" if on_gpu else None))
    module = GRPO(
        janus,
        SelfCertainty(),
        partial(torch.optim.AdamW, lr=1e-6),
        group_size=args.group,
        micro_batch_size=4 if SIZES[size][0] > 1000 else 16,
        gradient_checkpointing=on_gpu,
    )
    prompts = [(number, Prompt(str(number), f"thing {number} beside thing {number + 1}")) for number in range(args.prompts)]  # fmt: skip
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu", devices=1, max_steps=2, precision="bf16-mixed" if on_gpu else "32-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(module, torch.utils.data.DataLoader([prompts, prompts], batch_size=None, collate_fn=list))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    phases = {name: logged[f"time/{name}"] for name in ("rollout", "score", "reward", "update")}
    return {
        "rows": args.prompts * args.group,
        "seconds": sum(phases.values()),
        "phases": phases,
        "peak_gib": peak_memory_gib(),
        "both_steps": time.perf_counter() - started,
    }
