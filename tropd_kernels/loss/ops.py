"""The fused loss as two custom ops, so that `torch.compile(fullgraph=True)` sees one node.

    tropd_kernels::distill            loss, per-token losses, statistics, coefficients, and, where
    `needs`
                                      says so, the gradients of the loss, and what was sampled
    tropd_kernels::distill_backward   gradients from coefficients that carry the incoming gradient

Autograd: with `needs`, `distill` has formed the gradients of its first output (the scalar loss) and
the backward only scales them, in the final cast to the inputs' dtypes, by a tensor that never
visits the host. Without, the per-token losses and the log-prob and entropy rows of the statistics
are the differentiable outputs, and the backward calls `distill_backward`, which makes the logits
again; `later` says which gradients it may be asked for. The gradients are constants of the forward,
so a second differentiation raises.

Arguments are flat because an op's schema is: `rule` is `TokenRule.key`, `scales` is logit scale and
soft cap (0: none) of student and teacher and the temperature, `inputs` the per-token tensors in the
order of `loop.INPUTS`; the next three are `sampling.Selection`. `symbols` holds the scales,
tolerance and sampling (0: none) where torch.compile does not know them (see `symbolic`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import transforms
from ..dtypes import device_of, result_dtype, stored_dtype
from ..objectives import decode_rule
from ..rows.layout import FIRST_WEIGHT, Coef, LogitTransform, RowOptions, Stat
from ..symbolic import values_of
from .loop import INPUTS, Needs, Problem, Result, Side, backward, forward
from .main_grad import add_to_main_grad, offers_main_grad
from .sampling import EVERY_ID, Sampled, Selection
from .scaling import scaled

Gradients = tuple[Tensor, Tensor, Tensor]
#: What `symbols` holds.
SYMBOLS = (
    "logit_scale", "softcap", "the teacher's logit_scale", "the teacher's softcap", "temperature",
    "gradient_tolerance", "gradient_sampling",
)  # fmt: skip


@torch.library.custom_op("tropd_kernels::distill", mutates_args=())
def distill(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    inputs: Sequence[Tensor | None],
    loss_scale: Tensor,
    needs: Sequence[bool],
    later: Sequence[bool],
    rule: str,
    scales: Sequence[float],
    backend: str,
    ignore_index: int | None,
    max_workspace_bytes: int | None,
    tolerance: float = 0.0,
    sampling: float | None = None,
    sampling_seed: Tensor | None = None,
    symbols: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if symbols is not None:
        *scales, tolerance, sampling = values_of(symbols, SYMBOLS)
    problem = flat_problem(
        student, weight, bias, labels, teacher, teacher_weight, teacher_bias, inputs,
        rule, scales, backend, ignore_index, max_workspace_bytes,
        selection=Selection(tolerance, sampling or None, sampling_seed), later=later,
    )  # fmt: skip
    with device_of(student):
        result = forward(problem, Needs(*needs), loss_scale)
    token_loss = weighed_losses(problem, result)
    loss = token_loss.sum() * loss_scale
    d_student, d_weight, d_bias = (
        student.new_empty(0) if g is None else g
        for g in (result.d_student, result.d_weight, result.d_bias)
    )
    sampled = nothing_sampled(problem) if result.sampled is None else result.sampled
    return loss, token_loss, result.stats, result.coefs, d_student, d_weight, d_bias, sampled


@distill.register_fake
def _(
    student, weight, bias, labels, teacher, teacher_weight, teacher_bias, inputs,
    loss_scale, needs, later, rule, scales, backend, ignore_index, max_workspace_bytes,
    tolerance=0.0, sampling=None, sampling_seed=None, symbols=None,
):  # fmt: skip
    dtype, n = result_dtype(student.dtype), labels.shape[0]
    samples = any(needs[:2]) and sampling_seed is not None

    def gradient(of, need, wide=False):
        if not need:
            return student.new_empty(0)
        return student.new_empty(of.shape, dtype=dtype if wide else stored_dtype(of.dtype))

    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((n,), dtype=dtype),
        student.new_empty((len(Stat), n), dtype=dtype),
        student.new_empty((len(Coef), n), dtype=dtype),
        gradient(student, needs[0]),
        gradient(weight, *needs[1::2]),
        gradient(bias, needs[2]),
        student.new_empty((len(Sampled) if samples else 0,), dtype=dtype),
    )


@torch.library.custom_op("tropd_kernels::distill_backward", mutates_args=())
def distill_backward(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    inputs: Sequence[Tensor | None],
    coefs: Tensor,
    needs: Sequence[bool],
    later: Sequence[bool],
    rule: str,
    scales: Sequence[float],
    backend: str,
    ignore_index: int | None,
    max_workspace_bytes: int | None,
    symbols: Tensor | None = None,
) -> Gradients:
    if symbols is not None:
        scales = values_of(symbols, SYMBOLS)[:5]
    problem = flat_problem(
        student, weight, bias, labels, teacher, teacher_weight, teacher_bias, inputs,
        rule, scales, backend, ignore_index, max_workspace_bytes, later=later,
    )  # fmt: skip
    with device_of(student):
        result = backward(problem, coefs, Needs(*needs))
    d_weight, d_bias = result.d_weight, result.d_bias
    return (
        student.new_empty(0) if result.d_student is None else result.d_student.to(student.dtype),
        student.new_empty(0) if d_weight is None else d_weight.to(weight.dtype),
        student.new_empty(0) if d_bias is None else d_bias.to(bias.dtype),
    )


@distill_backward.register_fake
def _(
    student, weight, bias, labels, teacher, teacher_weight, teacher_bias, inputs,
    coefs, needs, later, rule, scales, backend, ignore_index, max_workspace_bytes, symbols=None,
):  # fmt: skip
    return (
        torch.empty_like(student) if needs[0] else student.new_empty(0),
        torch.empty_like(weight) if needs[1] else student.new_empty(0),
        torch.empty_like(bias) if needs[2] else student.new_empty(0),
    )


@distill_backward.register_vmap
def _(info, in_dims, *arguments):
    """One incoming gradient after the other, as jacrev asks for them."""
    flat, tree = tree_flatten(arguments)
    dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]
    found = []
    for i in range(info.batch_size):
        one = [v if dim is None else v.select(dim, i) for v, dim in zip(flat, dims, strict=True)]
        found.append(distill_backward(*tree_unflatten(one, tree)))
    return tuple(map(torch.stack, zip(*found, strict=True))), (0, 0, 0)


def _setup_context(ctx, inputs, output):
    (
        student, weight, bias, labels, teacher, teacher_weight, teacher_bias, row_inputs,
        loss_scale, needs, *settings, symbols,
    ) = inputs  # fmt: skip
    loss, token_loss, stats, coefs, d_student, d_weight, d_bias, sampled = output
    ctx.settings = settings[:6]  # a recomputing backward samples no ids
    ctx.formed = any(needs)
    ctx.set_materialize_grads(False)
    if ctx.formed:
        ctx.mark_non_differentiable(token_loss, stats, coefs, d_student, d_weight, d_bias, sampled)
        keep_gradients(ctx, needs, (student, weight, bias), (d_student, d_weight, d_bias), loss)
    else:
        ctx.mark_non_differentiable(coefs, d_student, d_weight, d_bias, sampled)
        ctx.save_for_backward(
            loss, student, weight, bias, labels, teacher, teacher_weight, teacher_bias, coefs,
            loss_scale, symbols, *row_inputs,
        )  # fmt: skip


def _backward(ctx, d_loss, d_token_loss, d_stats, *_):
    loss, *saved = ctx.saved_tensors  # once: a checkpoint hands out each of them a single time
    with torch.no_grad():
        if ctx.formed:
            gradients = kept_gradients(ctx, saved, d_loss)
        else:
            gradients = _recomputed(ctx, saved, d_loss, d_token_loss, d_stats)
    gradients = constants(gradients, loss)
    # A list in which no tensor is missing counts as one of tensors, and wants a list back.
    rest = [
        [None] * len(asks) if isinstance(asks, (list, tuple)) else None
        for asks in ctx.needs_input_grad[3:]
    ]
    return (*gradients, *rest)


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


def differentiable_distill(*arguments):
    """`distill`, inside of transforms and outside."""
    inside = not torch.compiler.is_compiling() and transforms.active()
    return _Distill.apply(*arguments) if inside else distill(*arguments)


class _Constant(torch.autograd.Function):
    """A gradient that cannot be differentiated. It hangs on the loss, and so on the loss's inputs:
    `once_differentiable` would leave it without a graph, and drop it from a sum that has one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient, loss):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "a fused loss can be differentiated once, its gradients are constants of the forward: "
            "use backend='reference' for second derivatives"
        )


