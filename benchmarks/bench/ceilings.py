"""Peak rates of the machine, in products and in copies: the roof of the roofline.

    ceilings("cpu", torch.float32)     {"flop_per_second": ..., "bytes_per_second": ...}

The probe takes about a second on any machine. Each of its two halves begins with a size that costs
next to nothing and takes larger ones while its `SECONDS` allow: a processor without products of a
dtype is 50 times slower there than another, and 2048 x 2048 x 2048 would take it minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import summary, synchronize

#: Of each half of the probe, once its smallest size has run.
SECONDS = 0.4
#: Runs whose median counts, where the time allows as many.
RUNS = 5


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Both halves of the roof, FLOP of a large product in `dtype` and bytes of a large copy."""
    return {
        "flop_per_second": flop_per_second(device, dtype),
        "bytes_per_second": bytes_per_second(device),
    }


def flop_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a square product in `dtype`."""
    largest = 8192 if _on_gpu(device) else 2048

    def product(size: int) -> Callable[[], object]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    return highest_rate(_sizes(64, largest, 2), lambda size: 2.0 * size**3, product, device)


def bytes_per_second(device: str) -> float:
    """Of a copy, each byte counted as it is read and as it is written."""
    largest = 2**25
    if _on_gpu(device):
        largest = min(2**30, torch.cuda.mem_get_info(device)[0] // 32)

    def copy(size: int) -> Callable[[], object]:
        # Not zeros: pages that were never written may all be the system's one page of zeros.
        source = torch.ones(size, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return highest_rate(_sizes(2**19, largest, 4), lambda size: 8.0 * size, copy, device)


def highest_rate(
    sizes: Sequence[int],
    work: Callable[[int], float],
    make: Callable[[int], Callable[[], object]],
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """work(size) a second, by the median of up to `RUNS` runs of make(size)(), at the largest of
    the sizes that `SECONDS` allow; they ascend."""

    def timed(call: Callable[[], object]) -> float:
        synchronize(device)
        start = clock()
        call()
        synchronize(device)
        return clock() - start

    size, call = sizes[0], make(sizes[0])
    timed(call)  # a first call loads what it needs
    end = clock() + SECONDS
    last = timed(call)
    for larger in sizes[1:]:
        # Its warm-up, and one run that counts.
        if clock() + 2 * last * work(larger) / work(size) > end:
            break
        size, call = larger, make(larger)
        timed(call)
        last = timed(call)
    runs = [last]
    while len(runs) < RUNS and clock() + last <= end:
        runs.append(timed(call))
    return work(size) / summary(runs).median


def _sizes(smallest: int, largest: int, factor: int) -> list[int]:
    found = [smallest]
    while found[-1] * factor <= largest:
        found.append(found[-1] * factor)
    return found


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"
