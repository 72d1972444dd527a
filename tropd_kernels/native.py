"""Loads `_C`, the compiled part of `csrc/`: operators `torch.ops.tropd_native.*` for a CPU.

At import, once: `torch.compile` traces through the choice of a backend and sees constants.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def _load() -> str | None:
    spec = find_spec("tropd_kernels._C")
    if spec is None or spec.origin is None:
        return (
            "csrc/ is not built in this installation; TROPD_BUILD_EXT=1 pip install "
            "--no-build-isolation builds it, or says what is missing"
        )
    try:
        torch.ops.load_library(spec.origin)
        torch.ops.tropd_native.instruction_sets()
        torch.ops.tropd_native.products()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{spec.origin} does not load with torch {torch.__version__}: {error}"
    return None


#: Why the compiled operators cannot be used; None when they can.
WHY_NOT = _load()


def _bf16_products() -> list[str]:
    found = list(torch.ops.tropd_native.products()) if WHY_NOT is None else []
    # Where AMX cannot be ours, by the compiler or the system, oneDNN's use of it beats AVX512-BF16.
    # A build for tests may emulate it.
    ours = any(name.startswith("AMX") for name in found)
    return found if ours or not torch.cpu._is_amx_tile_supported() else []


#: The units on which bfloat16 products with float32 results are ours here, best first.
BF16_PRODUCTS = _bf16_products()


def plain_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with unit stride along rows that do not overlap, as csrc/ reads it."""
    overlap = matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]
    return matrix.contiguous() if overlap or matrix.stride(-1) != 1 else matrix


def instruction_sets() -> list[str]:
    """What the row kernels can run on here, best first; the first is in use."""
    return list(torch.ops.tropd_native.instruction_sets())


def description() -> str:
    """The instruction sets that are used unless a test asks for others."""
    products = f", products on {BF16_PRODUCTS[0]}" if BF16_PRODUCTS else ""
    return f"rows on {instruction_sets()[0]}{products}"
