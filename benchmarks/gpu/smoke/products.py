"""Products of bf16 whose result is float32, against float64.

The sums have a bound of a tenth of what rounding them to bf16 would cost (1.1e-3 of their norm);
where they are rounded, of twice that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.smoke.sizes import Figures, Sizes, relative_error
from tropd_kernels.backends import engine_for
from tropd_kernels.products import products_for

BOUND, ROUNDED_BOUND = 1.1e-4, 2e-3


def operands(sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """d_logits (n, V), hidden (n, H), head (V, H)."""
    shapes = ((sizes.tokens, sizes.odd), (sizes.tokens, sizes.hidden), (sizes.odd, sizes.hidden))
    return tuple(torch.randn(shape, device=device).to(sizes.dtype) for shape in shapes)


def mm(sizes: Sizes, device: str) -> Figures:
    _, hidden, head = operands(sizes, device)
    out = torch.full((sizes.tokens, sizes.odd), float("nan"), device=device)
    torch.mm(hidden, head.t(), out_dtype=torch.float32, out=out)
    return {"error": (relative_error(out, hidden.double() @ head.double().t()), BOUND)}


def addmm(sizes: Sizes, device: str) -> Figures:
    d_logits, hidden, _ = operands(sizes, device)
    sums = torch.randn(sizes.odd, sizes.hidden, device=device)
    exact = sums.double() + d_logits.double().t() @ hidden.double()
    out = torch.addmm(sums, d_logits.t(), hidden, out_dtype=torch.float32)
    return {"error": (relative_error(out, exact), BOUND)}


def addmm_into_itself(sizes: Sizes, device: str) -> Figures:
    """As d_weight adds up; refused by torch up to 2.9."""
    d_logits, hidden, _ = operands(sizes, device)
    sums = torch.randn(sizes.odd, sizes.hidden, device=device)
    exact = sums.double() + d_logits.double().t() @ hidden.double()
    torch.addmm(sums, d_logits.t(), hidden, out_dtype=torch.float32, out=sums)
    return {"error": (relative_error(sums, exact), BOUND)}


def products(sizes: Sizes, device: str) -> Figures:
    """Those that the package makes, whatever torch refuses, of rows as long as it makes them."""
    d_logits, hidden, head = operands(sizes, device)
    ours = products_for(engine_for("triton"), sizes.dtype, device)
    wide = dict(dtype=ours.result_dtype, device=device)
    shape = (sizes.tokens, ours.row_stride(sizes.odd))
    logits = torch.empty(shape, **wide)[:, : sizes.odd]
    d_logits = d_logits.new_empty(shape)[:, : sizes.odd].copy_(d_logits)
    ours.logits_into(logits, hidden, head)
    d_hidden = ours.d_hidden(d_logits, head)
    sums = torch.empty(sizes.odd, sizes.hidden, **wide)
    ours.d_weight(sums, d_logits, hidden, None)
    ours.d_weight(sums, d_logits, hidden, sums)
    d, x, w = d_logits.double(), hidden.double(), head.double()
    found = {
        "logits": (relative_error(logits, x @ w.t()), BOUND),
        "d_hidden": (relative_error(d_hidden, d @ w), BOUND),
        "d_weight, added twice": (relative_error(sums, 2 * d.t() @ x), BOUND),
    }
    if ours.rounds_d_weight:
        rounded = torch.empty_like(head)
        ours.d_weight(rounded, d_logits, hidden, None)
        found["d_weight, rounded"] = relative_error(rounded, d.t() @ x), ROUNDED_BOUND
    return found
