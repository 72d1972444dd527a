"""From one file a run to one file a mismatch, small enough to be kept with the code.

Gradient norm and entropy stay whole, because the report takes extremes and medians of them; the
other curves are thinned to every `THIN`th step, the last one included.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import cpu_name

from . import arms, models

THIN = 5
_RATE = "_lr"
SELECTION = "selection"
_WHOLE = ("grad_norm", "entropy")
_THINNED = ("loss", "trust_ratio", "reverse_kl", "reward_mean")
_SAME = ("mismatch", "steps", "learning_rate", "versions", "eval_steps", "hardware")


def collect(runs: Path, results: Path, steps: int, learning_rate: float) -> None:
    """Writes `results`/<mismatch>.json, the same with _lr<rate> for other learning rates,
    `results`/selection.json and `results`/sweep.json. What has no runs here keeps the file that it
    has."""
    results.mkdir(parents=True, exist_ok=True)
    groups = defaultdict(list)
    for path in sorted(runs.glob("*/*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["seed"] in arms.SWEEP_SEEDS:
            groups["sweep"].append(run)
        elif run["arm"] in arms.SELECTIONS:
            groups[SELECTION].append(run)
        elif run["steps"] == steps:
            rate = run["learning_rate"]
            same = rate == learning_rate
            groups[run["mismatch"] + ("" if same else f"{_RATE}{rate:g}")].append(run)
    for name, found in groups.items():
        common = {key: found[0].get(key) for key in _SAME}
        _write(results / f"{name}.json", common, map(_end if name == "sweep" else _compact, found))


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The collected files by name, in the order of `models.STUDENTS`; then the others."""
    order = [*models.STUDENTS, SELECTION, "sweep"]
    paths = sorted(results.glob("*.json"), key=lambda path: path.stem)
    paths.sort(key=lambda path: order.index(path.stem.split(_RATE)[0]))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def hardware() -> str:
    """The CPU's name, and how many cores there are."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def _compact(run: dict[str, Any]) -> dict[str, Any]:
    curves = run["curves"]
    kept = {name: _rounded(curves[name]) for name in _WHOLE}
    # The first step, before any update, says what the mismatch is.
    thin = [0, *range(THIN - 1, run["steps"], THIN)]
    kept |= {name: _rounded(curves[name][i] for i in thin) for name in _THINNED}
    return {
        "arm": run["arm"],
        "seed": run["seed"],
        "seconds": round(run["seconds"], 1),
        "accuracy": _rounded(run["accuracy"]),
        "notation": _rounded(run["notation"]),
        **kept,
    }


def _end(run: dict[str, Any]) -> dict[str, Any]:
    keys = ("arm", "seed", "learning_rate")
    return {key: run[key] for key in keys} | {"accuracy": _rounded(run["accuracy"])}


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.4g}") for value in values]


def _write(path: Path, common: dict[str, Any], runs: Iterable[dict[str, Any]]) -> None:
    """One run a line, so that a new run is one line of a diff."""
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    head = json.dumps(common)[:-1]
    path.write_text(f'{head}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
