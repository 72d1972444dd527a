"""The head's gradient in the training engine's own float32 buffer.

Megatron-LM and frameworks built on it keep a float32 tensor `main_grad` for each parameter, which
accumulates the gradients of all micro-batches. A hook adds autograd's gradient, in the parameter's
dtype, and drops it. Our d_weight is a float32 sum anyway: if a weight has a float32 `main_grad`,
d_weight stays unrounded until the backward and is added there, so that no micro-batch's part is
rounded to bfloat16. This costs 4 V H bytes between forward and backward instead of 2 V H. Autograd
gets zeros, to which the engine's hook adds whatever else has reached the weight.

`grad_added_to_main_grad`, the flag of Megatron-LM's own fusion, only identifies such an engine
here. We do not set it: until the next iteration its hook would drop every other gradient of the
weight, such as that of a second loss or of a tied embedding.

A slice or a copy of the parameter has no such attributes, and gets its gradient as usual. Under
`overlap_param_gather` Megatron-LM finishes gathering a parameter before its module's forward, which
a fused loss does not call: have it finished (`finish_param_sync`) before the loss reads the head.

Source: Megatron-LM, megatron/core/tensor_parallel/layers.py and
megatron/core/distributed/distributed_data_parallel.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import TILE_ROWS, result_dtype


def has_main_grad(weight: Any) -> bool:
    """Whether the engine wants this weight's gradient in `main_grad`."""
    main = getattr(weight, "main_grad", None)
    if not isinstance(main, Tensor) or not hasattr(weight, "grad_added_to_main_grad"):
        return False
    return main.shape == weight.shape and main.dtype == result_dtype(weight.dtype)


def add_to_main_grad(weight: Any, gradient: Tensor, factor: Tensor) -> Tensor:
    """weight.main_grad += factor * gradient; zeros for autograd."""
    for low in range(0, gradient.shape[0], TILE_ROWS):  # no second (V, H) in float32
        rows = slice(low, low + TILE_ROWS)
        weight.main_grad[rows] += gradient[rows] * factor
    return torch.zeros_like(weight)
