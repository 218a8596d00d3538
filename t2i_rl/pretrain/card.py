"""The card of a freshly made tiny model, as Markdown: recipe, figures by stage, benchmark with intervals."""

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from t2i_rl.evaluation.stage import Stage


def facts(
    name: str, seed: int, minutes: float, model: torch.nn.Module, files: list[Path], initial_weights: str | None = None
) -> dict:
    """Where, when and how a model was made."""
    went_on = f" task.initial_weights={initial_weights}" if initial_weights else ""
    gpu = torch.cuda.is_available()
    return {
        "command": f"python run.py task=pretrain model={name} seed={seed}{went_on}",
        "seed": seed,
        "commit": git_commit(),
        "device": torch.cuda.get_device_name()
        if gpu
        else f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}",
        "minutes": minutes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": sum(file.stat().st_size for file in files) / 1e6,
    }


def git_commit() -> str:
    """The commit of this code, short."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def percent(cell: dict, digits: int = 1) -> str:
    """A share with its interval."""
    return f"{100 * cell['mean']:.{digits}f} % [{100 * cell['low']:.{digits}f}, {100 * cell['high']:.{digits}f}]"


def card(
    name: str,
    library: str,
    about: str,
    recipe: str,
    figures: list[tuple[str, str, str]],
    settings: str,
    results: dict,
    made: dict,
) -> str:
    """`figures` are rows (stage, figure, value); `settings` says how the benchmark was drawn."""
    stages = [stage for stage in ("base_direct", "base_plan") if stage in results["stages"]]
    first = results["stages"][stages[0]]["metrics"]
    tasks = [metric for metric in first if metric.startswith("task/")]
    names = [metric for metric in ("overall", *tasks, "seen", "held_out", "lenient") if metric in first]
    cells = {metric: [percent(results["stages"][stage]["metrics"][metric]) for stage in stages] for metric in names}
    benchmark = results["benchmark"]
    origin = (
        f"Made on {date.today()} by `{made['command']}` (seed {made['seed']}, commit {made['commit']}, "
        f"{made['device']}, {made['minutes']:.0f} minutes)."
    )
    size = f"{made['parameters'] / 1e6:.2f} M parameters, stored in float16 ({made['megabytes']:.1f} MB)."
    drawn = (
        f"{benchmark['n_prompts']} test prompts x {benchmark['samples_per_prompt']} images, seed {results['seed']}, "
        f"95 % bootstrap over prompts, prompts sha256 `{benchmark['prompts_sha256'][:12]}`."
    )
    figure_rows = ["| " + " | ".join(row) + " |" for row in figures]
    metric_rows = [f"| {metric.removeprefix('task/')} | " + " | ".join(row) + " |" for metric, row in cells.items()]
    ways = " | ".join(Stage.parse(stage).way for stage in stages)
    lines = ["---", "license: apache-2.0", f"library_name: {library}", "---", f"# {name}", "", about, ""]
    lines += [origin, size, ""]
    lines += ["## Recipe", "", "```yaml", recipe.rstrip(), "```", ""]
    lines += ["## Figures by stage", "", "| stage | figure | value |", "|---|---|---|", *figure_rows, ""]
    lines += [f"## `shapes` v{benchmark['version']}, strict, {settings}", "", drawn, ""]
    lines += [f"| | {ways} |", "|---|" + "---|" * len(stages), *metric_rows, ""]
    return "\n".join(lines)
