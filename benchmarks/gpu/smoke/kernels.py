"""Each Triton kernel against its twin in plain torch, which computes in float64 on the same logits.

The bound is four times the error that the twin makes in float32 on the same rows: gradients of the
Jensen-Shannon divergence, for one, are differences of numbers that nearly agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.smoke.sizes import Figures, Sizes, relative_error
from tropd_kernels import GKD, OPD, Divergence, LogitsTeacher, TopKJSD, TopKTeacher, TrOPD
from tropd_kernels import distillation_loss as loss_of
from tropd_kernels.backends import engine_for

TIMES = 4.0
#: Where the twin in float32 is lucky, or exact: some units in the last place.
LEAST = 2e-6
RULES = {
    "opd": OPD(), "reverse_kl": Divergence("reverse_kl"), "tropd": TrOPD(), "gkd": GKD(),
    "topk_jsd": TopKJSD(),
}  # fmt: skip
FIELDS = ("log_probs", "entropy", "teacher_entropy", "forward_kl", "reverse_kl",
          "teacher_topk_mass")  # fmt: skip
#: K of a teacher that gives its likeliest ids.
GIVEN = 64


def against_twin(name: str, parity: str) -> Callable[[Sizes, str], Figures]:
    """Loss, gradient and statistics, where many rows have a program each and where a few share."""

    def check(sizes: Sizes, device: str) -> Figures:
        found: Figures = {}
        for n in sizes.rows:
            z, t = 4 * torch.randn(2, n, sizes.vocab(parity), device=device)
            of_n = compared(name, z, t, min(n, sizes.twin_rows))
            found |= {f"{what}, {n} rows": pair for what, pair in of_n.items()}
        return found

    return check


def compared(name: str, z: Tensor, t: Tensor, rows: int) -> Figures:
    """The first `rows` of a call on all."""
    n = len(z)
    labels = torch.randint(z.shape[1], (n,), device=z.device)
    # A student sure of what its teacher would not write: a draw of almost 1 calls it an outlier.
    labels[::2] = z[::2].argmax(1)
    uniforms = torch.zeros(n, device=z.device)
    uniforms[::2] = 1 - 2**-20
    ours, d_ours, stats = call(name, z, t, labels, uniforms, "triton")
    exact, plain = (
        call(name, *(x[:rows].to(dtype) for x in (z, t)), labels[:rows],
             uniforms[:rows].to(dtype), "torch")
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    found = {
        what: (relative_error(mine[:rows], truth), bound(relative_error(twin, truth)))
        for what, mine, twin, truth in zip(("loss", "gradient"), (ours, d_ours), plain, exact)
    }
    for field in FIELDS:
        mine, twin, truth = (getattr(s, field) for s in (stats, plain[2], exact[2]))
        # Where a rule does not need it, a backend may leave it out.
        if mine is not None and (field != "forward_kl" or RULES[name].uses_forward_kl):
            found[field] = (furthest(mine[:rows], truth), bound(furthest(twin, truth)))
    return found


def bound(of_twin: float) -> float:
    return max(LEAST, TIMES * of_twin)


def call(name: str, z: Tensor, t: Tensor, labels: Tensor, uniforms: Tensor, backend: str):
    z = z.clone().requires_grad_()
    rule = RULES[name]
    teacher: LogitsTeacher | TopKTeacher = LogitsTeacher(t)
    if name == "topk_jsd":
        log_q = t.log_softmax(-1)
        top = log_q.topk(min(GIVEN, t.shape[1]))
        teacher = TopKTeacher(top.indices, top.values, log_q.gather(1, labels[:, None])[:, 0])
    drawn = {"uniforms": uniforms} if rule.gate == "bernoulli" else {}
    out = loss_of(
        z, labels, teacher, rule, backend=backend, reduction="none", ignore_index=None, **drawn
    )
    out.loss.sum().backward()
    return out.loss.detach(), z.grad, out.stats


def furthest(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to values above 1; NaN unless NaN are in the same places."""
    if not torch.equal(found.isnan(), exact.isnan()):
        return math.nan
    far = (found.double() - exact).abs() / exact.abs().clamp_min(1)
    return float(far.nan_to_num(0.0).max())


def column_sums(parity: str) -> Callable[[Sizes, str], Figures]:
    """What sampling asks of bf16 d_logits: sums in float32."""

    def check(sizes: Sizes, device: str) -> Figures:
        n, vocab_size = max(sizes.rows), sizes.vocab(parity)
        d_logits = torch.randn(n, vocab_size, device=device).to(torch.bfloat16)
        hidden = torch.rand(2, n, device=device)
        found = engine_for("triton").column_sums(d_logits, hidden)
        exact = engine_for("torch").column_sums(d_logits.double(), hidden.double())
        plain = engine_for("torch").column_sums(d_logits.float(), hidden)
        return {
            f"row {i}": (relative_error(found[i], exact[i]),
                         bound(relative_error(plain[i], exact[i])))
            for i in range(3)
        }  # fmt: skip

    return check
