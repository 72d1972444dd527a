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
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{spec.origin} does not load with torch {torch.__version__}: {error}"
    return None


#: Why the compiled operators cannot be used; None when they can.
WHY_NOT = _load()
#: bfloat16 products with float32 results (AVX512-BF16).
HAS_BF16_PRODUCTS = WHY_NOT is None and bool(torch.ops.tropd_native.gemm_available())


def instruction_sets() -> list[str]:
    """What the row kernels can run on here, best first; the first is in use."""
    return list(torch.ops.tropd_native.instruction_sets())


def uses_bf16_products() -> bool:
    """Whether this CPU's bfloat16 products are ours. With AMX, oneDNN's bf16 mode has units that
    the AVX512-BF16 kernel does not use."""
    return HAS_BF16_PRODUCTS and not torch.cpu._is_amx_tile_supported()


def description() -> str:
    """The instruction sets in use."""
    products = ", products on AVX512-BF16" if uses_bf16_products() else ""
    return f"rows on {instruction_sets()[0]}{products}"
