"""Command line: see the package."""

import argparse
import sys
import time

from benchmarks.learning.__main__ import CACHE

from . import __doc__ as about
from .experiments import EXPERIMENTS
from .runs import Results, run_all


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=[*EXPERIMENTS, "all", "report"])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--hours", type=float, default=12.0, help="no run is started later")
    options = parser.parse_args(given)
    start = time.monotonic()
    for name, experiment in EXPERIMENTS.items():
        if options.what in (name, "all"):
            hours = options.hours - (time.monotonic() - start) / 3600
            run_all(Results(experiment), options.workers, CACHE, hours)
    if options.what in ("report", "all"):
        from . import report  # matplotlib, which a worker does not need

        report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
