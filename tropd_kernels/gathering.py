"""Heads that are sharded for storage (FSDP2), whole for one call.

Under `fully_shard` a parameter outside its own module's forward is a DTensor, of which each process
holds some rows. The loss wants the whole head, for this process's tokens:

    forward     one all-gather a call: V x H elements, alive until the backward is done
    backward    each process has the gradient of its own tokens; the sum over processes goes back to
                the shards (reduce-scatter), divided by their number, as FSDP2 divides its own

`DTensor.full_tensor()` alone would take every process's gradient to be the same and keep one of
them: the tokens of the others would be lost, silently.

Inside the forward of the FSDP2 unit that holds the head it is whole already, and comes back as it
is. Tied embeddings have to be there: FSDP2 wants parameters that share memory in one unit, so the
loss goes into that unit's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gathered(parameter: Tensor, *, mean: bool = True) -> Tensor:
    """The whole of a sharded parameter, differentiable; any other tensor as it is.

    parameter: a DTensor over the processes that share the parameters (each with tokens of its own),
        or a plain tensor. mean: the gradient is averaged over these processes, as FSDP2 and DDP do,
        so the loss divides by the tokens of all of them and multiplies by their number (or each
        process by its own); False sums.

    A collective: every process has to come here. Raises TypeError for another thing than a tensor.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"parameter must be a tensor, got {type(parameter).__name__}")
    if not hasattr(parameter, "full_tensor"):
        return parameter
    sharded: Any = parameter
    from torch.distributed.tensor import Partial

    mesh = sharded.device_mesh
    whole = sharded.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if mean and whole.requires_grad:
        whole = _Scaled.apply(whole, 1.0 / mesh.size())
    return whole


class _Scaled(torch.autograd.Function):
    """The tensor itself; its gradient times a number."""

    @staticmethod
    def forward(ctx, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.scale, None
