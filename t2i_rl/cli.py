"""The command line: help, composition, one-line errors, and the call of the task."""

import gc
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from t2i_rl.complaints import complain
from t2i_rl.complaints import one_line as one_line
from t2i_rl.errors import UserError
from t2i_rl.provenance import finish, is_main_process, record

PACKAGE = Path(__file__).parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())
REFUSALS = (UserError, HydraException, OmegaConfBaseException)
SIGTERM_EXIT_CODE = 143


def folder_name(text: str) -> str:
    """A sweep job's folder: its overrides, without slashes, and short enough for a file system."""
    name = str(text).replace("/", "-") or "job"
    return name if len(name) <= 160 else f"{name[:150]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def gpu_or_cpu() -> str:
    """The accelerator that a run takes when none is named."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def by_family(target: str, autoregressive, others):
    """What a setting is for the family of the model's class."""
    return autoregressive if _attribute(target, "family", "autoregressive") == "autoregressive" else others


def _attribute(target: str, name: str, otherwise):
    """A constant of a class; a class that cannot be found is complained about elsewhere."""
    from t2i_rl.checks import class_attribute

    try:
        return class_attribute(target, name)
    except (ImportError, AttributeError, StopIteration):
        return otherwise


def drawn_as(method: str, model: str) -> str:
    """How pictures are drawn where nothing else is said: in `turns` by a method that interleaves, else with a `plan` by a model that writes, else `direct`."""
    return "turns" if _attribute(method, "interleaves", False) else by_family(model, "plan", "direct")


def default_stages(method: str, model: str) -> list[str]:
    """The stages of a run that names none: the method's own, else before and after."""
    others = by_family(model, ["base_direct", "base_plan", "trained_plan"], ["base_direct", "trained_direct"])
    return list(_attribute(method, "stages", others))


def default_steps(method: str, model: str) -> int:
    """Optimizer steps of a run that names none."""
    return _attribute(method, "steps", by_family(model, 40, 200))


OmegaConf.register_new_resolver("default_steps", default_steps, replace=True)
OmegaConf.register_new_resolver("drawn_as", drawn_as, replace=True)
OmegaConf.register_new_resolver("default_stages", default_stages, replace=True)
OmegaConf.register_new_resolver("by_family", by_family, replace=True)
OmegaConf.register_new_resolver("smaller", lambda *numbers: min(numbers), replace=True)
OmegaConf.register_new_resolver("gpu_or_cpu", gpu_or_cpu, replace=True)
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).name, replace=True)
OmegaConf.register_new_resolver("package_dir", lambda name: str(PACKAGE / name), replace=True)

failures: list[str] = []
refusals: list[Exception] = []
command: list[str] = []
tracebacks = False


def main() -> None:
    """Entry point of `python run.py` and of the console command `t2i-rl`."""
    global command, tracebacks
    if {"--help", "-h"} & set(sys.argv[1:]):
        from t2i_rl.manual import manual

        print(manual(CONF))
        return
    command, tracebacks = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR") == "1"
    failures.clear()
    refusals.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not a line for each retry
    try:
        if "ckpt_path=last" in sys.argv:
            from t2i_rl.resume import continue_in_place

            sys.argv[1:] = continue_in_place(sys.argv[1:], CONF)
        sys.argv[1:] = name_jobs_by_what_differs([quoted(argument) for argument in sys.argv[1:]])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
        if refusals:
            raise refusals[0]
    except REFUSALS as error:
        if tracebacks:
            raise
        sys.exit(complain(error))
    finally:
        GlobalHydra.instance().clear()
        sys.argv[:] = command
        os.environ["HYDRA_FULL_ERROR"] = str(int(tracebacks))
    if failures:
        sys.exit(1)


def quoted(argument: str) -> str:
    """An override whose value is a path with `=` in it, as the folders of sweeps have, in the quotes that Hydra wants around it."""
    key, _, value = argument.partition("=")
    return f'{key}="{value}"' if "=" in value and Path(value).exists() else argument


def name_jobs_by_what_differs(arguments: list[str]) -> list[str]:
    """The arguments, options first, and what is the same in every job of a sweep kept out of the names of its folders.

    Overrides come last because Lightning appends some for the processes that it launches.
    """
    given = get_args_parser().parse_args(arguments).overrides
    overrides = OverridesParser.create().parse_overrides(given)
    same = [f"'{override.key_or_group}'" for override in overrides if not override.is_sweep_override()]
    excluded = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]"
    return [*(item for item in arguments if item not in [*given, "--"]), "--", *given, excluded]


