"""How long a GPU takes for a call, without the host's time to launch it.

    times, how = device_times(call, repeats=7, device="cuda")

A launch costs the host tens of microseconds, which is more than a pass over few rows takes. So the
call is captured into a CUDA graph, whose replays are timed by events. A call that cannot be
captured, for instance since it waits for the GPU, is timed by events around consecutive calls. On a
CPU the clock is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch

from benchmarks.measure import Times, summary

T = TypeVar("T")

#: Calls before the first that counts: kernels are compiled, cuBLAS gets its workspace.
WARMUP = 2


def device_times(
    call: Callable[[], object], repeats: int, device: str | torch.device
) -> tuple[Times, str]:
    """Seconds, and how they were taken: "graph", "events" or "clock"."""
    if torch.device(device).type != "cuda":
        call()
        return summary([_by_clock(call) for _ in range(repeats)]), "clock"
    try:
        run, how = capture(call)[0].replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()  # an error of the device itself comes up here
        run, how = call, "events"
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    return summary(seconds), how


def capture(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of one call, and the tensors that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def _by_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
