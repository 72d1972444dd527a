"""Tables and pictures of the experiments, in the page between two marks.

A verdict stands only where every seed of every arm has run. An experiment that is stopped when its
p-values please finds what is not there.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT, markdown
from benchmarks.learning.intervals import interval
from benchmarks.learning.measures import Claim, by_seed

from . import claims, plot
from .experiments import EXPERIMENTS
from .runs import RESULTS, Results

PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Renews the page's tables and the pictures beside the results."""
    blocks = []
    for experiment in EXPERIMENTS.values():
        found = Results(experiment, results)
        if any(found.compared(mismatch) for mismatch in experiment.mismatches):
            picture = results / f"{experiment.name}.png"
            plot.draw(found, picture)
            blocks.append(section(found, os.path.relpath(picture, page.parent)))
    text = page.read_text(encoding="utf-8")
    new = "\n\n".join([BEGIN, *blocks, END])
    page.write_text(text.replace(markdown.block(text, BEGIN, END), new), encoding="utf-8")


def section(results: Results, picture: str) -> str:
    experiment = results.experiment
    parts = [
        f"## Tables: {experiment.name}",
        head(results),
        f"![Curves over steps]({picture})",
    ]
    if experiment.claims:
        parts.append(claims_table(results))
    if experiment.looks:
        parts += [
            "Looked at, with Student's intervals and without a verdict:",
            looks_table(results),
        ]
    parts += [
        f"{experiment.outcome.name}, and the learning rate that each arm chose:",
        ends_table(results),
    ]
    return "\n\n".join(parts)


def head(results: Results) -> str:
    """What ran, on what."""
    experiment = results.experiment
    every = [record for m in experiment.mismatches for record in results.compared(m)]
    machines = sorted({record["hardware"] for record in results.records})
    versions = sorted({", ".join(f"{name} {number}" for name, number in record["versions"].items())
                       for record in results.records})  # fmt: skip
    hours = sum(record["seconds"] for record in results.records) / 3600
    whole = experiment.seeds * len(experiment.arms) * len(experiment.mismatches)
    return (
        f"`python -m benchmarks.evidence {experiment.name}`: {len(every)} of {whole} runs and "
        f"{len(results.records) - len(every)} to choose learning rates, {hours:.1f} hours of "
        f"processes of one thread. {'; '.join(machines)}; {'; '.join(versions)}."
    )


def is_whole(results: Results) -> bool:
    """Whether every seed of every arm has run."""
    return all(
        len(by_seed(results.compared(mismatch), arm)) == results.experiment.seeds
        for mismatch in results.experiment.mismatches
        for arm in results.experiment.arms
    )


def claims_table(results: Results) -> str:
    """One claim and mismatch a row."""
    experiment, whole = results.experiment, is_whole(results)
    found = differences(experiment.claims, results)
    p = [claims.sign_flip(values) if values else 1.0 for _, _, values in found]
    rows = []
    for (claim, mismatch, values), corrected in zip(found, claims.holm(p)):
        if whole:
            mean = interval(values).mean
            said = [f"{corrected:.2g}", claims.verdict(mean, corrected)]
        else:
            said = ["", f"{len(values)} of {experiment.seeds} seeds, no verdict"]
        rows.append([claim.text, mismatch, _interval(values), *said])
    return markdown.table(["claim", "mismatch", "difference", "p, corrected", "verdict"], rows)


def looks_table(results: Results) -> str:
    found = differences(results.experiment.looks, results)
    rows = [[claim.text, mismatch, _interval(values)] for claim, mismatch, values in found]
    return markdown.table(["difference", "mismatch", "mean and interval"], rows)


def ends_table(results: Results) -> str:
    """One arm a row, one mismatch a column."""
    experiment = results.experiment
    rows = []
    for arm in experiment.arms:
        cells = []
        for mismatch in experiment.mismatches:
            runs = by_seed(results.compared(mismatch), arm).values()
            rate = results.chosen(mismatch, arm)
            edge = " (the last tried)" if rate in experiment.beyond.values() else ""
            ends = _interval([experiment.outcome.measure(run) for run in runs])
            cells.append(f"{ends} at {rate:g}{edge}" if rate else "not run")
        rows.append([f"`{arm}`", *cells])
    return markdown.table(["arm", *experiment.mismatches], rows)


def differences(stated: Sequence[Claim], results: Results) -> list[tuple[Claim, str, list[float]]]:
    """Claim, mismatch and the differences of its seeds."""
    return [
        (claim, mismatch, claim.differences(results.compared(mismatch)))
        for claim in stated
        for mismatch in results.experiment.mismatches
    ]


def _interval(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    found = interval(values)
    digits = 2 if math.isnan(found.half) or max(abs(found.mean), found.half) < 10 else 1
    return found.text(digits)
