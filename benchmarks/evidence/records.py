"""What is kept of one run, as a line of an experiment's file."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.learning.measures import Result
from benchmarks.learning.run import EVERY, Run, train
from tropd_kernels.trainer import TrOPDTrainer

#: A share of 256 held-out problems is exact in so many digits.
DIGITS = 8


def record_of(
    run: Run,
    arm: Mapping[str, Any],
    cache: Path,
    trainer: type[TrOPDTrainer] = TrOPDTrainer,
) -> Result:
    """One run on the tasks of `benchmarks.learning`."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = train(run, cache / "models", arm, trainer)
    curves = found["curves"]
    norms = curves["grad_norm"]
    return named(
        run,
        {
            "accuracy": found["accuracy"],
            "notation": found["notation"],
            "largest_norm": max(norms),
            "median_norm": statistics.median(norms),
            "entropy": statistics.fmean(curves["entropy"]),
            "trust": curves["trust_ratio"][:1] + curves["trust_ratio"][EVERY - 1 :: EVERY],
            "topk_mass": [curves[f"{side}_topk_mass"][-1] for side in ("teacher", "student")],
            "reverse_kl": curves["reverse_kl"][-1],
            "forward_kl": curves["forward_kl"][-1],
            "seconds": found["seconds"],
            "hardware": found["hardware"],
            "versions": found["versions"],
        },
    )


def named(run: Run, found: Result) -> Result:
    """With what tells the run from others, and numbers to `DIGITS` digits."""
    which = {
        "mismatch": run.mismatch,
        "arm": run.arm,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
    }
    return {name: rounded(value) for name, value in (which | found).items()}


def rounded(value: Any) -> Any:
    """Numbers to `DIGITS` digits, also within a list."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
