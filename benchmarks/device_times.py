"""How long a GPU takes for a call, whatever the host takes to launch it.

    times, how = device_times(call, repeats=7, device="cuda")

A launch costs the host tens of microseconds, which is more than a pass over few rows takes. So the
call is captured into a CUDA graph, whose replays are timed by events. What cannot be captured, for
instance since it waits for the GPU, is timed by events around calls in a row. On a CPU the clock
tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks.measure import Times, summary

#: Calls before the first that counts: kernels are compiled, cuBLAS gets its workspace.
WARMUP = 2


def device_times(
    call: Callable[[], object], repeats: int, device: str | torch.device
) -> tuple[Times, str]:
    """Seconds, and how they were taken: "graph", "events" or "clock"."""
    if torch.device(device).type != "cuda":
        call()
        return summary([_by_clock(call) for _ in range(repeats)]), "clock"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = _captured(call)
    run = call if graph is None else graph.replay
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    return summary(seconds), "events" if graph is None else "graph"


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()  # an error of the device itself comes up here
        return None
    return graph


def _by_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
