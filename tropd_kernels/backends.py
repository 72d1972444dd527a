"""Which row engines can run here, and why the others cannot."""

from __future__ import annotations

import importlib.util
import os

import torch

from . import native
from .dtypes import HALF
from .products import adds_to_wide_sums
from .rows.engine import RowEngine
from .rows.native_rows import NativeRows
from .rows.torch_rows import TorchRows
from .rows.triton_rows import TritonRows

ENGINES: dict[str, RowEngine] = {
    "torch": TorchRows(), "native": NativeRows(), "triton": TritonRows()
}  # fmt: skip
BACKENDS = ("reference", *ENGINES)


def available_backends(device: str | torch.device | None = None) -> dict[str, str]:
    """What each backend can do for tensors on `device` (default: a GPU if there is one).

    Returns {name: "available", with what it runs on, or the reason why not}, best first.

    Examples:
        >>> from tropd_kernels import available_backends
        >>> available_backends()['reference']
        'available'
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_type = torch.device(device).type
    on_cpu = _why_not_native(device_type)
    available = "available" + _refusals(torch.device(device))
    return {
        "triton": _why_not_triton(device_type) or available,
        "native": on_cpu or f"available ({native.description()})",
        "torch": available,
        "reference": "available",
    }


def choose_backend(requested: str | None, device: torch.device) -> str:
    """The backend to use. None takes the best one that runs natively on the device; one asked for
    by name that cannot run raises RuntimeError."""
    if requested is None:
        if device.type != "cpu" and _why_not_triton(device.type) is None:
            return "triton"
        return "native" if _why_not_native(device.type) is None else "torch"
    if requested not in BACKENDS:
        raise ValueError(
            f"backend must be None or one of {', '.join(map(repr, BACKENDS))}; got {requested!r}"
        )
    checks = {"triton": _why_not_triton, "native": _why_not_native}
    reason = checks[requested](device.type) if requested in checks else None
    if reason:
        raise RuntimeError(f"backend={requested!r} cannot run on {device.type} tensors: {reason}")
    return requested


def engine_for(backend: str) -> RowEngine:
    """The row engine of this backend, which need not be able to run here."""
    return ENGINES[backend]


def has_row_engine(backend: str | None) -> bool:
    """The chunk loop serves this backend; "reference" holds all logits, and its gradients are
    autograd's."""
    return backend != "reference"


def runs_triton(device: torch.device) -> bool:
    """Triton runs natively on the device, whatever backend a call takes."""
    return choose_backend(None, device) == "triton"


def _refusals(device: torch.device) -> str:
    """What torch's products do not do on this GPU, and what is done instead."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        refused = [dtype for dtype in HALF if not adds_to_wide_sums(device, dtype)]
    except RuntimeError as error:  # of a device that is full, busy or lost
        reason = str(error).strip().splitlines()[0][:120]
        return f" (a small product on this device failed: {reason})"
    if not refused:
        return ""
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in refused)
    return (
        f" (d_weight of {names} is added up in tiles: torch {torch.__version__} refuses "
        "torch.addmm with out_dtype on this device)"
    )


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


def _why_not_native(device_type: str) -> str | None:
    return native.WHY_NOT if device_type == "cpu" else "it runs on a CPU only"