def job(cfg: DictConfig) -> float | None:
    """One job: check, seed, run the task, leave nothing behind. Returns the value that a sweeper optimises."""
    hydra_config = HydraConfig.get()
    out = Path(hydra_config.runtime.output_dir)
    started, status = None, "failed"
    with _nothing_left_behind(), _as_single_run(hydra_config, out):
        try:
            started = record(cfg, out, command, list(hydra_config.overrides.task))
            result = _run(cfg, hydra_config, out)
            status = "finished"
            return result
        except SystemExit:
            status = "stopped"
            raise
        except Exception as error:
            _take_note(error, hydra_config, out)
            return None
        finally:
            finish(out, started, status)


def _take_note(error: Exception, hydra_config: DictConfig, out: Path) -> None:
    """A refused run ends in one line; a job of a plain sweep does not take the others with it; the rest is raised."""
    refused = isinstance(error, REFUSALS) and not tracebacks
    if hydra_config.mode == RunMode.RUN and refused:
        refusals.append(error)
        return
    if hydra_config.mode == RunMode.RUN or not hydra_config.sweeper._target_.endswith("BasicSweeper"):
        raise error
    if refused:
        complain(error)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    failures.append(out.name)


def _run(cfg: DictConfig, hydra_config: DictConfig, out: Path) -> float | None:
    from t2i_rl.checks import check

    check(cfg)
    if cfg.ckpt_path == "last":
        cfg.ckpt_path = str(out / "checkpoints" / "last.ckpt")
    _announce(hydra_config, cfg, out)

    import lightning as L
    from hydra.utils import get_method
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

    _quiet()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    try:
        results = get_method(cfg.task._target_)(cfg)
    except SIGTERMException as stop:
        raise SystemExit(SIGTERM_EXIT_CODE if is_main_process() else 0) from stop
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error
    return optimized(results, cfg.optimized_metric)


def optimized(results: dict, name: str | None) -> float | None:
    """What a sweeper optimises: a metric of the stage that the headline is about, else of the last one."""
    if not results.get("stages") or name is None:
        return None
    about = results.get("headline") or {}
    stage = results["stages"][about.get("b") or list(results["stages"])[-1]]["metrics"]
    if name == "headline":
        name = about.get("metric", "overall")
    if name not in stage:
        raise UserError(f"optimized_metric={name} was not measured; choose from {', '.join(stage)}")
    return stage[name]["mean"]


@contextmanager
def _as_single_run(hydra_config: DictConfig, out: Path) -> Iterator[None]:
    """A sweep's job looks like a single run, so that the processes which DDP launches repeat this job and not the sweep."""
    if hydra_config.mode == RunMode.RUN:
        yield
        return
    given = get_args_parser().parse_args(command[1:])
    options = [["--config-dir", given.config_dir], ["--config-name", given.config_name]]
    searchpath = [override for override in hydra_config.overrides.hydra if override.startswith("hydra.searchpath=")]
    with flag_override(hydra_config, ["readonly", "struct"], False):
        hydra_config.run.dir = str(out)
    before = list(sys.argv)
    sys.argv[1:] = [part for option in options if option[1] for part in option]
    sys.argv += [*hydra_config.overrides.task, *searchpath, "hydra.mode=RUN"]
    try:
        yield
    finally:
        sys.argv[:] = before


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """The next job of a sweep starts as the first one did (it seeds every generator itself)."""
    import torch

    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    os.environ["HYDRA_FULL_ERROR"] = str(int(tracebacks))  # for the processes that DDP launches
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
        groups = ("task", "method", "model", "reward", "benchmark", "trainer")
        names = " ".join(f"{group}={chosen[group]}" for group in (groups[:1] if cfg.latents else groups))
        print(f"{names} seed={cfg.seed}\n-> {out}", flush=True)


def _quiet() -> None:
    """Hold back the notices of libraries that every run would print and nobody can act on."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for noise in (".*isinstance\\(treespec.*", ".*predict returned None.*", ".*does not have many workers.*", ".*in eval mode at the start.*", ".*Experiment logs directory.*",
                  ".*overridden `transfer_batch_to_device`.*", ".*IterableDataset.*__len__.*", ".*find_unused_parameters.*", ".*local_dir_use_symlinks.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message=noise)
