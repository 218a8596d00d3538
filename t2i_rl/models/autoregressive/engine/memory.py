"""How much memory is free now, and how many rows fit into it."""

import psutil
import torch

from t2i_rl.core.errors import UserError

SHARE = 0.8  # of what is free; the rest is for what decoding allocates besides its cache


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now, what torch's allocator holds unused included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def even_chunks(rows: int, most: int) -> list[slice]:
    """Slices of at most `most` rows, as equal as can be."""
    count = -(-rows // most)
    edges = [rows * part // count for part in range(count + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:])]


def rows_that_fit(bytes_per_row: int, device: torch.device, what: str, held: int = 0) -> int:
    """How many rows of `bytes_per_row` fit into the free memory of `device` and the `held` bytes that would be given back for them.

    Raises:
        UserError: not even one.
    """
    free = free_bytes(device) + held
    rows = int(free * SHARE) // bytes_per_row
    if rows < 1:
        raise UserError(
            f"{what} needs {bytes_per_row / 2**30:.2f} GiB of cache a row and {device} has {free / 2**30:.2f} GiB free: "
            "set model.rollout.dtype=bfloat16, model.rollout.keep=false, or method.offload_reference=true"
        )
    return rows
