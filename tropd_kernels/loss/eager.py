"""backend="reference": the op's contract, met by `reference.py` on materialised logits.

Everything is differentiable by autograd, in the inputs' dtype (float32 for half precision, from
exact products). Memory grows with tokens times vocabulary: for tests and small problems.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..dtypes import result_dtype, without_autocast
from ..rows.layout import Stat, TokenInputs
from .problem import Problem, Side
from .values import tokens_that_count, with_repeats_marked


def reference_loss(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, token_loss (N,), stats (Stat, N)) as `ops.distill` gives them."""
    index = tokens_that_count(problem)
    problem = with_repeats_marked(problem)
    tokens = slice(None) if index is None else index
    labels = problem.labels[tokens]
    inputs = problem.inputs.map(
        lambda t: t[tokens].to(problem.dtype) if t.is_floating_point() else t[tokens]
    )
    z = _logits(problem.student, problem, tokens)
    token_loss, found = reference.token_losses(
        z,
        labels,
        _teacher(problem, inputs, labels, tokens, z),
        problem.options.rule,
        old_log_probs=inputs.old_log_probs,
        advantages=inputs.advantages,
        task_advantages=inputs.task_advantages,
        teacher_prefix=inputs.teacher_prefix,
        uniforms=inputs.uniforms,
        mixing=inputs.mixing,
        scores=inputs.scores,
        ids=inputs.ids if problem.teacher is not None else None,
    )
    weight = inputs.token_weight
    if weight is not None:
        token_loss = torch.where(weight == 0, 0.0, token_loss * weight)  # not 0 * inf
    n = problem.labels.shape[0]
    where = torch.arange(n, device=z.device)[tokens]
    unknown = torch.full_like(token_loss, torch.nan)
    rows = torch.stack([found.get(_STAT_NAMES[row], unknown).to(z.dtype) for row in Stat])
    stats = z.new_zeros((len(Stat), n)).index_copy(1, where, rows)
    if problem.options.rule.score is not None:
        unranked = z.new_full((1, n), torch.nan)
        ranked = found["score"].to(z.dtype)[None]
        stats = torch.cat([stats, unranked.index_copy(1, where, ranked)])
    token_loss = z.new_zeros(n).index_copy(0, where, token_loss)
    return token_loss.sum() * problem.loss_scale, token_loss, stats


_STAT_NAMES = {row: row.name.lower() for row in Stat} | {
    Stat.LOG_PROB: "log_probs",
    Stat.TEACHER_LOG_PROB: "teacher_log_probs",
}


class _Product(torch.autograd.Function):
    """a @ b, which no autocast rounds: neither in the forward nor around the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        with without_autocast(a.device.type):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, d_a, d_b):
        a, b = ctx.saved_tensors
        parts = [] if d_a is None else [_Product.apply(d_a, b)]
        parts += [] if d_b is None else [_Product.apply(a, d_b)]
        return sum(parts)

    @staticmethod
    def backward(ctx, d_out):
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        d_a = _Product.apply(d_out, b.t()) if needs_a else None
        d_b = _Product.apply(a.t(), d_out) if needs_b else None
        return d_a, d_b


class _Rounded(torch.autograd.Function):
    """A head (V, H) with the values that it has in another dtype, in a dtype that holds those and
    its gradient, of which only the head's own dtype rounds the latter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, dtype):
        return weight.to(dtype).to(result_dtype(dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.given, ctx.held = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx, d_out):
        return d_out.to(ctx.given), None

    @staticmethod
    def jvp(ctx, d_weight, _):
        return d_weight.to(ctx.held)


def _logits(side: Side, problem: Problem, tokens: slice | Tensor) -> Tensor:
    rows, v = side.source[tokens].to(problem.dtype), problem.vocab_size
    logits = rows[:, :v]
    if side.weight is not None:
        weight = side.weight[:v]
        if weight.dtype != side.source.dtype:
            weight = _Rounded.apply(weight, side.source.dtype)
        logits = _Product.apply(rows, weight.to(problem.dtype).t())
    if side.bias is not None:
        logits = logits + side.bias[:v].to(problem.dtype)
    temperature = problem.options.temperature
    return reference.transform_logits(logits, side.scale, side.softcap, temperature)


def _teacher(
    problem: Problem, inputs: TokenInputs, labels: Tensor, tokens: slice | Tensor, z: Tensor
) -> reference.ReferenceTeacher | None:
    if problem.teacher is not None:
        t, rule, other = _logits(problem.teacher, problem, tokens), problem.options.rule, None
        if problem.reference is not None:
            other = _logits(problem.reference, problem, tokens)
        if rule.reshapes_target:
            t = reference.target_logits(t, z, other, rule, inputs.blending)
        return reference.dense_teacher(t, labels)
    known = inputs.label_log_probs
    if known is None:
        return None
    if inputs.ids is None:
        return reference.sampled_teacher(known)
    entropy = inputs.teacher_entropy
    return reference.top_k_teacher(*inputs.topk, known, entropy, problem.vocab_size)
