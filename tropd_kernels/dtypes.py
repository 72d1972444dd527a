"""Which dtypes a call works in, and on which device."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
#: Rows of a (V, H) tensor that are converted at once on a CPU: 8 MiB of float32 at a width of 1024.
TILE_ROWS = 2048


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and accumulators for inputs of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for the backward: its own, but float32 for float16, which
    would underflow before a loss scale in the backward could help."""
    return torch.float32 if dtype == torch.float16 else dtype


def without_autocast(device_type: str):
    """A caller's autocast would round the operands and results of every product that does not write
    into a tensor of ours."""
    if device_type == "meta":  # has no autocast
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def device_of(tensor: Tensor):
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()
