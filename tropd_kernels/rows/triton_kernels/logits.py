"""Logits of a row: tiles of them loaded, transformed, and reduced with running maxima.

A tile is (UNROLL, LANES). One thread holds whole columns of it, so a sum or a maximum over its
first axis needs no exchange between threads. Each lane keeps its own softmax, whose maximum moves
once per UNROLL ids, and lanes are joined at the end of the row. LANES consecutive ids are read at
once, 16 bytes by each thread.
"""

import triton
import triton.language as tl

from .constants import INF
from .exponential import _exp


@triton.jit
def _cap(z, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Scale, soft cap, temperature. tanh(x) = 2 sigmoid(2 x) - 1 saturates cleanly at both ends."""
    z = z * SCALE
    if CAP is not None:
        z = (2 / (1 + _exp(z * (-2 / CAP))) - 1) * CAP
    return z / TEMPERATURE


@triton.jit
def _load_logits(
    row_ptr, bias, cols, mask, ACC: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Transformed logits of one row at `cols`, -inf where masked: a soft cap would turn the -inf of
    a padded column into -cap, and a negative scale into inf."""
    if mask is None:
        z = tl.load(row_ptr + cols).to(ACC)
    else:
        z = tl.load(row_ptr + cols, mask=mask, other=-INF).to(ACC)
    if bias is not None:
        z += tl.load(bias + cols, mask=mask, other=None if mask is None else 0.0).to(ACC)
    z = _cap(z, SCALE, CAP, TEMPERATURE)
    if (mask is not None) and ((CAP is not None) or (SCALE < 0)):
        z = tl.where(mask, z, -INF)
    return z


@triton.jit
def _tile(start, UNROLL: tl.constexpr, LANES: tl.constexpr):
    """The ids of a tile."""
    down = tl.arange(0, UNROLL)[:, None] * LANES
    return start + down + tl.arange(0, LANES)[None, :]


@triton.jit
def _lowest(ACC: tl.constexpr):
    """The initial running maximum: the lowest finite number, which avoids inf - inf."""
    lowest: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    return lowest


@triton.jit
def _raise_to(top, new, GUARDED: tl.constexpr):
    """By how much the values in old sums shift, and their weights shrink, when the maximum rises
    from `top` to `new`."""
    shift = top - new
    return shift, tl.exp(shift) if GUARDED else _exp(shift)


@triton.jit
def _moved(total, mass, shift, shrink, GUARDED: tl.constexpr):
    """Sums of weight * value after values have moved by `shift` and weights have shrunk. GUARDED:
    as in `_weighed`."""
    moved = shrink * (total + shift * mass)
    if GUARDED:
        moved = tl.where(shrink > 0, moved, 0.0)
    return moved


@triton.jit
def _weighed(weight, value, GUARDED: tl.constexpr):
    """Sums over a tile's first axis. 0 * inf is 0 where GUARDED. Elsewhere it is NaN, which tells
    the end of the row that a guard is needed."""
    weighed = weight * value
    if GUARDED:
        weighed = tl.where(weight > 0, weighed, 0.0)
    return tl.sum(weighed, 0)


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
