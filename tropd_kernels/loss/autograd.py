"""What the custom op and the sharded loss share of autograd.

For a scalar loss the gradients are formed in the forward. The backward only scales them, in the
final cast to the inputs' dtypes, by a tensor that the host never reads. Per-token losses and
statistics recompute: the backward multiplies the coefficients by the incoming gradients and
computes the logits again. The gradients are constants of the forward, so differentiating them
raises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import transforms
from ..dtypes import device_of
from ..rows.layout import FIRST_WEIGHT, Coef, Stat
from .loop import Result, forward
from .main_grad import add_to_main_grad, has_main_grad
from .problem import GradNeeds, Problem
from .scaling import scale_and_cast


def compute(problem: Problem) -> tuple[Tensor, Tensor, Result]:
    """The loss, the token losses (N,) times their weights, and the loop's other results, whose
    `report` is (0,) if no gradient was sampled."""
    with device_of(problem.student.source):
        result = forward(problem)
    if result.report is None:  # an op returns tensors only
        result.report = problem.labels.new_empty((0,), dtype=problem.dtype)
    token_loss = _weighted_losses(problem, result)
    return token_loss.sum() * problem.loss_scale, token_loss, result


def keep_gradients(
    ctx, needs: GradNeeds, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...],
    loss: Tensor,
) -> None:  # fmt: skip
    """Saves them after the loss, for a backward that only scales them."""
    ctx.needs, ctx.dtypes = needs[:3], [None if t is None else t.dtype for t in inputs]
    ctx.main_weight = inputs[1] if needs.fp32_weight else None
    ctx.save_for_backward(loss, *gradients)


def backward(
    ctx, recompute: Callable[..., list[Tensor | None]], *incoming: Tensor | None
) -> list[Tensor | None]:
    """Gradients of hidden states (or logits), weight and bias: those of the forward, or what
    `recompute` computes from the tensors saved after the loss. incoming: the gradients of loss,
    token losses and statistics."""
    loss, *saved = ctx.saved_tensors  # once: a checkpoint hands out each of them a single time
    with torch.no_grad():
        if ctx.formed:
            gradients = _finish_gradients(ctx, saved, incoming[0])
        else:
            gradients = recompute(ctx, saved, *incoming)
    return _forbid_second_backward(gradients, loss)


def _finish_gradients(ctx, saved: list[Tensor], d_loss: Tensor | None) -> list[Tensor | None]:
    """Of hidden states, weight and bias, times the incoming gradient."""
    gradients: list[Tensor | None] = [None, None, None]
    for i, (gradient, dtype) in enumerate(zip(saved, ctx.dtypes, strict=True)):
        if d_loss is None or not ctx.needs[i]:
            continue
        main = i == 1 and ctx.main_weight is not None and not transforms.batched(d_loss)
        if main and has_main_grad(ctx.main_weight):
            gradients[i] = add_to_main_grad(ctx.main_weight, gradient, d_loss)
        else:
            gradients[i] = scale_and_cast(gradient, d_loss, dtype, last_use=not _graph_is_kept())
    return gradients


def scale_coefs(
    coefs: Tensor,
    loss_scale: Tensor,
    d_loss: Tensor | None,
    d_token_loss: Tensor | None,
    d_stats: Tensor | None,
) -> Tensor:
    """Coefficients (Coef, N) times the incoming gradients."""
    incoming = coefs.new_zeros(coefs.shape[1:])
    if d_loss is not None:
        incoming = incoming + d_loss * loss_scale
    if d_token_loss is not None:
        incoming = incoming + d_token_loss
    weights = coefs[FIRST_WEIGHT:] * incoming
    # 0 * inf is 0 for a row of infinite loss whose gradient nobody asked for.
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


class _Constant(torch.autograd.Function):
    """A gradient that cannot be differentiated. It depends on the loss, and so on the loss's
    inputs: `once_differentiable` would give it no graph, and a sum with other terms would silently
    drop it."""

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


def _forbid_second_backward(gradients: list[Tensor | None], loss: Tensor) -> list[Tensor | None]:
    """The same gradients; under create_graph=True differentiating them raises."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _Constant.apply(g, loss) for g in gradients]


def _weighted_losses(problem: Problem, result: Result) -> Tensor:
    """(N,): each token's loss times its weight."""
    token_loss = result.stats[Stat.TOKEN_LOSS].clone()
    if problem.inputs.token_weight is not None:
        # A plain product would give NaN for 0 * inf.
        row_weight = problem.inputs.token_weight.to(token_loss.dtype)
        nothing = (token_loss == 0) | (row_weight == 0)
        token_loss = torch.where(nothing, 0.0, token_loss * row_weight)
    return token_loss


def _graph_is_kept() -> bool:
    """Whether another backward may come (`retain_graph=True`)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or asked()
