"""Makes sharded tensors whole for one call: FSDP2's heads, and sequence-parallel hidden states.

**Heads.** Under `fully_shard` a parameter outside its own module's forward is a DTensor, of which
each process holds some rows. The loss needs the whole head, for this process's tokens:

    forward     one all-gather per call: V x H elements, which live until the backward is done
    backward    each process has the gradient of its own tokens; a reduce-scatter adds them up and
                divides by the number of processes, as FSDP2 does with its own gradients

`DTensor.full_tensor()` would assume that all processes have the same gradient and keep one of them:
the tokens of the others would be lost silently.

Inside the forward of the FSDP2 unit that holds it, the head is whole already and is returned as it
is. Tied embeddings have to be used there: FSDP2 wants parameters that share memory in one unit, so
the loss has to be computed in that unit's forward.

**Hidden states.** Under sequence parallelism, as in Megatron-LM, each rank of a tensor-parallel
group holds the last hidden states of its share of the tokens. The loss of a vocabulary-parallel
head (`process_group=`) needs all of them on every rank, and returns their complete gradient on
every rank: the forward is an all-gather of N x H elements, the backward keeps the rank's own rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .parallel import gather
from .transforms import check_none


def gathered(parameter: Tensor, *, mean: bool = True) -> Tensor:
    """The whole of a sharded parameter, differentiable; any other tensor as it is.

    Args:
        parameter: A DTensor over the processes that share the parameters (each with tokens of
            its own), or a plain tensor.
        mean: The gradient is averaged over these processes, as FSDP2 and DDP do, so the loss
            divides by the tokens of all of them and multiplies by their number (or each process by
            its own); False sums.

    A collective: every process has to come here. Raises TypeError for another thing than a tensor.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"parameter must be a tensor, got {type(parameter).__name__}")
    if not hasattr(parameter, "full_tensor"):
        return parameter
    check_none("gathered() of a sharded parameter")
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


def gathered_tokens(hidden: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """All ranks' tokens (R * n, *) in the order of the ranks, from this rank's (n, *);
    differentiable.

    hidden: hidden states, or whatever else has the tokens in dimension 0 (labels, weights); as many
    on every rank. The gradient that comes back has to be the complete one on every rank, as the
    loss with the same `process_group` returns it; this rank's rows of it go on.

    A collective. Raises ValueError, on every rank, where the ranks hold other shapes.
    """
    check_none("gathered_tokens")
    shape = torch.tensor([hidden.dim(), *hidden.shape][:8], device=hidden.device)
    shape = torch.nn.functional.pad(shape, (0, 8 - shape.numel()))
    shapes = gather(process_group, shape).tolist()
    for rank, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(
                f"hidden: rank {rank} of {len(shapes)} holds {tuple(other[1 : other[0] + 1])}, "
                f"rank 0 {tuple(shapes[0][1 : shapes[0][0] + 1])}: pad the tokens, with labels "
                f"that are ignored, to as many on every rank"
            )
    return _Tokens.apply(hidden, process_group)


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        first = dist.get_rank(group) * len(hidden)
        ctx.own = slice(first, first + len(hidden))
        return gather(group, hidden).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient[ctx.own], None
