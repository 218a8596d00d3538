"""Where classes of version 0.1 are now: the configs and checkpoints of its runs name them as they were called then."""

from typing import Any

MOVED = {  # modules below t2i_rl, or classes that changed their names too
    "callbacks.turns": "methods.irg.watch",
    "checkpoint_io": "core.checkpoint_io",
    "claim": "command.claim",
    "data.irgl": "methods.irg.data",
    "data.prompt_stream": "data.prompts",
    "fsdp": "core.fsdp",
    "irg.interleave": "methods.irg.rounds",
    "irg.interleave.Interleave": "methods.irg.rounds.Rounds",
    "irg.make": "methods.irg.make",
    "irg.teachers": "methods.irg.teachers",
    "irg.world": "methods.irg.world",
    "irg.writers": "methods.irg.writers",
    "loggers": "tasks.loggers",
    "methods.agsm": "methods.pairs.agsm",
    "methods.denoising": "methods.pairs.denoising",
    "methods.diffusion_dpo": "methods.pairs.diffusion_dpo",
    "methods.grpo": "methods.policy.tokens",
    "methods.irg": "methods.irg.training",
    "methods.langevin": "methods.noise.langevin",
    "methods.noise_opt": "methods.noise.climb",
    "methods.noise_search": "methods.noise.search",
    "methods.softrepa": "methods.pairs.softrepa",
    "methods.trajectory_grpo": "methods.irg.policy",
    "models.flux": "models.diffusion.flux",
    "models.janus": "models.autoregressive.janus",
    "models.sana": "models.diffusion.sana",
    "models.sd3": "models.diffusion.sd3",
    "models.stable_diffusion": "models.diffusion.stable_diffusion",
    "rollout.engine": "models.autoregressive.engine.engine",
    "sweep": "command.sweep",
}


def name_now(name: str) -> str:
    """Today's dotted path of a class; any other text as it is."""
    path = name.removeprefix("t2i_rl.")
    module, _, kind = path.rpartition(".")
    if path == name or not {path, module} & set(MOVED):
        return name
    return f"t2i_rl.{MOVED[path]}" if path in MOVED else f"t2i_rl.{MOVED[module]}.{kind}"


def names_now(value: Any) -> Any:
    """The same of every text in lists and dicts."""
    if isinstance(value, dict):
        return {key: names_now(item) for key, item in value.items()}
    if isinstance(value, list):
        return [names_now(item) for item in value]
    return name_now(value) if isinstance(value, str) else value
