"""Which row engines can run here, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("reference", "torch", "triton")


def available_backends(device: str | torch.device | None = None) -> dict[str, str]:
    """What each backend can do for tensors on `device` (default: a GPU if there is one).

    Returns {name: "available" or the reason why not}, best first.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _why_not_triton(torch.device(device).type)
    return {"triton": reason or "available", "torch": "available", "reference": "available"}


def choose_backend(requested: str | None, device: torch.device) -> str:
    """The backend to use. None takes the best one that runs natively on the device; one asked for
    by name that cannot run raises RuntimeError."""
    if requested is None:
        native = device.type != "cpu" and _why_not_triton(device.type) is None
        return "triton" if native else "torch"
    if requested not in BACKENDS:
        raise ValueError(
            f"backend must be None or one of {', '.join(map(repr, BACKENDS))}; got {requested!r}"
        )
    if requested == "triton":
        reason = _why_not_triton(device.type)
        if reason:
            raise RuntimeError(f"backend='triton' cannot run on {device.type} tensors: {reason}")
    return requested


def engine_for(backend: str) -> ModuleType:
    """The module that implements the row engine's interface (see `rows`)."""
    return importlib.import_module(f"tropd_kernels.rows.{backend}_rows")


def _why_not_triton(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device_type == "cuda":  # AMD GPUs are "cuda" to torch, too
        return None
    if device_type != "cpu":
        return f"no Triton kernels for {device_type}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton needs a GPU; on a CPU only its interpreter runs, for tests: set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    return None
