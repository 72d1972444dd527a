"""Column sums of d_logits, by which a sampled gradient chooses its ids (`loss/sampling`)."""

import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(
    d_logits, hidden, sums, n, vocab_size, row_stride, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i d^2, sum_i hidden[0, i] d^2 and sum_i hidden[1, i] d of BLOCK columns. Threads add up
    their sums after the last row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab_size
    square = tl.zeros((ROWS, BLOCK), ACC)
    spread = tl.zeros((ROWS, BLOCK), ACC)
    along = tl.zeros((ROWS, BLOCK), ACC)
    for low in range(0, n, ROWS):
        i = low + tl.arange(0, ROWS)
        here = i < n
        place = i.to(tl.int64)[:, None] * row_stride + at[None, :]
        d = tl.load(d_logits + place, mask=here[:, None] & inside[None, :], other=0.0).to(ACC)
        apart = tl.load(hidden + i, mask=here, other=0.0)
        mean = tl.load(hidden + n + i, mask=here, other=0.0)
        square += d * d
        spread += d * d * apart[:, None]
        along += d * mean[:, None]
    tl.store(sums + at, tl.sum(square, 0), mask=inside)
    tl.store(sums + vocab_size + at, tl.sum(spread, 0), mask=inside)
    tl.store(sums + 2 * vocab_size + at, tl.sum(along, 0), mask=inside)
