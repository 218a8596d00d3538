"""The command line: help, composition, one-line errors, and the call of the task."""

import gc
import os
import random
import sys
from difflib import get_close_matches
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from t2i_rl.errors import UserError
from t2i_rl.provenance import finish, is_main_process, record

PACKAGE = Path(__file__).parent
CONF = next(folder for folder in (PACKAGE.parent / "conf", PACKAGE / "conf") if (folder / "config.yaml").is_file())

OmegaConf.register_new_resolver("slashless", lambda text: str(text).replace("/", "-") or "job", replace=True)
OmegaConf.register_new_resolver("package_dir", lambda name: str(PACKAGE / name), replace=True)

failures: list[str] = []


def main() -> None:
    """Entry point of `python run.py` and of the console command `t2i-rl`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        from t2i_rl.manual import manual

        print(manual(CONF))
        return
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        if "ckpt_path=last" in sys.argv:
            from t2i_rl.resume import continue_in_place

            sys.argv[1:] = continue_in_place(sys.argv[1:], CONF)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        sys.exit(complain(error))
    finally:
        GlobalHydra.instance().clear()
    if failures:
        sys.exit(1)


def job(cfg: DictConfig) -> float | None:
    """One job: check, seed, run the task, leave nothing behind. Returns the value that a sweeper optimises."""
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    out = Path(hydra_config.runtime.output_dir)
    if multirun:
        _as_single_run(hydra_config, out)
    started = record(cfg, out)
    status = "failed"
    try:
        from t2i_rl.checks import check

        check(cfg)
        if cfg.ckpt_path == "last":
            cfg.ckpt_path = str(out / "checkpoints" / "last.ckpt")
        _announce(hydra_config, cfg, out)
        result = _run(cfg)
        status = "finished"
        return result
    except Exception as error:
        if not multirun or not isinstance(error, UserError):
            if not multirun:
                raise
            import traceback

            traceback.print_exc()
        else:
            complain(error)
        failures.append(out.name)
        if not hydra_config.sweeper._target_.endswith("BasicSweeper"):
            raise
        return None
    finally:
        finish(out, started, status)
        _leave_nothing_behind()


def _run(cfg: DictConfig) -> float | None:
    import lightning as L
    import torch
    from hydra.utils import get_method

    _quiet()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    threads = torch.get_num_threads()
    try:
        results = get_method(cfg.task._target_)(cfg)
    finally:
        torch.set_num_threads(threads)
    if "stages" not in results or cfg.optimized_metric is None:
        return None
    stage = list(results["stages"].values())[-1]["metrics"]
    if cfg.optimized_metric not in stage:
        raise UserError(f"optimized_metric={cfg.optimized_metric} was not measured; choose from {', '.join(stage)}")
    return stage[cfg.optimized_metric]["mean"]


def _as_single_run(hydra_config: DictConfig, out: Path) -> None:
    """Let this job look like a single run, so that processes which DDP launches repeat this job and not the whole sweep."""
    with open_dict(hydra_config):
        hydra_config.run.dir = str(out)
    sys.argv[1:] = list(hydra_config.overrides.task)


def _announce(hydra_config: DictConfig, cfg: DictConfig, out: Path) -> None:
    if is_main_process():
        chosen = hydra_config.runtime.choices
        names = " ".join(
            f"{group}={chosen[group]}" for group in ("task", "method", "model", "reward", "benchmark", "trainer")
        )
        print(f"{names} seed={cfg.seed}\n-> {out}", flush=True)


def _quiet() -> None:
    """Hold back the notices of libraries that every run would print and nobody can act on."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for noise in (".*isinstance\\(treespec.*", ".*does not have many workers.*", ".*in eval mode at the start.*", ".*Experiment logs directory.*",
                  ".*overridden `transfer_batch_to_device`.*", ".*IterableDataset.*__len__.*", ".*find_unused_parameters.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message=noise)


def _leave_nothing_behind() -> None:
    """The next job of a sweep starts as the first one did."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    random.seed(0)
    gc.collect()


def complain(error: Exception) -> int:
    """Print an error as one line on stderr; returns the exit code 2."""
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2


def one_line(error: Exception) -> str:
    """The message on one line; an unknown key or choice is followed by those that come close."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(
        line for line in lines if not line.startswith(("full_key:", "object_type=", "Check available", "Set the env"))
    )
    missing = next((line for line in lines if line.startswith("Key '")), None)
    if missing and "is not in struct" in missing and lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
        near = get_close_matches(key, known_keys(), n=3, cutoff=0.5)
        return f"there is no setting {key}" + (
            f"; did you mean {' or '.join(near)}?" if near else f" (to add it: +{key}=...)"
        )
    return text.replace(" Available options in", "; available options in")


def known_keys() -> list[str]:
    """Dotted names of all settings of the default composition."""
    from hydra import compose, initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config"), resolve=False)

    def walk(node: dict, prefix: str = ""):
        for key, value in node.items():
            yield prefix + str(key)
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return list(walk(config))
