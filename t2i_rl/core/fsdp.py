"""FSDP2 under Lightning: weights, gradients and optimizer states are sharded over ranks, and checkpoints are whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from t2i_rl.core.hashing import gathered


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all ranks of all nodes. The method shards its model in `configure_model`.

    A checkpoint is one file with whole tensors, the same that one process or DDP writes: any number of ranks goes on
    from it.
    """

    def __init__(self, process_group_backend: str | None = None):
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights, on rank 0; every rank must call it."""
        module = self.lightning_module
        assert module is not None  # Lightning connects it before anything is saved
        return self._whole(module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole optimizer states, on rank 0; every rank must call it."""
        return self._whole(optimizer.state_dict())

    def _whole(self, state: dict) -> dict:
        def whole(tensor: torch.Tensor) -> torch.Tensor:
            tensor = gathered(tensor)
            return tensor.cpu() if self.is_global_zero else torch.empty(0)

        return tree_map_only(torch.Tensor, whole, state)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None  # Lightning connects it before anything is loaded
        parameters = dict(module.named_parameters())
        sharded = {name: sharded_like(value, parameters[name]) for name, value in checkpoint["state_dict"].items()}
        module.load_state_dict(sharded, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = {
                number: {name: sharded_like(value, parameters[number]) for name, value in state.items()}
                for number, state in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": states})


def sharded_like(value: Any, parameter: torch.Tensor) -> Any:
    """`value` laid out as `parameter` is, where it is a tensor of its shape; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


@runtime_checkable
class Shardable(Protocol):
    """An adapter that says how it may be sharded.

    blocks: what FSDP gathers one at a time. unsharded: the parameters that stay whole.
    """

    def blocks(self) -> list[torch.nn.Module]: ...

    def unsharded(self) -> set[torch.nn.Parameter]: ...


def shard(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Shard an adapter whose `forward` is all that training computes: each of its `blocks` by itself, the rest with the
    root (a group has one dtype, so modules of another dtype are groups of their own). Its `unsharded` parameters stay
    whole on every rank."""
    if isinstance(model, FSDPModule):
        return
    assert isinstance(model, Shardable)  # only methods with such a model let trainer=fsdp through
    blocks, whole = model.blocks(), model.unsharded()
    usual = next(blocks[0].parameters()).dtype
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and own[0].dtype != usual and own[0] not in whole:  # adapters in float32 on weights in half precision
            fully_shard(module, mesh=mesh)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def mesh_of(trainer: L.Trainer) -> DeviceMesh | None:
    """The mesh to shard over; None where nothing is sharded."""
    return trainer.strategy.device_mesh["data_parallel"] if isinstance(trainer.strategy, FSDP2) else None