def constants(gradients: list[Tensor | None], loss: Tensor) -> list[Tensor | None]:
    """The same, and under create_graph=True such as raise when they are differentiated."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _Constant.apply(g, loss) for g in gradients]


def _recomputed(ctx, saved, d_loss, d_token_loss, d_stats) -> list[Tensor | None]:
    student, weight, bias, labels, *rest = saved
    teacher, teacher_weight, teacher_bias, coefs, loss_scale, symbols, *row_inputs = rest
    needs = list(ctx.needs_input_grad[:3])
    carried = carry(coefs, loss_scale, d_loss, d_token_loss, d_stats)
    made = distill_backward(
        student, weight, bias, labels, teacher, teacher_weight, teacher_bias, row_inputs,
        carried, needs, *ctx.settings, symbols,
    )  # fmt: skip
    return [g if need else None for g, need in zip(made, needs, strict=True)]


def keep_gradients(ctx, needs, inputs, gradients, loss) -> None:
    """For a backward that only scales them, behind the loss among the saved tensors."""
    ctx.needs, ctx.dtypes = list(needs[:3]), [None if t is None else t.dtype for t in inputs]
    ctx.main_weight = inputs[1] if needs[3] else None
    ctx.save_for_backward(loss, *gradients)


def kept_gradients(ctx, saved, d_loss) -> list[Tensor | None]:
    """Of hidden states, weight and bias, times the incoming gradient."""
    gradients: list[Tensor | None] = [None, None, None]
    for i, (gradient, dtype) in enumerate(zip(saved, ctx.dtypes, strict=True)):
        if d_loss is None or not ctx.needs[i]:
            continue
        main = i == 1 and ctx.main_weight is not None and not transforms.batched(d_loss)
        if main and offers_main_grad(ctx.main_weight):
            gradients[i] = add_to_main_grad(ctx.main_weight, gradient, d_loss)
        else:
            gradients[i] = scaled(gradient, d_loss, dtype, last_use=not _graph_is_kept())
    return gradients


def weighed_losses(problem: Problem, result: Result) -> Tensor:
    """(N,): each token's loss times its weight."""
    token_loss = result.stats[Stat.TOKEN_LOSS].clone()
    if "token_weight" in problem.inputs:
        # Not a product alone: 0 * inf would be NaN.
        row_weight = problem.inputs["token_weight"].to(token_loss.dtype)
        nothing = (token_loss == 0) | (row_weight == 0)
        token_loss = torch.where(nothing, 0.0, token_loss * row_weight)
    return token_loss


