"""Item `step`: whole GRPO steps at Janus-Pro-1B's shape, float32 weights and AdamW, bfloat16 autocast."""

import torch

from experiments.bench_rollout.bench import Settings
from experiments.bench_rollout.grpo_step import PHASES, grpo_step
from experiments.gpu.record import Measured
from experiments.gpu.terms import Terms

SIZES = {
    "real": ("1b", Settings(), 3),
    "tiny": ("tiny", Settings(prompts=2, group=4, plan_tokens=8), 2),
}


def run(measured: Measured, terms: Terms) -> None:
    size, settings, steps = SIZES[terms.sizes]
    measured.keep("rows", settings.prompts * settings.group)
    grpo_step(size, settings, torch.device(terms.device), steps, keep=lambda steps: measured.keep("steps", steps))


def table(measured: Measured) -> str:
    lines = [
        f"{measured.values['rows']} rows a step. The first step records and allocates. GiB: at the peak, and what "
        "stood before the step (weights, the reference's, moments, what the engine keeps); on a CPU the process's "
        "peak.",
        "",
        f"| step | seconds | {' | '.join(PHASES)} | peak GiB | before it |",
        f"|--:|--:|{'--:|' * len(PHASES)}--:|--:|",
    ]
    for number, step in enumerate(measured.values.get("steps", []), start=1):
        phases = " | ".join(f"{step['phases'][name]:.2f}" for name in PHASES)
        lines.append(
            f"| {number} | {step['seconds']:.2f} | {phases} | {step['peak_gib']:.1f} | {step['held_gib']:.1f} |"
        )
    return "\n".join(lines)
