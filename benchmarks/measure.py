"""Time, peak memory and machine: the basis of every figure that we publish.

    times = interleaved_times({"eager": eager, "fused": fused}, repeats=5)
    times["fused"].median, times["fused"].p20, times["fused"].p80    # seconds
    peak_memory(fused)                                               # bytes, above what was held
    interleaved_measurements({"eager": eager, "fused": fused}, 5)    # both
    machine()                                                        # {"cpu": …, "torch": …, …}

Times are of interleaved runs (a, b, a, b, …): what slows the machine for a while slows all of them.

Peak memory is a delta: what the call held at its worst moment, its outputs included, above what was
held before it. On a GPU the caching allocator counts every byte. On a CPU no allocator sees all of
it (oneDNN and C++ kernels allocate on their own), so resident memory counts, by the high-water mark
that Linux keeps; writing 5 to /proc/self/clear_refs starts that mark anew.

glibc blurs that figure both ways. Freed blocks that it keeps would hide the next call's need of
them, so they are handed back before (`malloc_trim`), and so is what our `native` backend keeps
(`tropd_kernels.buffers`): memory is read in runs of their own, and times are those of a loop that
has come to rest. Blocks below 32 MiB that the call itself frees
may stay resident until it ends, and count: read figures below some 100 MiB as upper bounds.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import ROOT
from tropd_kernels import buffers

Name = TypeVar("Name", bound=Hashable)

PACKAGES = (
    "tropd_kernels", "torch", "triton", "transformers", "trl", "liger_kernel", "fla_core",
    "cut_cross_entropy", "quack_kernels", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs: the median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def interleaved_times(
    functions: Mapping[Name, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[Name, Times]:
    """Times each function `repeats` times, in turn, after `warmup` uncounted runs of each."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: summary(runs) for name, runs in seconds.items()}


@dataclass(frozen=True)
class Measurement:
    """Times, and the peak of memory of one more run."""

    times: Times
    peak: int | None  # bytes, see `peak_memory`


def interleaved_measurements(
    functions: Mapping[Name, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[Name, Measurement]:
    """`interleaved_times`, then `peak_memory` of each."""
    times = interleaved_times(functions, repeats, warmup=warmup, device=device)
    return {
        name: Measurement(times[name], peak_memory(function, device=device))
        for name, function in functions.items()
    }


def peak_memory(
    function: Callable[[], object], *, device: torch.device | str = "cpu"
) -> int | None:
    """Bytes that `function` held at its worst moment, above what was held before it.

    What it returns is kept until the peak has been read, so outputs count. Run the function once
    before: a first call also loads code and starts threads. None where the high-water mark cannot
    be reset (anything but Linux).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before

    buffers.release()
    if not _reset_high_water_mark():
        return None
    before = _process_memory("VmRSS")
    result = function()
    peak = _process_memory("VmHWM")
    del result
    return max(0, peak - before)


def available_memory() -> int | None:
    """Bytes that could be taken without swapping, by the system's own estimate; None where it gives
    none (anything but Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """The hardware and the versions that a figure was measured with, as text to print with it."""
    facts = {
        "cpu": f"{cpu_name()}, {_usable_cores()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    }
    if memory := _total_memory():
        facts["memory"] = f"{memory / 2**30:.0f} GiB"
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hip, cuda = torch.version.hip, torch.version.cuda
        stack = f"ROCm {hip}" if hip else f"CUDA {cuda}"
        facts["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {stack}"
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        facts["commit"] = commit
    return facts


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: Sequence[float]) -> Times:
    found = torch.tensor(seconds, dtype=torch.float64)
    p20, median, p80 = found.quantile(found.new_tensor([0.2, 0.5, 0.8])).tolist()
    return Times(median=median, p20=p20, p80=p80)


def _reset_high_water_mark() -> bool:
    """Hands free heap memory back and starts VmHWM anew; False where the system cannot."""
    with contextlib.suppress(
        OSError, AttributeError, TypeError
    ):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        # Some sandboxes accept the write and do nothing: the mark must now be near what is held.
        return _process_memory("VmHWM") - _process_memory("VmRSS") < 2**23
    except OSError:
        return False


def _process_memory(field: str) -> int:
    """One line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores that this process may use: a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _commit() -> str | None:
    """The commit that was measured, marked when the tree had changes on top of it."""
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None
