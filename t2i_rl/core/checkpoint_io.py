"""How Lightning's strategies write and read checkpoints: beside the target and then renamed, and read with a line for
what is no checkpoint."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from t2i_rl.core.checkpoints import read_checkpoint, write_checkpoint
from t2i_rl.core.errors import UserError


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's own writes into the temporary folder and moves: between two file systems that is a copy, which a kill
    cuts short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: None = None) -> None:
        """See `write_checkpoint`."""
        if storage_options is not None:
            raise UserError("checkpoints are files: storage_options are not taken")
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: str | Path, map_location=None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `read_checkpoint`: numbers and tensors alone, on the CPU."""
        return read_checkpoint(path, mmap=False)
