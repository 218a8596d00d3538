"""Which process this is, and which GPU is its own, under every launcher or none.

Launchers are torchrun, srun, Lightning's own, and somebody's hand.
"""

import os
from collections.abc import Sequence
from typing import Literal

LAUNCHED_BY = "T2I_RL_LAUNCHED_BY"  # the process that started the ranks of its machine
INTERACTIVE = ("bash", "interactive")  # names of Slurm jobs in which Lightning starts its own processes
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"),
)


def launcher() -> Literal["torchrun", "srun", "lightning", "hand", "none"]:
    """Who started this process beside others of its run.

    `none`: it is alone, or starts the others itself. Lightning's own launcher hands on LAUNCHED_BY,
    which the process that starts the others has set. Whoever starts ranks by hand says so in the
    variables that Lightning reads.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun" if _number("WORLD_SIZE") > 1 else "none"
    if _srun_tasks() > 1:
        return "srun"
    if _number("LOCAL_RANK") > 0 and LAUNCHED_BY in os.environ:
        return "lightning"
    by_hand = _number("WORLD_SIZE") > 1 or any(map(_number, ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")))
    return "hand" if by_hand else "none"


def inherits_a_number() -> bool:
    """Whether a process that is alone has a task's number from Slurm: Lightning would go by it."""
    return launcher() == "none" and (_number("SLURM_PROCID") > 0 or _number("SLURM_NTASKS") > 1)


def stand_alone() -> None:
    """Forget that a launcher started others beside this process: each is a run of its own."""
    for name in list(os.environ):
        if name in RANK_VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def global_rank() -> int:
    """This process's number among those of the run.

    RANK is torchrun's. SLURM_PROCID counts only where srun started several tasks: a single process
    inside an allocation or an array inherits it. Lightning's own launcher numbers processes in
    LOCAL_RANK, and nodes in NODE_RANK.
    """
    if "RANK" in os.environ:
        return _number("RANK")
    if "LOCAL_RANK" not in os.environ and _srun_tasks() > 1:
        return _number("SLURM_PROCID")
    node = _number("NODE_RANK") or _number("GROUP_RANK")
    return node * (_number("LOCAL_WORLD_SIZE") or 1 << 16) + _number("LOCAL_RANK")


def local_rank() -> int:
    """This process's number among those of its machine."""
    if os.environ.get("LOCAL_RANK"):
        return _number("LOCAL_RANK")
    return _number("SLURM_LOCALID") if _srun_tasks() > 1 else 0


def world_size() -> int:
    """How many processes torchrun, srun or somebody's hand has started for this run."""
    return _number("WORLD_SIZE") or _srun_tasks()


def is_main_process() -> bool:
    """Whether this process writes the run's records."""
    return global_rank() == 0


def own_gpu() -> str:
    """The GPU of this process; the CPU where there is none, or where `use` was told so.

    Where `use` was told a list of GPUs, the process takes its own place in the list.
    """
    import torch

    if _trainer["accelerator"] == "cpu" or not torch.cuda.is_available():
        return "cpu"
    gpus = listed_gpus(_trainer["devices"]) or range(torch.cuda.device_count())
    return f"cuda:{gpus[local_rank() % len(gpus)]}"  # srun --gpus-per-task=1: each task sees one GPU, which is number 0


def use(accelerator: str | None, devices: int | str | Sequence[int] | None) -> None:
    """Tell `own_gpu` of the trainer's settings, for all that loads before there is a trainer."""
    _trainer.update(accelerator=accelerator, devices=devices)


def listed_gpus(devices: int | str | Sequence[int] | None) -> list[int]:
    """The GPUs that `trainer.devices` lists ([1, 3], "1,3" or "1,"); none for a number."""
    if devices is None or isinstance(devices, int):
        return []
    if isinstance(devices, str):
        return [int(number) for number in devices.strip("[]").split(",") if number.strip()] if "," in devices else []
    return [int(number) for number in devices]


_trainer: dict = {"accelerator": None, "devices": None}


def _srun_tasks() -> int:
    """How many tasks srun started; 1 where it started this process alone, or did not start it.

    A batch script's own process has the allocation's SLURM_NTASKS without being one of so many: it
    belongs to no step.
    """
    in_batch_script = os.environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in os.environ
    if "SLURM_PROCID" not in os.environ or in_batch_script or os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return 1
    return _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1


def _number(name: str) -> int:
    return int(os.environ.get(name) or 0)
