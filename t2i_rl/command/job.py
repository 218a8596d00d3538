"""One job: check, seed, run the task, leave nothing behind."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, flag_override

from t2i_rl.command.checks import check_classes, check_config
from t2i_rl.command.messages import complain, one_line
from t2i_rl.command.overrides import split
from t2i_rl.command.provenance import finish, record, write_config
from t2i_rl.command.rank_watch import RankWatch, ranks_end_together
from t2i_rl.command.session import REFUSALS, session
from t2i_rl.command.sweep import Launch, conclude, optimized, read_launch
from t2i_rl.command.troubles import as_one_line, folder_trouble
from t2i_rl.core import stopping
from t2i_rl.core.checkpoints import newest_whole
from t2i_rl.core.errors import UserError
from t2i_rl.core.folders import claim, claimed_outputs, give_back
from t2i_rl.core.precision import precision_lines
from t2i_rl.core.ranks import is_main_process, use
from t2i_rl.core.readers import forget_announcements

ANNOUNCED = ("task", "method", "model", "reward", "benchmark", "trainer")
NOTICES = (  # of libraries: every run would print them, and nobody can act on them
    *("isinstance\\(treespec", "predict returned None", "does not have many workers", "in eval mode at the start"),
    *("Experiment logs directory", "overridden `transfer_batch_to_device`", "IterableDataset.*__len__"),
    *("find_unused_parameters", "local_dir_use_symlinks"),
)


def job(cfg: DictConfig) -> float | None:
    """Run one job; returns the value that a sweeper optimises."""
    hydra_config = HydraConfig.get()
    out, launch = Path(hydra_config.runtime.output_dir), _launch(hydra_config)
    if hydra_config.mode == RunMode.MULTIRUN and stopping.asked() is not None:
        return None  # in a worker of a launcher, after a job that was stopped
    try:
        return _job(cfg, hydra_config, out, launch)
    except SystemExit:
        if hydra_config.mode == RunMode.RUN:
            raise
        if not hydra_config.launcher._target_.endswith(".BasicLauncher"):
            return None  # the job's record says that it was stopped, and whoever started the sweep reads that
        if tables := OmegaConf.select(hydra_config, "callbacks.sweep_table.tables"):
            conclude(Path(hydra_config.sweep.dir), tables)
        raise


def _launch(hydra_config: DictConfig) -> Launch:
    """The sweep that this is a job of, whichever process runs it; else this command by itself."""
    if hydra_config.mode == RunMode.MULTIRUN:
        return read_launch(Path(hydra_config.sweep.dir))
    return Launch(None, list(session.command), session.tracebacks, [])


def _job(cfg: DictConfig, hydra_config: DictConfig, out: Path, launch: Launch) -> float | None:
    started, status, line = None, "failed", None
    forget_announcements()
    with ExitStack() as surroundings:
        try:
            surroundings.enter_context(stopping.listening())
            started = record(_claimed(out), launch.command, list(hydra_config.overrides.task), launch.id)
            check_config(cfg)
            write_config(cfg, out)
            # From here on libraries are imported, which take seconds: what is refused above is refused at once.
            for surrounding in (_nothing_left_behind(launch), _as_single_run(hydra_config, out, launch)):
                surroundings.enter_context(surrounding)
            with ranks_end_together(out) as ranks:
                result = _run(cfg, hydra_config, out, ranks)
            status = "finished"
            return result
        except SystemExit as stop:
            status, line = "stopped", stopping.name() if stop.code in stopping.EXIT_CODES else None
            if line:
                stopping.say(stopping.how_to_go_on(cfg, out))
            raise
        except Exception as raised:
            trouble = folder_trouble(raised, out) if isinstance(raised, OSError) else None  # before the task began
            error = UserError(trouble) if trouble else raised
            line = one_line(error) if isinstance(error, REFUSALS) else f"{type(error).__name__}: {error}"
            _take_note(error, hydra_config, launch)
            return None
        finally:
            finish(out, started, status, line)
            give_back(out)


def _claimed(out: Path) -> Path:
    """A job's folder, locked; a single run has had its own since before Hydra wrote into it."""
    if is_main_process():
        claim(out, "hydra.sweep.dir")
    return out


