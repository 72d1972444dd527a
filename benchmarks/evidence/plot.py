"""One picture an experiment: its curves over steps, an arm a line, a mismatch and curve a panel.

A line is the mean over seeds, each arm at the learning rate that it chose, and its band Student's
95 % interval.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning.intervals import interval
from benchmarks.learning.measures import by_seed

from .experiments import Curve
from .runs import Results

#: Okabe and Ito's, told apart with any colour vision; TrOPD's arms are solid, the others dashed.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(results: Results, path: Path) -> None:
    experiment = results.experiment
    panels = [(where, curve) for where in experiment.mismatches for curve in experiment.curves]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False)
    for ax, (mismatch, curve) in zip(axes[0], panels):
        _draw_panel(ax, results, mismatch, curve)
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_panel(ax: Axes, results: Results, mismatch: str, curve: Curve) -> None:
    count = {True: 0, False: 0}
    for arm in results.experiment.arms:
        ours = arm.startswith("tropd")
        colour = COLOURS[count[ours] % len(COLOURS)]
        count[ours] += 1
        runs = by_seed(results.compared(mismatch), arm).values()
        if not runs:
            continue
        found = [interval(values) for values in zip(*(run[curve.key] for run in runs))]
        steps = [curve.first + curve.every * i for i in range(len(found))]
        style = "-" if ours else "--"
        ax.plot(steps, [one.mean for one in found], style, color=colour, label=arm)
        if len(runs) > 1:
            low, high = [one.low for one in found], [one.high for one in found]
            ax.fill_between(steps, low, high, color=colour, alpha=0.1, linewidth=0)
    ax.set_title(mismatch)
    ax.set_xlabel("step")
    ax.set_ylabel(curve.label)
    if curve.key == "accuracy":
        ax.set_ylim(0, 1.02)
    else:
        ax.set_ylim(bottom=0)
    ax.grid(alpha=0.25)
