"""The head's gradient in the training engine's own float32 buffer.

Megatron-LM and what is built on it keep, for each parameter, a float32 tensor `main_grad` that adds
up the gradients of all micro-batches; autograd's, in the parameter's dtype, are added by a hook and
dropped. Here d_weight is a float32 sum anyway: where a weight has a float32 `main_grad` it waits
for the backward unrounded and is added there, so that no micro-batch's share is rounded to
bfloat16. It costs 4 V H bytes between forward and backward in place of 2 V H. Autograd is given
zeros, which the engine's hook adds with whatever else has reached the weight.

That flag of Megatron-LM's own fusion, `grad_added_to_main_grad`, is only looked for, as the mark of
such an engine, and not set: until the next iteration its hook would drop every other gradient of
the weight, such as a second loss's or a tied embedding's.

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
