"""`python -m examples.train.show FOLDER ...`: what finished runs of `tropd train` logged.

Writes each run's log.jsonl, a line for each log, into its folder, draws the runs side by side in
training.png in the folder above the first, and prints what became of the reverse KL.
"""

import json
import sys
from pathlib import Path

#: What is drawn: the metric, and what it is.
DRAWN = {
    "tropd/reverse_kl": "KL(student || teacher), nats a token: should fall",
    "tropd/trust_ratio": "trust ratio: should rise",
    "loss": "loss: a surrogate, whose value says little",
}
LOG = "trainer_state.json"


def main(arguments: list[str] | None = None) -> int:
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    missing = [folder for folder in folders if not (folder / LOG).is_file()]
    if missing or not folders:
        what = f"no {LOG} in {missing[0]}: train first" if missing else "give folders of runs"
        print(f"show: {what}", file=sys.stderr)
        return 2
    logs = {folder: read(folder) for folder in folders}
    for folder, entries in logs.items():
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / "log.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / 'log.jsonl'}: {verdict(entries)}")
    picture = folders[0].parent / "training.png"
    draw({folder.name: entries for folder, entries in logs.items()}, picture)
    print(picture)
    return 0


def read(folder: Path) -> list[dict[str, float]]:
    """The logs of training steps, in order."""
    history = json.loads((folder / LOG).read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def verdict(entries: list[dict[str, float]]) -> str:
    """The first and the last reverse KL, whatever they are."""
    known = [(e["step"], e["tropd/reverse_kl"]) for e in entries if "tropd/reverse_kl" in e]
    if not known:
        return f"{len(entries)} logs, none of them with a tropd/reverse_kl"
    (first, before), (last, after) = known[0], known[-1]
    return f"tropd/reverse_kl {before:.3f} at step {first}, {after:.3f} at step {last}"


def draw(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """A panel for each metric, a curve for each run that has it."""
    import matplotlib

    matplotlib.use("Agg")  # writes files; needs no display
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(DRAWN), figsize=(13, 3.6), dpi=150, layout="constrained")
    for axes, (metric, title) in zip(panels, DRAWN.items()):
        for name, entries in runs.items():
            known = [(e["step"], e[metric]) for e in entries if metric in e]
            axes.plot([x for x, _ in known], [y for _, y in known], marker=".", label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    panels[0].set_ylim(0)
    panels[1].set_ylim(0, 1)
    panels[0].legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
