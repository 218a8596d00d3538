"""The command line: help, composition, one-line errors, and the call of the task."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from t2i_rl.command.class_attributes import class_attribute
from t2i_rl.command.folder_names import folder_name
from t2i_rl.command.messages import complain
from t2i_rl.command.messages import one_line as one_line
from t2i_rl.command.overrides import readable, split
from t2i_rl.command.provenance import finish, record
from t2i_rl.command.rank_watch import RankWatch, ranks_end_together
from t2i_rl.command.start import main as main
from t2i_rl.command.sweep import Launch, conclude, read_launch
from t2i_rl.command.torchvision_fit import check_torchvision
from t2i_rl.command.troubles import as_one_line, folder_trouble
from t2i_rl.core import precision, stopping
from t2i_rl.core.encoder_texts import forget_announcements
from t2i_rl.core.errors import UserError
from t2i_rl.core.folders import claim, claimed_outputs, give_back, run_id
from t2i_rl.core.places import CONF, PACKAGE
from t2i_rl.core.ranks import is_main_process, use

REFUSALS = (UserError, HydraException, OmegaConfBaseException)


def gpu_or_cpu() -> str:
    """The accelerator that a run takes when none is named."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def by_family(target: str, autoregressive, others):
    """What a setting is for the family of the model's class."""
    return autoregressive if _attribute(target, "family", "autoregressive") == "autoregressive" else others


def of_variant(variant: str, choices: Mapping):
    """What a setting is under the run's `variant`, which the config says for those that it knows.

    Raises:
        UserError: a variant that this setting has no value for.
    """
    if variant not in choices:
        raise UserError(f"variant must be one of {', '.join(choices)} with this method and reward, not {variant!r}")
    return choices[variant]


def _attribute(target: str, name: str, otherwise):
    """A constant of a class; a class that cannot be found is complained about elsewhere."""
    try:
        return class_attribute(target, name)
    except (ImportError, AttributeError, SyntaxError):
        return otherwise


def drawn_as(method: str, model: str) -> str:
    """How pictures are drawn where nothing else is said: in `turns` by a method that interleaves, else with a `plan` by a model that writes, else `direct`."""
    return "turns" if _attribute(method, "draws_in_turns", False) else by_family(model, "plan", "direct")


def default_stages(method: str, model: str) -> ListConfig:
    """The stages of a run that names none: the method's own, else before and after."""
    others = by_family(model, ["base_direct", "base_plan", "trained_plan"], ["base_direct", "trained_direct"])
    return ListConfig(list(_attribute(method, "stages", others)))  # a plain list stops `--cfg job --resolve`


def default_steps(method: str, model: str) -> int:
    """Optimizer steps of a run that names none."""
    return _attribute(method, "steps", by_family(model, 40, 200))


def preset(key: str, *, _root_, _parent_):
    """One setting, as `agsm.temperature`, of the variant that the method's node names, for the kind of the model."""
    from t2i_rl.methods.pairs.presets import preset

    method, name = key.split(".")
    return preset(method, _parent_.variant, _attribute(_root_.model._target_, "kind", ""))[name]


OmegaConf.register_new_resolver("preset", preset, replace=True)
OmegaConf.register_new_resolver("default_steps", default_steps, replace=True)
OmegaConf.register_new_resolver("drawn_as", drawn_as, replace=True)
OmegaConf.register_new_resolver("default_stages", default_stages, replace=True)
OmegaConf.register_new_resolver("by_family", by_family, replace=True)
OmegaConf.register_new_resolver("of_variant", of_variant, replace=True)
OmegaConf.register_new_resolver("smaller", lambda *numbers: min(numbers), replace=True)
OmegaConf.register_new_resolver("gpu_or_cpu", gpu_or_cpu, replace=True)
OmegaConf.register_new_resolver("auto_precision", precision.auto_precision, replace=True)
OmegaConf.register_new_resolver("auto_dtype", precision.auto_dtype, replace=True)
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("run_id", run_id, replace=True, use_cache=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).name, replace=True)
OmegaConf.register_new_resolver("package_dir", lambda name: str(PACKAGE / name), replace=True)

failures: list[str] = []
refusals: list[Exception] = []
command: list[str] = []
tracebacks = False


