"""How much memory is free now, and how many rows fit into it."""

import psutil
import torch

from t2i_rl.core.errors import UserError

SHARE = 0.8  # of what is free; the rest is for what decoding allocates besides its cache


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now, with those that torch holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def even_chunks(rows: int, max_rows: int) -> list[slice]:
    """Slices of at most `max_rows` rows, as equal as can be."""
    count = -(-rows // max_rows)
    edges = [rows * part // count for part in range(count + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:])]


def rows_that_fit(bytes_per_row: int, device: torch.device, work: str, reusable: int = 0) -> int:
    """How many rows fit into the free memory of `device`.

    Args:
        work: what needs them, for the error.
        reusable: bytes in use that would be given back for them.

    Raises:
        UserError: not even one.
    """
    free = free_bytes(device) + reusable
    rows = int(free * SHARE) // bytes_per_row
    if rows < 1:
        gib_per_row, gib_free = bytes_per_row / 2**30, free / 2**30
        raise UserError(
            f"{work} needs {gib_per_row:.2f} GiB of cache a row and {device} has {gib_free:.2f} GiB free: "
            "set model.rollout.dtype=bfloat16, model.rollout.keep=false, or method.offload_reference=true"
        )
    return rows
