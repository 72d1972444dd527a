"""Tables in Markdown, generated between two marks of the README, and the plots beside the data."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import markdown

from . import arms, collect, measures, plot
from .intervals import interval

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"

_COLUMNS: tuple[tuple[str, measures.Measure, int], ...] = (
    ("accuracy, end", measures.final_accuracy, 2),
    ("mean over training", measures.mean_accuracy, 2),
    ("norm, largest", measures.largest_norm, 1),
    ("median", measures.median_norm, 2),
    ("largest / median", measures.spike, 1),
    ("entropy, end", measures.final_entropy, 2),
    ("reverse KL, end", measures.final_kl, 2),
)


def write(
    runs: Path,
    results: Path = RESULTS,
    readme: Path = README,
    steps: int = arms.STEPS,
    learning_rate: float = arms.LEARNING_RATE,
) -> None:
    """Collects the runs into `results`, plots them there, and renews the README's tables."""
    collect.collect(runs, results, steps, learning_rate)
    data = collect.read(results)
    sweep, selection = (data.pop(name, None) for name in ("sweep", collect.SELECTION))
    blocks = []
    for name, mismatch in data.items():
        if _is_whole(mismatch):
            plot.draw(mismatch, results / f"{name}.png")
            picture = f"![Curves]({results.name}/{name}.png)"
            blocks.append("\n\n".join([f"### {name}", table(mismatch), picture]))
    if data:
        blocks.append("### Accuracy at the end, by mismatch\n\n" + accuracies(data))
        blocks.append("### Claims\n\n" + claims(data))
    if selection:
        blocks.append("### The tokens of the highest entropy\n\n" + selection_table(selection))
    if sweep:
        blocks.append("### Learning rates tried\n\n" + sweep_table(sweep))
    _insert(readme, "\n\n".join(blocks))


def table(mismatch: dict[str, Any]) -> str:
    """One arm a row, the best final accuracy first."""
    runs = mismatch["runs"]
    before = {run["seed"]: _before(run) for run in runs}  # the same for all arms of a seed
    present = [arm for arm in arms.ARMS if measures.by_seed(runs, arm)]
    present.sort(key=lambda arm: -measures.over_seeds(runs, arm, measures.final_accuracy).mean)
    seconds = [run["seconds"] for run in runs]
    head = (
        f"{len(before)} seeds, {mismatch['steps']} steps of {arms.BATCH} completions, learning "
        f"rate {mismatch['learning_rate']:g}. Before distillation the students' accuracy is "
        f"{interval(list(before.values())).text()}. {mismatch['hardware']}; {_versions(mismatch)}; "
        f"{sum(seconds) / 60:.0f} minutes of runs in all, {min(seconds):.0f} to "
        f"{max(seconds):.0f} s a run."
    )
    titles = ["arm", *[title for title, _, _ in _COLUMNS], "trust, first step → last"]
    rows = []
    for arm in present:
        cells = [measures.over_seeds(runs, arm, m).text(digits) for _, m, digits in _COLUMNS]
        rows.append([f"`{arm}`", *cells, _trust(runs, arm)])
    return f"{head}\n\n{markdown.table(titles, rows)}"


def accuracies(data: dict[str, dict[str, Any]]) -> str:
    """One arm a row, one mismatch a column; the first two rows say how far apart the two begin."""
    firsts = ("trust at the first step", measures.first_trust), ("accuracy before", _before)
    rows = []
    for title, measure in firsts:
        cells = [measures.over_seeds(m["runs"], "tropd", measure).text() for m in data.values()]
        rows.append([title, *cells])
    for arm in arms.ARMS:
        cells = [
            measures.over_seeds(m["runs"], arm, measures.final_accuracy).text()
            if measures.by_seed(m["runs"], arm)
            else "not run"
            for m in data.values()
        ]
        if set(cells) != {"not run"}:
            rows.append([f"`{arm}`", *cells])
    return markdown.table(["", *data], rows)


def claims(data: dict[str, dict[str, Any]]) -> str:
    """One claim a row: the difference seed by seed, and what it says, for each mismatch."""
    rows = []
    for claim in measures.CLAIMS:
        cells = []
        for mismatch in data.values():
            found = claim.differences(mismatch["runs"])
            if found:
                difference = interval(found)
                cells.append(f"{difference.text()} {measures.verdict(difference)}")
            else:
                cells.append("not run")
        rows.append([claim.text, *cells])
    return markdown.table(["claim", *data], rows)


def sweep_table(sweep: dict[str, Any]) -> str:
    """Final accuracies of the two arms by learning rate, a value for each seed, and their mean."""
    rows = []
    for rate in sorted({run["learning_rate"] for run in sweep["runs"]}):
        row, every = [f"{rate:g}"], []
        for arm in ("opd", "tropd"):
            ends = [
                run["accuracy"][-1]
                for run in sweep["runs"]
                if (run["arm"], run["learning_rate"]) == (arm, rate)
            ]
            row.append(", ".join(f"{end:.2f}" for end in ends))
            every += ends
        rows.append([*row, f"{sum(every) / len(every):.2f}"])
    titles = ["learning rate", "`opd`", "`tropd`", "mean of both"]
    head = f'Mismatch "{sweep["mismatch"]}", accuracy at the end.'
    return f"{head}\n\n{markdown.table(titles, rows)}"


def selection_table(selection: dict[str, Any]) -> str:
    """One share of the tokens a row."""
    runs, rows = selection["runs"], []
    for arm in arms.SELECTIONS:
        accuracy = measures.over_seeds(runs, arm, measures.final_accuracy)
        seconds = [run["seconds"] / selection["steps"] for run in runs if run["arm"] == arm]
        rows.append([arm, accuracy.text(), f"{median(seconds):.3f} s"])
    head = (
        f'Mismatch "{selection["mismatch"]}", {len({run["seed"] for run in runs})} seeds, '
        f"{selection['steps']} steps. {selection['hardware']}; {_versions(selection)}."
    )
    return f"{head}\n\n{markdown.table(['', 'accuracy, end', 'a step, median'], rows)}"


def _is_whole(mismatch: dict[str, Any]) -> bool:
    """Whether most arms ran, so that a table and a plot of its own are worth the room."""
    return 2 * len({run["arm"] for run in mismatch["runs"]}) > len(arms.ARMS)


def _before(run: measures.Result) -> float:
    return run["accuracy"][0]


def _trust(runs: list[measures.Result], arm: str) -> str:
    ends = [measures.over_seeds(runs, arm, m) for m in (measures.first_trust, measures.final_trust)]
    if all(end.mean == 1.0 for end in ends):
        return "no gate"
    return " → ".join(f"{end.mean:.2f}" for end in ends)


def _versions(mismatch: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in mismatch["versions"].items())


def _insert(readme: Path, text: str) -> None:
    """Replaces what is between the marks; a README without them is an error, but none at all is
    made."""
    page = readme.read_text(encoding="utf-8") if readme.exists() else f"{BEGIN}\n{END}\n"
    old, new = markdown.block(page, BEGIN, END), f"{BEGIN}\n\n{text}\n\n{END}"
    readme.write_text(page.replace(old, new), encoding="utf-8")
