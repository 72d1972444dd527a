"""The kernels, for Triton >= 3.8. A row is a part of A ids, a power of two, and one of at most B.

Sums and maxima over a part go through all programs of the cluster, so each of them knows the row's.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp(x):
    """A product and one more instruction: underflow gives 0, for which `tl.exp` takes four. The
    package's own asks Triton's driver for the GPU, and where these are compiled there is none."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _load(row, offsets, vocab_size):
    """Padding is so low that it has no part in any sum, and finite, for differences of it."""
    return tl.load(row + offsets, mask=offsets < vocab_size, other=-1e30)


@triton.jit
def k1_once(
    student, labels, teacher_log_probs, d_logits, stats, vocab_size, student_stride,
    d_logits_stride, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """d_logits = r (p - 1[v = y]) with r = log q_y - log p_y; stats (n, 2): log p_y and H(p)."""
    i = tl.program_id(0).to(tl.int64)
    first, second = tl.arange(0, A), A + tl.arange(0, B)
    row = student + i * student_stride
    z0, z1 = tl.load(row + first), _load(row, second, vocab_size)
    label = tl.load(labels + i)
    most = tl.maximum(tl.max(z0, 0), tl.max(z1, 0))
    e0, e1 = _exp(z0 - most), _exp(z1 - most)
    total = tl.sum(e0, 0) + tl.sum(e1, 0)
    moment = tl.sum(e0 * (z0 - most), 0) + tl.sum(e1 * (z1 - most), 0)
    log_total = tl.log(total)
    log_p = tl.load(row + label) - most - log_total
    reward = tl.load(teacher_log_probs + i) - log_p
    tl.store(stats + 2 * i, log_p)
    tl.store(stats + 2 * i + 1, log_total - moment / total)
    out, c = d_logits + i * d_logits_stride, reward / total
    tl.store(out + first, (e0 * c - tl.where(first == label, reward, 0.0)).to(tl.bfloat16))
    tl.store(
        out + second, (e1 * c - tl.where(second == label, reward, 0.0)).to(tl.bfloat16),
        mask=second < vocab_size,
    )  # fmt: skip


@triton.jit
def _log_ratios(z, most_z, log_z, t, most_t, log_t):
    """p, p (lp - lm) and q (lq - lm), where m is the mean of p and q."""
    lp, lq = (z - most_z) - log_z, (t - most_t) - log_t
    p, q = _exp(lp), _exp(lq)
    lm = tl.log2(tl.maximum(0.5 * (p + q), 1.2e-38)) * LN_2
    return p, p * (lp - lm), q * (lq - lm)


@triton.jit
def jsd_once(
    student, teacher, d_logits, loss, vocab_size, student_stride, teacher_stride,
    d_logits_stride, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Loss (n,) of the Jensen-Shannon divergence, beta 0.5, and its d_logits."""
    i = tl.program_id(0).to(tl.int64)
    first, second = tl.arange(0, A), A + tl.arange(0, B)
    row, teacher_row = student + i * student_stride, teacher + i * teacher_stride
    z0, z1 = tl.load(row + first), _load(row, second, vocab_size)
    t0, t1 = tl.load(teacher_row + first), _load(teacher_row, second, vocab_size)
    most_z = tl.maximum(tl.max(z0, 0), tl.max(z1, 0))
    most_t = tl.maximum(tl.max(t0, 0), tl.max(t1, 0))
    log_z = tl.log(tl.sum(_exp(z0 - most_z), 0) + tl.sum(_exp(z1 - most_z), 0))
    log_t = tl.log(tl.sum(_exp(t0 - most_t), 0) + tl.sum(_exp(t1 - most_t), 0))
    p0, a0, b0 = _log_ratios(z0, most_z, log_z, t0, most_t, log_t)
    p1, a1, b1 = _log_ratios(z1, most_z, log_z, t1, most_t, log_t)
    of_p = tl.sum(a0, 0) + tl.sum(a1, 0)
    tl.store(loss + i, 0.5 * (of_p + tl.sum(b0, 0) + tl.sum(b1, 0)))
    out = d_logits + i * d_logits_stride
    tl.store(out + first, (0.5 * (a0 - p0 * of_p)).to(tl.bfloat16))
    tl.store(out + second, (0.5 * (a1 - p1 * of_p)).to(tl.bfloat16), mask=second < vocab_size)


FLOATS, HALVES, IDS, SIZE = "*fp32", "*bf16", "*i64", "i32"
#: The types of their arguments, in order.
SIGNATURES = {
    "k1_once": {
        "student": FLOATS, "labels": IDS, "teacher_log_probs": FLOATS, "d_logits": HALVES,
        "stats": FLOATS, "vocab_size": SIZE, "student_stride": SIZE, "d_logits_stride": SIZE,
    },
    "jsd_once": {
        "student": FLOATS, "teacher": FLOATS, "d_logits": HALVES, "loss": FLOATS,
        "vocab_size": SIZE, "student_stride": SIZE, "teacher_stride": SIZE,
        "d_logits_stride": SIZE,
    },
}  # fmt: skip
KERNELS = {"k1_once": k1_once, "jsd_once": jsd_once}
