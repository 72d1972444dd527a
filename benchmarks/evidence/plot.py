"""One picture an experiment: held-out accuracy over steps, an arm a line, a mismatch a panel.

A line is the mean over seeds, each arm at the learning rate that it chose, and its band Student's
95 % interval.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.learning.intervals import interval
from benchmarks.learning.measures import by_seed
from benchmarks.learning.run import EVERY

from .runs import Results

#: Okabe and Ito's, told apart with any colour vision; TrOPD's arms are solid, the others dashed.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(results: Results, path: Path) -> None:
    mismatches = results.experiment.mismatches
    figure, axes = plt.subplots(
        1, len(mismatches), figsize=(4.6 * len(mismatches), 4), sharey=True, squeeze=False
    )
    for ax, mismatch in zip(axes[0], mismatches):
        count = {True: 0, False: 0}
        for arm in results.experiment.arms:
            ours = arm.startswith("tropd")
            colour = COLOURS[count[ours] % len(COLOURS)]
            count[ours] += 1
            runs = by_seed(results.compared(mismatch), arm).values()
            if not runs:
                continue
            found = [interval(values) for values in zip(*(run["accuracy"] for run in runs))]
            steps = [EVERY * i for i in range(len(found))]
            style = "-" if ours else "--"
            ax.plot(steps, [one.mean for one in found], style, color=colour, label=arm)
            if len(runs) > 1:
                low, high = [one.low for one in found], [one.high for one in found]
                ax.fill_between(steps, low, high, color=colour, alpha=0.1, linewidth=0)
        ax.set_title(mismatch)
        ax.set_xlabel("step")
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("held-out accuracy")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