def _take_note(error: Exception, hydra_config: DictConfig, launch: Launch) -> None:
    """A refused run ends in one line; a job of a plain sweep does not take the others with it; the rest is raised."""
    refused = isinstance(error, REFUSALS) and not launch.tracebacks
    if hydra_config.mode == RunMode.RUN and refused:
        session.refusals.append(error)
        return
    if hydra_config.mode == RunMode.RUN or not hydra_config.sweeper._target_.endswith("BasicSweeper"):
        raise error
    if refused:
        complain(error)
    else:
        sys.excepthook(type(error), error, error.__traceback__)


def _run(cfg: DictConfig, hydra_config: DictConfig, out: Path, ranks: RankWatch) -> float | None:
    if cfg.ckpt_path == "last":
        cfg.ckpt_path = str(newest_whole(out / "checkpoints"))
    as_written = cfg.copy()
    OmegaConf.resolve(cfg)  # once: from here on every setting is a value
    check_classes(cfg)
    use(cfg.trainer.get("accelerator"), cfg.trainer.get("devices"))
    _announce(hydra_config, as_written, out)

    import lightning as L
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

    _hold_back_notices()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    try:
        with claimed_outputs(cfg):
            results = get_method(cfg.task._target_)(cfg)
    except SIGTERMException as stop:
        raise SystemExit(stopping.exit_code() if is_main_process() else 0) from stop
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error
    except Exception as error:  # of whatever kind: what comes from the machine, or another rank, is said in one line
        line = as_one_line(error, cfg, out, ranks)
        if line is None:
            raise
        raise UserError(line) from error
    return optimized(results, cfg.optimized_metric)


@contextmanager
def _as_single_run(hydra_config: DictConfig, out: Path, launch: Launch) -> Iterator[None]:
    """A sweep's job looks like a single run: the processes which DDP launches repeat this job and not the sweep."""
    if hydra_config.mode == RunMode.RUN:
        yield
        return
    parsed = get_args_parser().parse_args(split(launch.command[1:])[0])  # options may stand among settings
    options = [["--config-dir", parsed.config_dir], ["--config-name", parsed.config_name]]
    searchpath = [override for override in hydra_config.overrides.hydra if override.startswith("hydra.searchpath=")]
    with flag_override(hydra_config, ["readonly", "struct"], False):
        hydra_config.run.dir = str(out)
    program, before = sys.modules["__main__"], list(sys.argv)
    specification = program.__spec__
    program.__spec__ = None  # in a launcher's worker it would name the launcher's module
    sys.argv[:] = [launch.command[0], *(part for option in options if option[1] for part in option)]
    sys.argv += [*hydra_config.overrides.task, *searchpath, "hydra.mode=RUN"]
    try:
        yield
    finally:
        program.__spec__ = specification
        sys.argv[:] = before


@contextmanager
def _nothing_left_behind(launch: Launch) -> Iterator[None]:
    """The next job of a sweep starts as the first one did (it seeds every generator itself)."""
    import torch

    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    os.environ["HYDRA_FULL_ERROR"] = str(int(launch.tracebacks))  # as the user has it, see cli.run_command
    try:
        yield
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)  # LOCAL_RANK, left behind by DDP, would keep the next job from launching its own
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _announce(hydra_config: DictConfig, cfg: DictConfig, out: Path) -> None:
    if is_main_process():
        chosen = hydra_config.runtime.choices
        names = " ".join(f"{group}={chosen[group]}" for group in (ANNOUNCED[:1] if cfg.latents else ANNOUNCED))
        print(f"{names} seed={cfg.seed}\n-> {out}", *precision_lines(cfg), sep="\n", flush=True)


def _hold_back_notices() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=f".*{notice}")
