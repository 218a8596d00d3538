"""How Lightning's strategies write and read checkpoints: by way of `checkpoints`."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from t2i_rl.core.checkpoints import read_checkpoint, write_checkpoint
from t2i_rl.core.errors import UserError


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that a kill does not cut short.

    Lightning's own class writes into the temporary folder and moves, which between two file systems
    is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: None = None) -> None:
        """See `write_checkpoint`."""
        if storage_options is not None:
            raise UserError("checkpoints are files: storage_options are not taken")
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `read_checkpoint`: numbers and tensors alone, on the CPU."""
        return read_checkpoint(path, mmap=False)
