"""Runs one check; its record says whether it passed, with the figures and their bounds."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

import torch

from benchmarks import records
from benchmarks.gpu.smoke import CHECKS
from benchmarks.gpu.smoke.sizes import FULL, TINY, Figures, Sizes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("name", choices=CHECKS)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # before triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    try:
        figures = check(options.name)(TINY if options.tiny else FULL, device)
    except Exception as error:  # what torch or Triton refuses is a result
        traceback.print_exc()
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        records.emit(check=options.name, ok=False, reason=f"{type(error).__name__}: {text[:300]}")
        return records.RECORDED_FAILURE
    bad = [f"{name} {value:.2g}, at most {most:.2g}" for name, (value, most) in figures.items()
           if not value <= most]  # fmt: skip
    records.emit(
        check=options.name, ok=not bad, figures={k: value for k, (value, _) in figures.items()},
        **({"reason": "; ".join(bad)} if bad else {}),
    )  # fmt: skip
    return records.RECORDED_FAILURE if bad else 0


def check(name: str) -> Callable[[Sizes, str], Figures]:
    """A function of sizes and device that gives {what: (value, the most that it may be)}."""
    from benchmarks.gpu.smoke import calls, kernels, products

    kind, _, rest = name.partition("_")
    if kind == "loss":
        return calls.against_reference(rest)
    if kind == "kernels":
        return kernels.against_twin(*rest.rsplit("_", 1))
    if kind == "column":
        return kernels.column_sums(rest.removeprefix("sums_"))
    return getattr(calls if name in ("no_sync", "graph") else products, name)


if __name__ == "__main__":
    sys.exit(main())
