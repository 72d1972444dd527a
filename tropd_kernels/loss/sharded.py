"""The loss of a vocabulary-parallel head as an autograd function: `ops.distill` of one shard.

Not a custom op, whose schema has no room for a process group. Under torch.compile the call runs
eagerly, a graph break; with fullgraph=True it is an error.

As in `ops.py`, gradients of a scalar loss are formed in the forward and scaled in the backward,
which then communicates nothing; per-token losses recompute in the backward, which then sums
d_hidden over the ranks, so all of them have to run it, in the same order. Where the
gradient is sampled, each rank samples its own ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import device_of
from ..parallel import Shard
from . import ops
from .loop import INPUTS, Needs, Problem, backward, forward


def sharded_loss(
    shard: Shard, tensors, inputs, scale, needs, later, rule, scales, backend, ignore_index,
    max_workspace_bytes, selection,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, token_loss, stats, sampled) of the flat problem, as `ops.distill` gives them."""
    student, weight, bias, labels, *teacher = tensors
    teacher, pieces = _aligned(shard, *teacher)
    settings = (
        rule.key, scales, backend, ignore_index, max_workspace_bytes, shard, selection, later
    )  # fmt: skip
    row_inputs = [inputs.get(name) for name in INPUTS]
    return _ShardedLoss.apply(
        student, weight, bias, labels, *teacher, scale, needs, settings, len(pieces), *pieces,
        *row_inputs,
    )  # fmt: skip


def _aligned(shard: Shard, source, weight, bias):
    """The teacher's logits, or its head, for the ids of this shard: (source, weight, bias) and the
    pieces of what lies in several tensors."""
    if source is None:
        return (None, None, None), ()
    if weight is None:
        pieces = tuple(part.t() for part in shard.reshard(source.t()))
        return (pieces[0], None, None), pieces if len(pieces) > 1 else ()
    pieces = shard.reshard(weight)
    if bias is not None:
        bias = torch.cat(shard.reshard(bias))
    return (source, pieces[0], bias), pieces if len(pieces) > 1 else ()


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student, weight, bias, labels, teacher, teacher_weight, teacher_bias, scale, needs,
        settings, n_pieces, *rest,
    ):  # fmt: skip
        tensors = (student, weight, bias, labels, teacher, teacher_weight, teacher_bias)
        problem = _problem(tensors, settings, n_pieces, rest)
        with device_of(student):
            result = forward(problem, Needs(*needs), scale)
        token_loss = ops.weighed_losses(problem, result)
        loss = token_loss.sum() * scale
        sampled = ops.nothing_sampled(problem) if result.sampled is None else result.sampled
        ctx.set_materialize_grads(False)
        ctx.formed, ctx.settings, ctx.n_pieces = any(needs), settings, n_pieces
        if ctx.formed:
            ctx.mark_non_differentiable(token_loss, result.stats, sampled)
            made = (result.d_student, result.d_weight, result.d_bias)
            ops.keep_gradients(ctx, needs, (student, weight, bias), made, loss)
        else:
            ctx.mark_non_differentiable(sampled)
            ctx.save_for_backward(loss, *tensors, result.coefs, scale, *rest)
        return loss, token_loss, result.stats, sampled

    @staticmethod
    def backward(ctx, d_loss, d_token_loss, d_stats, _):
        loss, *saved = ctx.saved_tensors
        with torch.no_grad():
            if ctx.formed:
                gradients = ops.kept_gradients(ctx, saved, d_loss)
            else:
                gradients = _recomputed(ctx, saved, d_loss, d_token_loss, d_stats)
        gradients = ops.constants(gradients, loss)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


def _recomputed(ctx, saved, d_loss, d_token_loss, d_stats) -> list[Tensor | None]:
    *tensors, coefs, scale = saved[:9]
    problem = _problem(tensors, ctx.settings, ctx.n_pieces, saved[9:])
    carried = ops.carry(coefs, scale, d_loss, d_token_loss, d_stats)
    with device_of(tensors[0]):
        result = backward(problem, carried, Needs(*ctx.needs_input_grad[:3]))
    made = (result.d_student, result.d_weight, result.d_bias)
    return [None if g is None else g.to(t.dtype) for g, t in zip(made, tensors, strict=False)]


def _problem(tensors, settings, n_pieces, rest) -> Problem:
    *options, shard, selection, later = settings
    pieces, inputs = rest[:n_pieces], rest[n_pieces:]
    arguments = [*tensors, inputs, *options, shard, tuple(pieces), selection, later]
    return ops.flat_problem(*arguments)
