"""Command line: see the package."""

import argparse
import sys

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
    parser.add_argument("what", choices=[*EXPERIMENTS, "report"])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--hours", type=float, default=12.0, help="no run is started later")
    options = parser.parse_args(given)
    if options.what == "report":
        from . import report  # matplotlib, which a worker does not need

        report.write()
    else:
        run_all(Results(EXPERIMENTS[options.what]), options.workers, CACHE, options.hours)
    return 0


if __name__ == "__main__":
    sys.exit(main())
