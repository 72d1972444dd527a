"""Curves of one mismatch: accuracy, gradient norm and entropy over steps, arms in four groups.

A line is the mean over seeds and its band the 95 % interval; of the gradient norm both are taken
on the logarithm. TrOPD is dashed in every panel, for comparison.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from .intervals import interval
from .measures import by_seed

GROUPS = {
    "paper's comparison": ("opd", "tropd", "tropd_prefix", "forward_kl_topk"),
    "what to do with outliers": ("mask_outlier", "clip_outlier", "tropd_mask", "tropd_clip"),
    "divergences": ("gkd", "reverse_kl", "mopd", "topk_jsd"),
    "other gates": ("eopd", "entropy_opd", "reopold", "aopd"),
}
#: Okabe and Ito's, told apart with any colour vision.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
#: Steps over which gradient norm and entropy are averaged before they are drawn.
SMOOTH = 4


def draw(mismatch: dict[str, Any], path: Path) -> None:
    runs = mismatch["runs"]
    figure, axes = plt.subplots(3, len(GROUPS), figsize=(15, 8), sharex=True, sharey="row")
    for column, (title, group) in enumerate(GROUPS.items()):
        lines = [(arm, COLOURS[i], "-") for i, arm in enumerate(group)]
        if "tropd" not in group:
            lines.insert(0, ("tropd", "#777777", "--"))
        for arm, colour, style in lines:
            chosen = list(by_seed(runs, arm).values())
            if not chosen:
                continue
            options = {"color": colour, "linestyle": style, "label": arm}
            at = mismatch["eval_steps"]
            _curve(axes[0, column], at, [run["accuracy"] for run in chosen], options)
            norms = [[math.log10(max(v, 1e-6)) for v in run["grad_norm"]] for run in chosen]
            _curve(axes[1, column], *_smooth(norms), options, power=True)
            _curve(axes[2, column], *_smooth([run["entropy"] for run in chosen]), options)
        axes[0, column].set_title(title)
        axes[0, column].legend(fontsize=8, framealpha=0.6)
        axes[2, column].set_xlabel("step")
    for row, label in enumerate(("held-out accuracy", "gradient norm", "entropy, nats")):
        axes[row, 0].set_ylabel(label)
    axes[0, 0].set_ylim(0, 1.02)
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_ylim(0.03, 50)
    axes[2, 0].set_ylim(0, 2.5)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    figure.suptitle(f"mismatch: {mismatch['mismatch']} (mean and 95 % interval over seeds)")
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)


def _save(figure: Any, path: Path) -> None:
    """With a palette: a third of the size, which matters for what is kept with the code."""
    figure.set_dpi(70)
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(256).save(path, optimize=True)


def _curve(ax: Any, steps: list, curves: list[list[float]], options: dict, power=False) -> None:
    found = [interval(values) for values in zip(*curves)]
    shown = [(i.mean, i.low, i.high) for i in found]
    if power:
        shown = [tuple(10**value for value in triple) for triple in shown]
    middle, low, high = zip(*shown)
    ax.plot(steps, middle, linewidth=1.4, **options)
    if not math.isnan(found[0].half):
        ax.fill_between(steps, low, high, color=options["color"], alpha=0.15, linewidth=0)


def _smooth(curves: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Means of `SMOOTH` neighbouring steps, and the middles of those."""
    starts = range(0, len(curves[0]), SMOOTH)
    steps = [start + (min(SMOOTH, len(curves[0]) - start) + 1) / 2 for start in starts]
    return steps, [
        [sum(part) / len(part) for part in (curve[i : i + SMOOTH] for i in starts)]
        for curve in curves
    ]
