"""Rates of the products that a call makes, by shape: what chunk sizes can hope for. A record each.

    python -m benchmarks.gpu.gemms

Most telling first, since it may be stopped: the headline's width with the plan's sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import records
from benchmarks.bench.ceilings import bytes_per_second
from benchmarks.bench.shapes import LLAMA3, QWEN3
from benchmarks.bench.timing import reason_of
from benchmarks.device_times import device_times
from benchmarks.dtypes import default_dtype
from benchmarks.measure import machine
from tropd_kernels import plan_chunks
from tropd_kernels.backends import engine_for
from tropd_kernels.products import products_for

#: (vocabulary, width, tokens of each product), in the order of what is worth knowing.
SHAPES = (
    (QWEN3, 2048, (512, 1024, 2048, 8192, 4096)), (QWEN3, 4096, (512, 1024, 2048, 8192)),
    (LLAMA3, 4096, (512, 1024, 2048, 8192)), (QWEN3, 1024, (512, 1024, 2048, 8192)),
)  # fmt: skip
TINY = ((512, 32, (8, 16)),)
#: Of the headline.
TOKENS = 8192
#: float32 logits of more tokens are never made at once.
MOST_LOGITS = 4096


@dataclass(frozen=True)
class Product:
    """flop, bytes: that it has to make, and move."""

    what: str
    flop: int
    bytes: int
    call: Callable[[], object]


def products(vocab: int, width: int, m: int, dtype: torch.dtype, device: str) -> Iterator[Product]:
    """One at a time, so that only its operands are held."""
    ours = products_for(engine_for("triton"), dtype, device)
    flop, size = 2 * m * vocab * width, dtype.itemsize
    weight = torch.randn(vocab, width, device=device).mul_(width**-0.5).to(dtype)
    hidden = torch.randn(m, width, device=device).to(dtype)
    operands = size * (vocab * width + m * width)
    if m <= MOST_LOGITS:
        logits = torch.empty(m, vocab, device=device)
        yield Product("logits", flop, operands + 4 * m * vocab,
                      lambda: ours.logits_into(logits, hidden, weight))  # fmt: skip
        del logits
    d = torch.randn(m, vocab, device=device).mul_(1e-3).to(ours.gradient_dtype)
    yield Product("d_hidden", flop, size * (vocab * width + m * vocab) + 4 * m * width,
                  lambda: ours.d_hidden(d, weight))  # fmt: skip
    read = size * (m * vocab + m * width)
    sums = torch.zeros(vocab, width, device=device)
    yield Product("d_weight", flop, read + 4 * vocab * width,
                  lambda: ours.d_weight(sums, d, hidden, None))  # fmt: skip
    yield Product("d_weight +=", flop, read + 8 * vocab * width,
                  lambda: ours.d_weight(sums, d, hidden, sums))  # fmt: skip
    if device == "cuda":
        rounded = torch.empty_like(weight)
        yield Product("d_weight, bf16", flop, read + size * vocab * width,
                      lambda: torch.mm(d.t(), hidden, out=rounded))  # fmt: skip
        yield Product("logits, bf16", flop, operands + size * m * vocab,
                      lambda: torch.mm(hidden, weight.t(), out=d))  # fmt: skip


def measure(shapes: Sequence[tuple], dtype: torch.dtype, device: str, repeats: int) -> None:
    for vocab, width, sizes in shapes:
        for m in sizes:
            found = products(vocab, width, m, dtype, device)
            product = None
            while True:
                shape = {"vocab": vocab, "width": width, "tokens": m}
                try:
                    product = next(found, None)
                    if product is None:
                        break
                    times, _ = device_times(product.call, repeats, device)
                except Exception as error:  # what is refused, or does not fit, is a result
                    records.emit(what=getattr(product, "what", "operands"), **shape,
                                 reason=reason_of(error))  # fmt: skip
                    break
                records.emit(
                    what=product.what, **shape, ms=1e3 * times.median,
                    tflops=product.flop / times.median / 1e12,
                    gbs=product.bytes / times.median / 1e9,
                )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.gemms", description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, _ = default_dtype(device)
    torch.empty(1, device=device)
    records.wait_for_turn()
    shapes = TINY if options.tiny else SHAPES
    vocab, width, _ = shapes[0]
    plan = plan_chunks(TOKENS, vocab, width, 2 * width, dtype=dtype, device=device)
    records.emit(what="plan", rows=plan.rows, super_rows=plan.super_rows)
    records.emit(what="copy", gbs=bytes_per_second(device) / 1e9, machine=machine(device))
    measure(shapes, dtype, device, 1 if options.tiny else 5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
