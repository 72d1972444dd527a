"""The fused loss as two custom ops, so that `torch.compile(fullgraph=True)` sees one node.

    tropd_kernels::distill            loss, per-token losses, statistics, coefficients, the
                                      gradients that `forward_grads` name, what was sampled
    tropd_kernels::distill_backward   gradients from coefficients that include the incoming gradient

With `forward_grads` the scalar loss is differentiable. Without, the per-token losses and the
log-prob and entropy rows of the statistics are, and the backward calls `distill_backward`, which
computes the logits again. See `autograd.py`.

An op's schema is flat: `flatten` makes its arguments from a problem, `unflatten` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import transforms
from ..dtypes import device_of, result_dtype, stored_dtype
from ..objectives import decode_rule
from ..rows.layout import SCORE, Coef, Stat, TokenInputs
from ..symbolic import symbols_of, values_of
from . import autograd
from .loop import backward
from .problem import GradNeeds, LossOptions, Problem, Side
from .sampling import GradientSampling, SamplingReport

#: Numbers that torch.compile may not know, in the order in which the op gets them as `numbers`, or
#: as the tensor `symbols` if it does not know them (see `symbolic`). 0: no softcap, no sampling.
NUMBERS = (
    "logit_scale", "softcap", "the teacher's logit_scale", "the teacher's softcap",
    "the reference teacher's logit_scale", "the reference teacher's softcap", "temperature",
    "gradient_tolerance", "gradient_sampling",
)  # fmt: skip
#: What `flatten` makes, as the ops' schemas name it. needs: `forward_grads` and `backward_grads`.
CALL = (
    "Tensor student, Tensor? weight, Tensor? bias, Tensor?[] tensors, bool[] needs, str rule, "
    "float[] numbers, str backend, SymInt? ignore_index, SymInt? max_workspace_bytes"
)
#: Places in `tensors`.
LABELS, LOSS_SCALE, SEED = 0, 1, 5
#: Among the outputs of `distill`.
COEFS, GRADIENTS = 3, slice(4, 7)


def numbers_of(problem: Problem) -> list[float]:
    """In the order of `NUMBERS`."""
    options, numbers = problem.options, []
    for side in problem.sides:
        numbers += [1.0, 0.0] if side is None else [side.scale, side.softcap or 0.0]
    sampling = options.sampling
    return [*numbers, options.temperature, sampling.tolerance, sampling.share or 0.0]


def flatten(problem: Problem) -> tuple[Any, ...]:
    """The arguments of `distill`."""
    student, options = problem.student, problem.options
    numbers = numbers_of(problem)
    symbols = symbols_of(numbers)
    tensors = [
        problem.labels, problem.loss_scale, *_tensors(problem.teacher), options.sampling.seed,
        symbols, *_tensors(problem.reference), *problem.inputs.tensors(),
    ]  # fmt: skip
    return (
        student.source, student.weight, student.bias, tensors,
        [*problem.forward_grads, *problem.backward_grads], options.rule.key,
        numbers if symbols is None else [], options.backend, options.ignore_index,
        options.max_workspace_bytes,
    )  # fmt: skip


def _tensors(side: Side | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if side is None else (side.source, side.weight, side.bias)


def _side(tensors: Sequence[Tensor | None], scale: float, softcap: float) -> Side | None:
    source, weight, bias = tensors
    return None if source is None else Side(source, weight, bias, scale, softcap or None)


def unflatten(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    rule: str,
    numbers: Sequence[float],
    backend: str,
    ignore_index: int | None,
    max_workspace_bytes: int | None,
) -> Problem:
    """The problem whose `flatten` these are, without its shard."""
    labels, loss_scale, *teacher = tensors[:SEED]
    seed, symbols, *rest = tensors[SEED:]
    if symbols is not None:
        numbers = values_of(symbols, NUMBERS)
    scale, cap, *of_teachers, temperature, tolerance, share = numbers
    assert labels is not None
    assert loss_scale is not None
    return Problem(
        student=Side(student, weight, bias, scale, cap or None),
        teacher=_side(teacher, *of_teachers[:2]),
        reference=_side(rest[:3], *of_teachers[2:]),
        labels=labels,
        inputs=TokenInputs.of(rest[3:]),
        options=LossOptions(
            rule=decode_rule(rule),
            backend=backend,
            temperature=temperature,
            ignore_index=ignore_index,
            max_workspace_bytes=max_workspace_bytes,
            sampling=GradientSampling(tolerance, share or None, seed),
        ),
        loss_scale=loss_scale,
        forward_grads=GradNeeds(*needs[:4]),
        backward_grads=GradNeeds(*needs[4:]),
    )


@torch.library.custom_op(
    "tropd_kernels::distill",
    mutates_args=(),
    schema=f"({CALL}) -> ({', '.join(['Tensor'] * 8)})",
)
def distill(*call):
    problem = unflatten(*call)
    loss, token_loss, result = autograd.compute(problem)
    d_hidden, d_weight, d_bias = (
        call[0].new_empty(0) if gradient is None else gradient
        for gradient in (result.d_hidden, result.d_weight, result.d_bias)
    )
    return loss, token_loss, result.stats, result.coefs, d_hidden, d_weight, d_bias, result.report


@distill.register_fake
def _distill_fake(student, weight, bias, tensors, needs, rule, *_):
    labels, seed = tensors[LABELS], tensors[SEED]
    rows = len(Stat) if decode_rule(rule).score is None else SCORE + 1
    dtype, n = result_dtype(student.dtype), labels.shape[0]
    grads = GradNeeds(*needs[:4])
    samples = (grads.hidden or grads.weight) and seed is not None

    def gradient(of, need, wide=False):
        if not need:
            return student.new_empty(0)
        return student.new_empty(of.shape, dtype=dtype if wide else stored_dtype(of.dtype))

    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((n,), dtype=dtype),
        student.new_empty((rows, n), dtype=dtype),
        student.new_empty((len(Coef), n), dtype=dtype),
        gradient(student, grads.hidden),
        gradient(weight, grads.weight, grads.fp32_weight),
        gradient(bias, grads.bias),
        student.new_empty((len(SamplingReport) if samples else 0,), dtype=dtype),
    )


@torch.library.custom_op(
    "tropd_kernels::distill_backward",
    mutates_args=(),
    schema=f"(Tensor coefs, bool[] grads, {CALL}) -> (Tensor, Tensor, Tensor)",
)
def distill_backward(coefs, grads, *call):
    problem = unflatten(*call)
    with device_of(coefs):
        result = backward(problem, coefs, GradNeeds(*grads))
    student, made = call[:3], (result.d_hidden, result.d_weight, result.d_bias)
    return tuple(
        call[0].new_empty(0) if gradient is None else gradient.to(of.dtype)
        for gradient, of in zip(made, student, strict=True)
    )


@distill_backward.register_fake
def _distill_backward_fake(coefs, grads, student, weight, bias, *_):
    return tuple(
        torch.empty_like(of) if need else student.new_empty(0)
        for of, need in zip((student, weight, bias), grads, strict=True)
    )


@distill_backward.register_vmap
def _distill_backward_vmap(info, in_dims, *arguments):
    """One incoming gradient after the other, as jacrev asks for them."""
    flat, tree = tree_flatten(arguments)
    dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
    found = []
    for i in range(info.batch_size):
        one = [v if dim is None else v.select(dim, i) for v, dim in zip(flat, dims, strict=True)]
        found.append(distill_backward(*tree_unflatten(one, tree)))
    return tuple(map(torch.stack, zip(*found, strict=True))), (0, 0, 0)


def _setup_context(ctx, inputs, output):
    student, weight, bias, tensors, needs, *settings = inputs
    loss, *others = output
    grads = GradNeeds(*needs[:4])
    ctx.formed = grads.any
    ctx.set_materialize_grads(False)
    if ctx.formed:
        ctx.mark_non_differentiable(*others)
        autograd.keep_gradients(ctx, grads, (student, weight, bias), output[GRADIENTS], loss)
    else:
        ctx.needs, ctx.settings = needs, settings
        ctx.mark_non_differentiable(*output[COEFS:])
        ctx.save_for_backward(loss, output[COEFS], student, weight, bias, *tensors)


def _backward(ctx, d_loss, d_token_loss, d_stats, *_):
    gradients = autograd.backward(ctx, _recomputed, d_loss, d_token_loss, d_stats)
    # A list in which no tensor is missing counts as one of tensors, and wants a list back.
    rest = [
        [None] * len(asks) if isinstance(asks, (list, tuple)) else None
        for asks in ctx.needs_input_grad[3:]
    ]
    return (*gradients, *rest)


def _recomputed(ctx, saved, *incoming: Tensor | None) -> list[Tensor | None]:
    coefs, student, weight, bias, *tensors = saved
    grads = list(ctx.needs_input_grad[:3])
    coefs = autograd.scale_coefs(coefs, tensors[LOSS_SCALE], *incoming)
    made = distill_backward(coefs, grads, student, weight, bias, tensors, ctx.needs, *ctx.settings)
    return [gradient if need else None for gradient, need in zip(made, grads, strict=True)]


distill.register_autograd(_backward, setup_context=_setup_context)


class _Distill(torch.autograd.Function):
    """`distill` inside torch.func's transforms, which take no custom op's autograd."""

    @staticmethod
    def forward(*arguments):
        return distill(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
    jvp = staticmethod(transforms.raise_forward_mode)  # type: ignore[assignment]

    @staticmethod
    def vmap(info, in_dims, *arguments):
        """Of a vmap over other tensors than these, which are refused (`check_unbatched`)."""
        found = _Distill.apply(*arguments)
        return found, (None,) * len(found)


def differentiable_distill(problem: Problem) -> tuple[Tensor, ...]:
    """`distill` of the problem, inside of transforms and outside."""
    arguments = flatten(problem)
    inside = not torch.compiler.is_compiling() and transforms.active()
    return _Distill.apply(*arguments) if inside else distill(*arguments)
