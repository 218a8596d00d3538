"""`task=make_irgl`: IRGL data for a prompt list, in the published format; goes on in its own folder."""

from pathlib import Path

from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt, read_prompts
from t2i_rl.core.ranks import own_gpu
from t2i_rl.methods.irg.data import world_prompts
from t2i_rl.methods.irg.make import Maker
from t2i_rl.tasks.examine import announce_model, image_size


def distinct(prompts: list[Prompt]) -> list[Prompt]:
    """Each text once, whatever its case."""
    by_text: dict[str, Prompt] = {}
    for prompt in prompts:
        by_text.setdefault(prompt.text.casefold(), prompt)
    return list(by_text.values())


def check(cfg) -> None:
    """Refuse a folder that is none.

    Raises:
        UserError: there is a file of its name.
    """
    if Path(cfg.task.out).is_file():
        raise UserError(f"task.out={cfg.task.out} is a file: name a folder")


def run(cfg) -> dict:
    """Write the six modes into `cfg.task.out`; returns the manifest.

    Raises:
        UserError: the teacher cannot teach these prompts, or no row is fit to be learnt.
    """
    task = cfg.task
    prompts = distinct(read_prompts(cfg.prompts_file)) if cfg.prompts_file else world_prompts(task.count, cfg.seed)
    maker = Maker(
        instantiate(task.teacher),
        shard_size=task.shard_size,
        batch_size=cfg.evaluation.batch_size,
        right_share=task.right_share,
        words=task.words,
        ascii_share=task.ascii_share,
        seed=cfg.seed,
    )
    maker.teacher.check(prompts)
    maker.check(image_size(cfg))
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
        raise UserError(
            f"no row of {task.out} is fit to be learnt: what was left out, and why, is above and in its manifest.json"
        )
    console.print(f"method=irg data=irgl data.path={task.out} learns from it", soft_wrap=True)
    return manifest
