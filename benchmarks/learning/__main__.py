"""Command line: runs what is missing, one file a run, and writes the report.

python -m benchmarks.learning --mismatch near far --seeds 5 --workers 2
python -m benchmarks.learning --selection    on the tokens of the highest entropy alone
python -m benchmarks.learning --sweep        the learning rates that were tried
python -m benchmarks.learning --report-only
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks import ROOT

from . import arms, models
from .run import Run, pretrain, train_to_file

CACHE = ROOT / "build" / "learning"


def main(given: list[str] | None = None) -> int:
    options = _parse(given)
    if not options.report_only:
        runs = _planned(options)
        if options.sweep or options.selection:
            runs = _sweep() if options.sweep else _selection()
        run_all(runs, options.workers, CACHE)
    from . import report  # matplotlib, which a worker does not need

    report.write(CACHE / "runs", steps=options.steps, learning_rate=options.learning_rate)
    return 0


def _parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--mismatch", nargs="+", default=["near", "far"], choices=models.STUDENTS)
    parser.add_argument("--arms", nargs="+", default=list(arms.ARMS), choices=arms.ARMS)
    parser.add_argument("--seeds", type=int, default=5, help="1 to so many")
    parser.add_argument("--steps", type=int, default=arms.STEPS)
    parser.add_argument("--learning-rate", type=float, default=arms.LEARNING_RATE)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--sweep", action="store_true", help="the learning rates instead")
    parser.add_argument("--selection", action="store_true", help="shares of the tokens instead")
    parser.add_argument("--report-only", action="store_true")
    return parser.parse_args(given)


def _planned(options: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that an interrupted experiment has every arm equally often."""
    return [
        Run(mismatch, arm, seed, options.steps, options.learning_rate)
        for seed in range(1, options.seeds + 1)
        for mismatch in options.mismatch
        for arm in options.arms
    ]


def _selection() -> list[Run]:
    seeds = range(1, arms.SELECTION_SEEDS + 1)
    return [Run("far", arm, seed) for seed in seeds for arm in arms.SELECTIONS]


def _sweep() -> list[Run]:
    return [
        Run("far", arm, seed, arms.STEPS, rate)
        for seed in arms.SWEEP_SEEDS
        for rate in arms.SWEEP_RATES
        for arm in ("opd", "tropd")
    ]


def run_all(runs: list[Run], workers: int, cache: Path) -> None:
    """Trains what has no file yet; each worker is a process of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    missing = [run for run in runs if not run.path(cache / "runs").exists()]
    print(f"{len(runs)} runs, {len(missing)} missing", flush=True)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        # First the models that several runs share, or two workers would train the same one.
        needed = {(models.STUDENTS[run.mismatch], run.seed) for run in missing}
        needed |= {(models.TEACHERS[student.task], 0) for student, _ in needed}
        for future in [pool.submit(pretrain, *one, cache) for one in needed]:
            future.result()
        for done, future in enumerate(
            as_completed([pool.submit(train_to_file, run, cache) for run in missing]), 1
        ):
            name = future.result().relative_to(cache)
            print(f"{done}/{len(missing)} {name} {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
