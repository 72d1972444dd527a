"""Loads `_C`, the compiled part of `csrc/`: operators `torch.ops.tropd_native.*` for a CPU.

At import, once: `torch.compile` traces through the choice of a backend and sees constants.

TROPD_CPU=portable|avx2|avx512|amx limits the CPU's instruction sets in use, so that a test or a bug
report can represent a smaller machine. A cap above what the CPU has changes nothing. torch's
libraries have caps of their own: ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

#: What TROPD_CPU may say, in ascending order: no more than this is used of the CPU.
CAPS = ("portable", "avx2", "avx512", "amx")


def _cap() -> str:
    """The last of `CAPS` unless TROPD_CPU names another."""
    cap = os.environ.get("TROPD_CPU") or CAPS[-1]
    if cap not in CAPS:
        raise ValueError(f"TROPD_CPU must be one of {', '.join(CAPS)}, or unset; got {cap!r}")
    return cap


#: What TROPD_CPU said when this module was imported.
CAP = _cap()


def may_use(cap: str) -> bool:
    """Whether TROPD_CPU leaves these instructions in use; a CPU may lack them all the same."""
    return CAPS.index(cap) <= CAPS.index(CAP)


def _allowed(name: str) -> bool:
    """The same of csrc/'s instruction sets and products, by their names: "AVX-512", "AMX", ..."""
    plain = name.lower().replace("-", "")
    return may_use(next((cap for cap in CAPS if plain.startswith(cap)), "portable"))


#: Stands in the command below for a source that is not known.
ANY_SOURCE = "FOLDER_OR_SDIST_OF_THE_SOURCE"


def build_command() -> str:
    """The shell command that builds csrc/, from where this installation came."""
    root = Path(__file__).resolve().parents[1]
    source, editable = ANY_SOURCE, ""
    if (root / "csrc").is_dir() and (root / "setup.py").is_file():
        source, editable = shlex.quote(str(root)), "--editable "
    else:
        with suppress(PackageNotFoundError, ValueError):
            # Where pip had it from, unless from an index: pip's direct_url.json.
            origin = json.loads(distribution("tropd-kernels").read_text("direct_url.json") or "{}")
            url = urlsplit(origin.get("url", ""))
            if "vcs_info" in origin:
                vcs = origin["vcs_info"]
                source = shlex.quote(f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}")
            elif origin and not url.path.endswith(".whl"):
                local = url.scheme == "file"
                source = shlex.quote(url2pathname(url.path) if local else origin["url"])
    return (
        "pip install 'setuptools>=77' ninja && TROPD_BUILD_EXT=1 pip install --no-build-isolation "
        f"--no-deps --force-reinstall {editable}{source}"
    )


def _hidden_installation() -> Path | None:
    """An installation with csrc/ built, behind this source tree on the path."""
    here = Path(__file__).resolve().parent
    for found in distributions(name="tropd-kernels"):
        package = Path(str(found.locate_file("tropd_kernels"))).resolve()
        if package != here and any(package.glob("_C*")):
            return package
    return None


_advised = False


def advise_to_build() -> None:
    """Warns once a process, in the caller's line, that a call on a CPU could be faster."""
    global _advised
    if _advised or WHY_NOT is None or sys.platform == "win32" or torch.compiler.is_compiling():
        return
    _advised = True
    level, frame = 1, sys._getframe()
    passed = (f"{__package__}.", "torch.")
    while frame is not None and frame.f_globals.get("__name__", "").startswith(passed):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        'this call runs on the torch backend, and native would be faster on a CPU (backend="torch" '
        f"silences this warning): {WHY_NOT}",
        stacklevel=level,
    )


def _load() -> str | None:
    spec = find_spec("tropd_kernels._C")
    if spec is None or spec.origin is None:
        hidden, built_by = _hidden_installation(), build_command()
        if hidden is None:
            return f"csrc/ is not built in this installation; to build it: {built_by}"
        return (
            f"csrc/ is not built in {Path(__file__).resolve().parents[1]}, which comes before the "
            f"installation in {hidden}: run from another folder, or build it here: {built_by}"
        )
    try:
        torch.ops.load_library(spec.origin)
        best = next(filter(_allowed, torch.ops.tropd_native.instruction_sets()))
        torch.ops.tropd_native.use_instruction_set(best)
        products = next(filter(_allowed, torch.ops.tropd_native.products()), None)
        _ = torch.ops.tropd_native.generators  # a library built before there were names for them
        if products is not None:
            torch.ops.tropd_native.use_products(products)
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{spec.origin} does not load with torch {torch.__version__}: {error}"
    return None


#: Why the compiled operators cannot be used; None when they can.
WHY_NOT = _load()

#: Names of the generators of csrc/rows.h, by number.
GENERATORS: list[str] = torch.ops.tropd_native.generators() if WHY_NOT is None else []


def amx_in_hardware() -> bool:
    """The CPU has AMX's tiles for bf16, and TROPD_CPU leaves them in use."""
    return may_use("amx") and torch.cpu._is_amx_tile_supported()


def row_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with unit stride along rows that do not overlap, as csrc/ reads it."""
    overlap = matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]
    return matrix.contiguous() if overlap or matrix.stride(-1) != 1 else matrix


def instruction_sets() -> list[str]:
    """What the row kernels can run on here, best first; the first is in use."""
    return list(filter(_allowed, torch.ops.tropd_native.instruction_sets()))


def _bf16_products() -> list[str]:
    found = list(filter(_allowed, torch.ops.tropd_native.products())) if WHY_NOT is None else []
    # On AVX-512 without bf16, torch's float32 products of upcast tiles beat ours, which are AVX2's.
    if found[:1] == ["AVX2"] and "AVX-512" in instruction_sets():
        return []
    # Where AMX cannot be ours, by the compiler or the system, oneDNN's use of it beats AVX512-BF16.
    # A build for tests may emulate it.
    ours = any(name.startswith("AMX") for name in found)
    return found if ours or not amx_in_hardware() else []


#: The units on which bfloat16 products with float32 results are ours here, best first.
BF16_PRODUCTS = _bf16_products()


def description() -> str:
    """The instruction sets that are used unless a test asks for others."""
    products = f", products on {BF16_PRODUCTS[0]}" if BF16_PRODUCTS else ""
    capped = "" if may_use(CAPS[-1]) else f", capped by TROPD_CPU={CAP}"
    return f"rows on {instruction_sets()[0]}{products}{capped}"
