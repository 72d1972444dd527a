"""The gradient that the forward has formed, times the incoming gradient, which is almost always 1.

The host must not wait for a GPU to find that out. There a kernel reads the factor and leaves the
gradient alone if it is 1 (`triton_scaling.py`), which saves a pass over the largest tensor of a
step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from ..backends import runs_triton
from ..dtypes import TILE_ROWS


def scale_and_cast(
    gradient: Tensor, factor: Tensor, dtype: torch.dtype, last_use: bool = False
) -> Tensor:
    """gradient * factor, in the factor's precision, rounded once to `dtype`, without a float32 copy
    of the whole tensor. With `last_use` it reuses the gradient's memory if it can."""
    if transforms.batched(factor):
        return (gradient * factor).to(dtype)
    # A traced gradient belongs to the graph.
    in_place = last_use and gradient.dtype == dtype and type(gradient) is Tensor
    on_cpu = factor.device.type == "cpu"
    if in_place and on_cpu:  # reading the factor costs no wait here
        return gradient if factor == 1 else gradient.mul_(factor)
    result = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    if by_kernel(gradient, factor):
        from .triton_scaling import scale

        scale(gradient, factor, result)
    elif not on_cpu:
        # A 1-d factor takes part in type promotion; a 0-d one would be rounded to bfloat16 first.
        torch.mul(gradient, factor.view(1), out=result)
    elif gradient.dtype == dtype:
        torch.mul(gradient, factor, out=result)
    else:
        # In tiles: a CPU would hold the whole product in float32 before it rounds.
        for low in range(0, gradient.shape[0], TILE_ROWS):
            rows = slice(low, low + TILE_ROWS)
            result[rows] = gradient[rows] * factor
    return result


def by_kernel(gradient: Tensor, factor: Tensor) -> bool:
    """Whether the Triton kernel scales it, whatever backend has formed the gradient. Fake tensors
    and those inside torch.func's transforms have no memory to give to a kernel."""
    plain = all(type(t) is Tensor and not transforms.wrapped(t) for t in (gradient, factor))
    here = plain and gradient.is_contiguous()
    return here and runs_triton(gradient.device)
