"""The loss of a vocabulary-parallel head as an autograd function: `ops.distill` of one shard.

Not a custom op, whose schema has no room for a process group. Under torch.compile the call runs
eagerly, a graph break; with fullgraph=True it is an error.

As in `ops.py`, gradients of a scalar loss are formed in the forward and scaled in the backward,
which then communicates nothing; per-token losses recompute in the backward, which then sums
d_hidden over the ranks, so all of them have to run it, in the same order. Where the gradient is
sampled, each rank samples its own ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..dtypes import device_of
from ..parallel import Shard
from . import autograd, ops
from .loop import backward
from .problem import GradNeeds, Problem, Side


def sharded_loss(problem: Problem, shard: Shard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, token_loss, stats, report), as `ops.distill` gives them, of the problem with this
    rank's part of the heads."""
    teacher = _aligned(shard, problem.teacher, shard.teacher_bounds)
    reference = _aligned(shard, problem.reference, shard.reference_bounds)
    pieces = [() if side is None else side.pieces for side in (teacher, reference)]
    arguments = ops.flatten(replace(problem, teacher=teacher, reference=reference))
    return _ShardedLoss.apply(*arguments[:3], arguments[3:], pieces, shard)


def _aligned(shard: Shard, teacher: Side | None, have: tuple[int, ...] | None) -> Side | None:
    """A teacher's logits, or its head, for the ids of this shard. have: the first ids of what the
    ranks hold of it."""
    if teacher is None or have is None:
        return None
    if teacher.weight is None:
        pieces = tuple(part.t() for part in shard.reshard(teacher.source.t(), have))
        return Side(pieces[0], pieces=pieces if len(pieces) > 1 else ())
    pieces = shard.reshard(teacher.weight, have)
    bias = teacher.bias
    if bias is not None:
        bias = torch.cat(shard.reshard(bias, have))
    more = pieces if len(pieces) > 1 else ()
    return replace(teacher, weight=pieces[0], bias=bias, pieces=more)


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, weight, bias, arguments, pieces, shard):
        ctx.shard, ctx.n_pieces = shard, [len(of_side) for of_side in pieces]
        pieces = [piece for of_side in pieces for piece in of_side]
        tensors, *ctx.settings = arguments
        problem = _problem(ctx, [student, weight, bias, *pieces, *tensors])
        loss, token_loss, result = autograd.compute(problem)
        ctx.set_materialize_grads(False)
        ctx.formed = problem.forward_grads.any
        if ctx.formed:
            ctx.mark_non_differentiable(token_loss, result.stats, result.report)
            made = (result.d_hidden, result.d_weight, result.d_bias)
            autograd.keep_gradients(ctx, problem.forward_grads, (student, weight, bias), made, loss)
        else:
            ctx.mark_non_differentiable(result.report)
            ctx.save_for_backward(loss, result.coefs, student, weight, bias, *pieces, *tensors)
        return loss, token_loss, result.stats, result.report

    @staticmethod
    def backward(ctx, d_loss, d_token_loss, d_stats, _):
        return *autograd.backward(ctx, _recomputed, d_loss, d_token_loss, d_stats), None, None, None


def _recomputed(ctx, saved: Sequence[Any], *incoming: Tensor | None) -> list[Tensor | None]:
    coefs, *tensors = saved
    problem = _problem(ctx, tensors)
    coefs = autograd.scale_coefs(coefs, problem.loss_scale, *incoming)
    with device_of(coefs):
        result = backward(problem, coefs, GradNeeds(*ctx.needs_input_grad[:3]))
    made = (result.d_hidden, result.d_weight, result.d_bias)
    return [None if g is None else g.to(t.dtype) for g, t in zip(made, tensors, strict=False)]


def _problem(ctx, tensors: Sequence[Any]) -> Problem:
    """Of student, weight and bias, the teachers' pieces, and the other tensors of `ops.flatten`."""
    student, weight, bias, *rest = tensors
    found = []
    for count in ctx.n_pieces:
        found.append(tuple(rest[:count]))
        rest = rest[count:]
    problem = ops.unflatten(student, weight, bias, rest, *ctx.settings)
    teacher, reference = (
        None if side is None else replace(side, pieces=pieces)
        for side, pieces in zip(problem.sides[1:], found, strict=True)
    )
    return replace(problem, teacher=teacher, reference=reference, shard=ctx.shard)