@stopping.ends_in_words
def run_command() -> None:
    """Compose what the command line asks for and run it: one job, or those of a sweep.

    Raises:
        SystemExit: something was refused (2, after one line), or a job of a sweep failed (1).
    """
    global command, tracebacks
    command, tracebacks = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR") == "1"
    failures.clear()
    refusals.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not a line for each retry
    try:
        sys.argv[1:] = readable(sys.argv[1:], CONF)
        if "ckpt_path=last" in sys.argv:
            from t2i_rl.command.resume import continue_in_place

            sys.argv[1:] = continue_in_place(sys.argv[1:], CONF)
        if any(argument.startswith("ckpt_path=") for argument in sys.argv):
            from t2i_rl.command.checkpoint_choice import with_choices_of_checkpoint

            sys.argv[1:] = with_choices_of_checkpoint(sys.argv[1:])
        sys.argv[1:] = name_jobs_by_what_differs(sys.argv[1:])
        check_torchvision()
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
        if refusals:
            raise refusals[0]
    except REFUSALS as error:
        if tracebacks:
            raise
        sys.exit(complain(error))
    except BrokenPipeError as error:
        if _of_a_job(error):
            sys.exit("error: the run was stopped, since nobody reads what it prints: send its output to a file")
        raise
    except Exception as error:  # of any kind, since a command can be wrong in ways that Hydra does not foresee
        if tracebacks or _of_a_job(error):
            raise
        sys.exit(complain(error))
    finally:
        GlobalHydra.instance().clear()
        sys.argv[:] = command
        os.environ["HYDRA_FULL_ERROR"] = str(int(tracebacks))
    if failures:
        sys.exit(1)


def _of_a_job(error: Exception) -> bool:
    """Whether a job had begun, whose traceback shows a bug; before that nothing but command and configs is read."""
    return any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def name_jobs_by_what_differs(arguments: list[str]) -> list[str]:
    """The arguments, options first, and what is the same in every job of a sweep kept out of the names of its folders.

    Overrides come last because Lightning appends some for the processes that it launches.
    """
    options, given = split(arguments)
    overrides = OverridesParser.create().parse_overrides(given)
    same = [f"'{override.key_or_group}'" for override in overrides if not override.is_sweep_override()]
    excluded = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]"
    return [*options, "--", *given, excluded]


def job(cfg: DictConfig) -> float | None:
    """One job: check, seed, run the task, leave nothing behind. Returns the value that a sweeper optimises."""
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
        conclude(Path(hydra_config.sweep.dir))
        raise


def _launch(hydra_config: DictConfig) -> Launch:
    """The sweep that this is a job of, whichever process runs it; else this command by itself."""
    if hydra_config.mode == RunMode.MULTIRUN:
        return read_launch(Path(hydra_config.sweep.dir))
    return Launch(None, list(command), tracebacks, [])


def _job(cfg: DictConfig, hydra_config: DictConfig, out: Path, launch: Launch) -> float | None:
    started, status, line = None, "failed", None
    forget_announcements()
    with _nothing_left_behind(launch), _as_single_run(hydra_config, out, launch), stopping.listening():
        try:
            started = record(cfg, _claimed(out), launch.command, list(hydra_config.overrides.task), launch.id)
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
            _take_note(error, hydra_config, out, launch)
            return None
        finally:
            finish(out, started, status, line)
            give_back(out)


def _claimed(out: Path) -> Path:
    """A job's folder, locked; a single run has had its own since before Hydra wrote into it."""
    if is_main_process():
        claim(out, "hydra.sweep.dir")
    return out


def _take_note(error: Exception, hydra_config: DictConfig, out: Path, launch: Launch) -> None:
    """A refused run ends in one line; a job of a plain sweep does not take the others with it; the rest is raised."""
    refused = isinstance(error, REFUSALS) and not launch.tracebacks
    if hydra_config.mode == RunMode.RUN and refused:
        refusals.append(error)
        return
    if hydra_config.mode == RunMode.RUN or not hydra_config.sweeper._target_.endswith("BasicSweeper"):
        raise error
    if refused:
        complain(error)
    else:
        sys.excepthook(type(error), error, error.__traceback__)


def _run(cfg: DictConfig, hydra_config: DictConfig, out: Path, ranks: RankWatch) -> float | None:
    from t2i_rl.command.checks import check
    from t2i_rl.evaluation.optimized import optimized

    if cfg.ckpt_path == "last":
        from t2i_rl.core.checkpoints import newest_whole

        cfg.ckpt_path = str(newest_whole(out / "checkpoints"))
    check(cfg)
    use(cfg.trainer.get("accelerator"), cfg.trainer.get("devices"))
    _announce(hydra_config, cfg, out)

    import lightning as L
    from hydra.utils import get_method
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

    _quiet()
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
    """A sweep's job looks like a single run, so that the processes which DDP launches repeat this job and not the sweep."""
    if hydra_config.mode == RunMode.RUN:
        yield
        return
    given = get_args_parser().parse_args(split(launch.command[1:])[0])  # options may stand among settings
    options = [["--config-dir", given.config_dir], ["--config-name", given.config_name]]
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
    os.environ["HYDRA_FULL_ERROR"] = str(int(launch.tracebacks))  # for the processes that DDP launches
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
        print(f"{names} seed={cfg.seed}\n-> {out}", *precision.precision_lines(cfg), sep="\n", flush=True)


def _quiet() -> None:
    """Hold back the notices of libraries that every run would print and nobody can act on."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for noise in (".*isinstance\\(treespec.*", ".*predict returned None.*", ".*does not have many workers.*", ".*in eval mode at the start.*", ".*Experiment logs directory.*",
                  ".*overridden `transfer_batch_to_device`.*", ".*IterableDataset.*__len__.*", ".*find_unused_parameters.*", ".*local_dir_use_symlinks.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message=noise)
