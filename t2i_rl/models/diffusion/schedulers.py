"""Which noise a checkpoint was trained under, by its config files, and what nothing here trains.

A scheduler of diffusers turns into any other by `from_config`, which keeps the keys that both know
and drops the rest without a word; so a scheduler of another process would draw and train, and both
wrongly.
"""

from collections.abc import Mapping
from typing import Any

from t2i_rl.core.errors import UserError
from t2i_rl.models.diffusion.pipelines import INDEX, read_config

STEPS = 1000  # of the training process; times count from 0 to it everywhere here
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
TARGETS = ("epsilon", "v_prediction", "sample")
SAMPLERS = (
    *("DDIM", "DDPM", "PNDM", "LCM", "TCD", "LMSDiscrete", "DEISMultistep", "UniPCMultistep"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
)
VARIANCE_PRESERVING = frozenset(f"{name}Scheduler" for name in SAMPLERS)
FLOW = frozenset({"FlowMatchEulerDiscreteScheduler"})
TRIGFLOW = frozenset({"SCMScheduler"})


def read_scheduler(path: str, revision: str | None = None) -> dict:
    """A checkpoint's scheduler config, with the classes that are named for it under `kinds`.

    These are the one that its own file names, and the one that the index of the pipeline names,
    which is the one that loads.

    Raises:
        UserError: it can be neither found nor downloaded; the line names what to do.
    """
    config = read_config(path, "scheduler", revision, "scheduler_config.json")
    _, indexed = read_config(path, None, revision, INDEX).get("scheduler") or (None, None)
    return config | {"kinds": sorted({kind for kind in (config.get("_class_name"), indexed) if kind})}


def check_diffusion(path: str, config: Mapping, drawn_by: str) -> None:
    """Whether a UNet's scheduler is of the variance-preserving process with whole times.

    Args:
        drawn_by: `model.scheduler`, `ddim` or the checkpoint's `own`.

    Raises:
        UserError: it is of another process, or predicts what nothing here trains towards.
    """
    file = _file(path)
    _check_kind(path, config, VARIANCE_PRESERVING, "a UNet that is trained by DDPM's process")
    target = config.get("prediction_type", "epsilon")
    if target not in TARGETS:
        raise UserError(f"{file}: prediction_type={target!r}, and a UNet is trained here to {', '.join(TARGETS)}")
    if config.get("use_flow_sigmas"):
        raise UserError(f"{file}: use_flow_sigmas is flow matching, and a UNet is trained here by DDPM's process")
    if config.get("timestep_type", "discrete") != "discrete" or config.get("sigma_data") is not None:
        raise UserError(f"{file}: its times are EDM's logarithms of sigma, and models here count from 0 to {STEPS}")
    if config.get("trained_betas") is None and config.get("beta_schedule", "linear") not in BETAS:
        raise UserError(f"{file}: beta_schedule={config['beta_schedule']!r} is none of {', '.join(BETAS)}")
    if str(config.get("variance_type", "")).startswith("learned"):
        raise UserError(
            f"{file}: variance_type={config['variance_type']!r} doubles the UNet's output, which is not read"
        )
    if config.get("rescale_betas_zero_snr") and target == "epsilon":
        raise UserError(
            f"{file}: rescale_betas_zero_snr ends in pure noise, out of which a prediction of the noise tells "
            "nothing: such a checkpoint has prediction_type v_prediction; correct the file"
        )
    if drawn_by == "own" and target == "sample" and any("Ancestral" in kind for kind in config["kinds"]):
        raise UserError(
            f"{file}: an ancestral sampler cannot draw with prediction_type=sample; take model.scheduler=ddim"
        )


def check_flow(path: str, config: Mapping) -> None:
    """Whether a transformer's scheduler is flow matching's, from sigma 1 to 0.

    Raises:
        UserError: it is not, or adds noise on the way.
    """
    file = _file(path)
    _check_kind(path, config, FLOW, "a transformer that is trained by flow matching")
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise UserError(
            f"{file}: prediction_type={config['prediction_type']!r}, and flow matching predicts the velocity"
        )
    for name, why in (
        ("invert_sigmas", "its times run from noise at 0, and models here have it at 1000"),
        ("stochastic_sampling", "each step adds noise that no seed of a picture decides"),
    ):
        if config.get(name):
            raise UserError(f"{file}: {name}: {why}")


def check_trigflow(path: str, config: Mapping) -> None:
    """Whether a scheduler is SANA-Sprint's.

    Raises:
        UserError: it is not.
    """
    file = _file(path)
    _check_kind(path, config, TRIGFLOW, "SANA-Sprint")
    if config.get("prediction_type", "trigflow") != "trigflow":
        raise UserError(f"{file}: prediction_type={config['prediction_type']!r}, and SANA-Sprint predicts by TrigFlow")


def ddim(scheduler: Any) -> Any:
    """A DDIM sampler over the process of another scheduler.

    Where that one knows no clipping there is none: DDIM's own default cuts at 1, which is meant for
    pixels, and latents go beyond.
    """
    from diffusers import DDIMScheduler

    clipping = {} if "clip_sample" in scheduler.config else {"clip_sample": False}
    return DDIMScheduler.from_config(scheduler.config, **clipping)


def _check_kind(path: str, config: Mapping, kinds: frozenset[str], model: str) -> None:
    foreign = sorted(set(config["kinds"]) - kinds)
    if foreign:
        raise UserError(f"{_file(path)}: {foreign[0]} is no scheduler of {model} ({', '.join(sorted(kinds))})")
    steps = config.get("num_train_timesteps", STEPS)
    if steps != STEPS:
        raise UserError(f"{_file(path)}: num_train_timesteps={steps}, and times here count to {STEPS}")


def _file(path: str) -> str:
    return f"{path}: scheduler/scheduler_config.json"
