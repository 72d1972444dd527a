"""The machine: one record, and a line for each thing that a reader of the figures has to know.

    python -m benchmarks.gpu.facts

A process of its own, like all jobs: a driver that hangs must not hang the call.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from typing import Any

from benchmarks import records
from benchmarks.gpu.jobs import Facts

MODULES = ("torch", "triton", "numpy", "pytest", "xdist", "transformers", "cupy", "cuda",
           "trl", "liger_kernel", "fla", "cut_cross_entropy", "quack", "datasets")  # fmt: skip
#: Bytes that the headline's inputs, gradients and eager PyTorch's logits take, about.
WANTED = 60 * 2**30
#: Of the memory, what others may hold before times are in doubt; the context itself takes some.
FREE = 0.95


def facts() -> Facts:
    others = _others()  # before this process is one of them
    found: Facts = {
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "modules": {name: _has(name) for name in MODULES},
        "nvcc": _nvcc(), "cc": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        "gpu": None,
    }  # fmt: skip
    try:
        import torch

        from benchmarks.measure import machine

        found["machine"] = machine("cuda" if torch.cuda.is_available() else "cpu")
        if torch.cuda.is_available():
            found["gpu"] = _gpu(torch) | {"others": others}
        elif torch.version.cuda is None and torch.version.hip is None:
            found["why_no_gpu"] = f"torch {torch.__version__} is built for CPUs"
        else:
            found["why_no_gpu"] = f"torch {torch.__version__} sees none"
    except Exception as error:  # a driver that does not fit, say: that is a fact
        found["why_no_gpu"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line for line in done.stdout.splitlines() if "release" in line), path)


def _gpu(torch: Any) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name, "vendor": "amd" if torch.version.hip else "nvidia",
        "capability": [properties.major, properties.minor], "total": total, "free": free,
        "processors": properties.multi_processor_count,
        "state": _smi("clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu", "gpu"),
    }  # fmt: skip


def _others() -> list[str]:
    """Processes that compute on the GPU; empty where none can be asked for."""
    return _smi("pid,used_memory", "compute-apps").splitlines()


def _smi(fields: str, of: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-{of}={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def warnings(found: Facts) -> list[str]:
    """A line for each thing that is missing, or puts the figures in doubt."""
    lines = []
    gpu, modules = found.get("gpu"), found.get("modules", {})
    if gpu is None:
        why = found.get("why_no_gpu") or "torch sees none"
        lines.append(f"no GPU: {why}; what needs one is skipped")
    else:
        lines += _of_gpu(gpu)
    if found.get("nvcc") is None:
        lines.append("nvcc: not found; nothing here needs it, kernels come as cubins or by Triton")
    if gpu and found.get("cc") is None:
        lines.append("no C compiler: Triton compiles its launcher with one, so expect no kernel")
    for name, loses in (
        ("cupy", "the cluster kernels are not launched"), ("pytest", "no test runs"),
        ("triton", "the backend is torch, and no kernel of ours runs"),
    ):  # fmt: skip
        if not modules.get(name):
            lines.append(f"{name}: not installed; {loses}")
    absent = [n for n in ("trl", "liger_kernel", "cut_cross_entropy") if not modules.get(n)]
    if absent:
        lines.append(
            f"baselines not installed: {', '.join(absent)}; `python -m benchmarks.gpu.prepare`, "
            "where there is a network, fetches them"
        )
    return lines


def _of_gpu(gpu: dict[str, Any]) -> list[str]:
    lines = []
    major, minor = gpu["capability"]
    gib = 2**30
    if gpu["vendor"] != "nvidia":
        lines.append(
            f"{gpu['name']} is AMD's: products with float32 results go by hipBLAS's slow path, and "
            "the cluster kernels are skipped"
        )
    elif (major, minor) < (8, 0):
        lines.append(
            f"{gpu['name']} is sm_{major}{minor}, older than sm_80: it multiplies no bf16, so "
            "times mean little and checks may fail"
        )
    if gpu["total"] < WANTED:
        lines.append(
            f"{gpu['name']} has {gpu['total'] / gib:.0f} GiB, of {WANTED / gib:.0f} that the "
            "headline takes with eager PyTorch: what does not fit says so"
        )
    if gpu["free"] < FREE * gpu["total"] or gpu["others"]:
        held = (gpu["total"] - gpu["free"]) / gib
        lines.append(
            f"{gpu['name']} is busy: {held:.1f} of {gpu['total'] / gib:.0f} GiB are held"
            + (f" by {len(gpu['others'])} processes" if gpu["others"] else "")
            + "; times will be too long"
        )
    return lines


def main() -> int:
    found = facts()
    records.emit(facts=found, warnings=warnings(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
