"""The dtype of a benchmark that is told none: bfloat16 where the processor multiplies it.

    dtype, reason = default_dtype("cpu")
    f"{dtype_name(dtype)}: {reason}"       # one line for a heading

On a CPU without products of bfloat16 torch computes them by plain loops, some 50 times slower than
in float32, and a comparison there would be one of those loops.
"""

from __future__ import annotations

import platform

import torch

from tropd_kernels.native import amx_in_hardware
from tropd_kernels.products import bf16_in_hardware


def default_dtype(device: str | torch.device = "cpu") -> tuple[torch.dtype, str]:
    """(dtype, why). Known from the processor's and oneDNN's flags, not from a timing, so that the
    same command takes the same dtype on every day."""
    units = bf16_units(device)
    kind = "GPU" if torch.device(device).type == "cuda" else "CPU"
    if units:
        return torch.bfloat16, f"which this {kind} multiplies by {units}"
    return torch.float32, f"this {kind} does not multiply bfloat16 in hardware"


def bf16_units(device: str | torch.device = "cpu") -> str | None:
    """What torch multiplies bfloat16 by; None where it has nothing but plain loops."""
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "its tensor cores" if fast else None
    # Absent where torch was built without oneDNN. It follows ONEDNN_MAX_CPU_ISA, unlike the CPU's
    # own flags, and is true of AVX-512 without bf16, where oneDNN multiplies in float32.
    by_onednn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if by_onednn is None or not by_onednn():
        return None
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "Arm's bf16 instructions"
    if not bf16_in_hardware():
        return None
    return "AMX" if amx_in_hardware() else "AVX512-BF16"


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32"""
    return str(dtype).removeprefix("torch.")
