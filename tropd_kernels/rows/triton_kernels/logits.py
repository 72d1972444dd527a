"""Logits of a row: loaded, transformed, and reduced with a running maximum."""

import triton
import triton.language as tl

from .constants import INF


@triton.jit
def _cap(z, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Scale, soft cap, temperature. tanh(x) = 2 sigmoid(2 x) - 1 saturates cleanly at both ends."""
    z = z * SCALE
    if CAP is not None:
        z = (2 / (1 + tl.exp(z * (-2 / CAP))) - 1) * CAP
    return z / TEMPERATURE


@triton.jit
def _load_logits(
    row_ptr, bias, cols, mask, ACC: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Transformed logits of one row at `cols`, -inf where masked: a padded column must not look
    like a logit of 0, and a soft cap would lift it to -cap."""
    z = tl.load(row_ptr + cols, mask=mask, other=0.0).to(ACC)
    if bias is not None:
        z += tl.load(bias + cols, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, _cap(z, SCALE, CAP, TEMPERATURE), -INF)


@triton.jit
def _rescale(top, z):
    """New running maximum, and what the old sums shift and shrink by. 0 stands in for a maximum of
    -inf, so that nothing is ever inf - inf."""
    new = tl.maximum(top, tl.max(z, 0))
    base = tl.where(new == -INF, 0.0, new)
    shift = tl.where(top == -INF, 0.0, top - base)
    shrink = tl.where(top == -INF, 0.0, tl.exp(shift))
    return new, base, shift, shrink


@triton.jit
def _moment(total, mass, shift, shrink, weight, value):
    """A running sum of weight * value, whose values all move by `shift` when the maximum does."""
    carried = tl.where(shrink > 0, shrink * (total + shift * mass), 0.0)
    return carried + tl.where(weight > 0, weight * value, 0.0)


@triton.jit
def _at(
    row_ptr, bias, col, ACC: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """One transformed logit of a row."""
    z = tl.load(row_ptr + col).to(ACC)
    if bias is not None:
        z += tl.load(bias + col).to(ACC)
    return _cap(z, SCALE, CAP, TEMPERATURE)
