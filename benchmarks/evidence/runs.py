"""Which runs an experiment needs next, and the file that keeps those that are done.

The file is results/<experiment>.jsonl, one run a line, in the order in which they ended. It is
kept with the code, so an experiment goes on where another machine left it.
"""

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from benchmarks.learning.arms import STEPS
from benchmarks.learning.measures import Result
from benchmarks.learning.run import Run

from .experiments import Experiment

RESULTS = Path(__file__).with_name("results")


class Results:
    """The records of one experiment, and the file that they are in."""

    def __init__(self, experiment: Experiment, folder: Path = RESULTS):
        self.experiment = experiment
        self.path = folder / f"{experiment.name}.jsonl"
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        whole, _, rest = text.rpartition("\n")
        if rest:  # a machine that stopped left half of a line
            self.path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self.records: list[Result] = [json.loads(line) for line in whole.splitlines()]

    def append(self, record: Result) -> None:
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def tried(self, mismatch: str, arm: str) -> dict[float, float]:
        """The outcome by learning rate, the mean over the choosing seeds; rates that all of them
        have tried."""
        choosing, outcome = self.experiment.choosing, self.experiment.outcome
        found = defaultdict(list)
        for record in self.records:
            chooses = record["seed"] in choosing
            if chooses and (record["mismatch"], record["arm"]) == (mismatch, arm):
                found[record["learning_rate"]].append(outcome.measure(record))
        return {
            rate: statistics.fmean(values)
            for rate, values in sorted(found.items())
            if len(values) == len(choosing)
        }

    def rates(self, mismatch: str, arm: str) -> tuple[float, ...]:
        """The rates that the arm tries, as far as they are known."""
        tried, rates = self.tried(mismatch, arm), self.experiment.rates
        if not set(rates) <= set(tried):
            return rates
        further = self.experiment.beyond.get(self._best({rate: tried[rate] for rate in rates}))
        return (*rates, further) if further else rates

    def chosen(self, mismatch: str, arm: str) -> float | None:
        """The arm's learning rate, the smaller of two equally good ones; None: not known yet."""
        tried = self.tried(mismatch, arm)
        if not set(self.rates(mismatch, arm)) <= set(tried):
            return None
        return self._best(tried)

    def compared(self, mismatch: str) -> list[Result]:
        """The runs of the experiment's seeds, each arm at the rate that it chose."""
        rates = {arm: self.chosen(mismatch, arm) for arm in self.experiment.arms}
        return [
            record
            for record in self.records
            if record["mismatch"] == mismatch
            and record["seed"] not in self.experiment.choosing
            and record["learning_rate"] == rates.get(record["arm"])
        ]

    def wanted(self) -> Iterator[Run]:
        """What could run now and has not: rates first, then seed by seed, so that an interrupted
        experiment has every arm equally often."""
        key = ("mismatch", "arm", "seed", "learning_rate")
        have = {tuple(record[name] for name in key) for record in self.records}
        experiment = self.experiment
        pairs = [(where, arm) for arm in experiment.arms for where in experiment.mismatches]
        for mismatch, arm in pairs:
            for seed in experiment.choosing:
                for rate in self.rates(mismatch, arm):
                    if (mismatch, arm, seed, rate) not in have:
                        yield Run(mismatch, arm, seed, STEPS, rate)
        for seed in range(1, experiment.seeds + 1):
            for mismatch, arm in pairs:
                chosen = self.chosen(mismatch, arm)
                if chosen is not None and (mismatch, arm, seed, chosen) not in have:
                    yield Run(mismatch, arm, seed, STEPS, chosen)

    def _best(self, tried: Mapping[float, float]) -> float:
        """The smallest rate of those whose outcome is the best but for rounding."""
        sign = self.experiment.outcome.sign
        best = max(sign * value for value in tried.values())
        return min(rate for rate, value in tried.items() if sign * value > best - 1e-9)


def run_all(results: Results, workers: int, cache: Path, hours: float) -> None:
    """Trains what is missing, at most `hours` long; each worker is a process of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    start, done = time.monotonic(), 0
    running: dict[Future, Run] = {}
    experiment = results.experiment
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while True:
            if time.monotonic() - start < 3600 * hours:
                for run in results.wanted():
                    if len(running) == workers:
                        break
                    if run not in running.values():
                        settings = experiment.arms[run.arm]
                        running[pool.submit(experiment.record_of, run, settings, cache)] = run
            if not running:
                return
            failed = None
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if future.exception() is not None:
                    failed = failed or future
                    continue
                results.append(future.result())
                done += 1
                seconds = time.monotonic() - start
                print(f"{done} in {seconds:.0f} s: {run.mismatch} {run.arm} {run.seed} "
                      f"{run.learning_rate:g}", flush=True)  # fmt: skip
            if failed:  # what others are at is kept before it is raised
                for future in wait(running).done:
                    if future.exception() is None:
                        results.append(future.result())
                failed.result()
