"""`task=make_irgl`: IRGL data for a prompt list, in the published format; goes on in its own folder."""

from pathlib import Path

from hydra.utils import get_class, instantiate
from rich.console import Console
from rich.table import Table

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt, read_prompts
from t2i_rl.core.ranks import own_gpu
from t2i_rl.methods.irg.data import world_prompts
from t2i_rl.methods.irg.make import Maker
from t2i_rl.tasks.part_checks import announce_model


def distinct(prompts: list[Prompt]) -> list[Prompt]:
    """Each text once, whatever its case."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.text.casefold(), prompt)
    return list(found.values())


def run(cfg) -> dict:
    """Write the six modes into `cfg.task.out`; returns the manifest."""
    task = cfg.task
    if Path(task.out).is_file():
        raise UserError(f"task.out={task.out} is a file: name a folder")
    prompts = distinct(read_prompts(cfg.prompts_file)) if cfg.prompts_file else world_prompts(task.count, cfg.seed)
    maker = Maker(
        instantiate(task.teacher), task.shard_size, cfg.evaluation.batch_size, task.right_share, task.words, task.ascii_share, cfg.seed
    )  # fmt: skip
    maker.teacher.check(prompts)
    maker.check(get_class(cfg.model._target_).image_size(cfg.model))
    announce_model(cfg, [prompt.text for prompt in prompts])
    model = instantiate(cfg.model).to(own_gpu())
    fits = model.interleaved().fits if model.family == "autoregressive" else None
    manifest = maker.make(Path(task.out), model, prompts, fits)
    table = Table("mode", "rows", title=f"IRGL data in {task.out}", title_justify="left")
    for mode, count in manifest["counts"].items():
        table.add_row(mode, str(count))
    console = Console()
    console.print(table)
    for why, count in manifest["left_out"].items():
        console.print(f"left out, {why}: {count}", soft_wrap=True)
    if not any(manifest["counts"].values()):
        raise UserError(f"no row of {task.out} is fit to be learnt: what was left out, and why, is above and in its manifest.json")  # fmt: skip
    console.print(f"method=irg data=irgl data.path={task.out} learns from it", soft_wrap=True)
    return manifest