def nothing_sampled(problem: Problem) -> Tensor:
    """(0,): what stands for `Sampled` where every id was seen."""
    return problem.labels.new_empty((0,), dtype=problem.dtype)


def carry(coefs, loss_scale, d_loss, d_token_loss, d_stats) -> Tensor:
    """Coefficients (Coef, N) times the incoming gradients."""
    incoming = coefs.new_zeros(coefs.shape[1:])
    if d_loss is not None:
        incoming = incoming + d_loss * loss_scale
    if d_token_loss is not None:
        incoming = incoming + d_token_loss
    weights = coefs[FIRST_WEIGHT:] * incoming
    # A row of infinite loss that nobody asked about is 0, not 0 * inf.
    weights = torch.where(incoming == 0, 0.0, weights)
    carried = torch.cat([coefs[:FIRST_WEIGHT], weights])
    if d_stats is not None:
        # d(log p(y))/dz = 1[v = y] - p and d(H)/dz = -p (log p + H)
        d_log_prob = d_stats[Stat.LOG_PROB]
        extra = dict.fromkeys((Coef.P, Coef.P_TOP_K, Coef.LABEL), -d_log_prob)
        extra[Coef.ENTROPY_WEIGHT] = d_stats[Stat.ENTROPY]
        nothing = torch.zeros_like(d_log_prob)  # stacked, as a batch of gradients allows no writing
        carried = carried + torch.stack([extra.get(row, nothing) for row in Coef])
    return carried


def _graph_is_kept() -> bool:
    """Whether another backward may come (`retain_graph=True`)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()


def flat_problem(
    student, weight, bias, labels, teacher, teacher_weight, teacher_bias, inputs,
    rule, scales, backend, ignore_index, max_workspace_bytes, shard=None, teacher_pieces=(),
    selection=EVERY_ID, later=(),
) -> Problem:  # fmt: skip
    scale, cap, teacher_scale, teacher_cap, temperature = scales
    # Per token they are read with unit stride.
    labels, bias, teacher_bias, *inputs = (
        None if t is None else t.contiguous() for t in (labels, bias, teacher_bias, *inputs)
    )
    # Both sides are cut to the ids they share, their biases too.
    sides = [(weight, student), (teacher_weight, teacher)]
    sizes = [w.shape[0] if w is not None else s.shape[-1] for w, s in sides if s is not None]
    v = min(sizes) if shard is None else shard.width
    return Problem(
        student=Side(student, weight, bias),
        teacher=None
        if teacher is None
        else Side(teacher, teacher_weight, teacher_bias, teacher_pieces),
        labels=labels,
        inputs={k: t for k, t in zip(INPUTS, inputs, strict=True) if t is not None},
        options=RowOptions(
            decode_rule(rule),
            LogitTransform(scale, cap or None, temperature, None if bias is None else bias[:v]),
            LogitTransform(
                teacher_scale,
                teacher_cap or None,
                temperature,
                None if teacher_bias is None else teacher_bias[:v],
            ),
            sharded=shard is not None,
        ),
        backend=backend,
        ignore_index=ignore_index,
        max_workspace_bytes=max_workspace_bytes,
        shard=shard,
        selection=selection,
        later=Needs(*later),
    )
