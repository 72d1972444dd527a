"""Pictures of stored results: time, memory, and the roofline.

One panel for each loss; of one loss at several sizes, a picture of time and memory as well. With
several numbers of tokens these are curves, else bars. The roofline
shows how much of the machine each call uses: FLOP of the loss's floor over its time, against FLOP
per byte that has to move (inputs read once, gradients written once), under the ceilings of the
machine that measured, which it probed if it was told to draw; without them there is no roof.
Work that an implementation does beyond the floor counts for nothing there.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
import matplotlib.pyplot as plt

from benchmarks.bench.losses import LOSSES
from benchmarks.bench.providers import GEMMS, LABELS, OURS
from benchmarks.bench.results import Results, Row
from benchmarks.measure import Times

#: By provider, so that each has its colour in every picture.
COLOURS = dict(zip(LABELS, plt.get_cmap("tab20").colors)) | {GEMMS: "#6e7781"}
OUR_COLOUR = "#1f4fd8"
Value = Callable[[Row], "float | None"]


def draw(results: Results, file: Path) -> list[Path]:
    """Writes NAME_time.png, NAME_memory.png and NAME_roofline.png beside the file, and of one loss
    at several sizes NAME.png; no picture of what it does not hold."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    rows = [row for row in results.rows if row.both is not None]
    written = []
    pictures = {
        "time": ("seconds, loss and gradients", lambda row: row.both.median),
        "memory": ("MB over inputs and gradients", lambda row: mega(row.workspace)),
    }
    for name, (unit, value) in pictures.items():
        shown = [row for row in rows if value(row) is not None]
        if shown:
            written.append(save(panels(results, shown, unit, value), file, name))
    if len({row.loss for row in rows}) == 1 and len({row.tokens for row in rows}) > 1:
        written.append(save(growth(results, rows), file))
    if any(row.loss in LOSSES for row in rows):
        written.append(save(roofline(results, rows), file, "roofline"))
    return written


def save(figure: Any, file: Path, name: str | None = None) -> Path:
    path = file.with_suffix(".png") if name is None else file.with_name(f"{file.stem}_{name}.png")
    figure.savefig(path)
    plt.close(figure)
    return path


def panels(results: Results, rows: list[Row], unit: str, value: Value) -> Any:
    losses = list(dict.fromkeys(row.loss for row in rows))
    across = min(3, len(losses))
    down = -(-len(losses) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.2 * across, 3.2 * down + 0.6), dpi=130, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    label(figure, results)
    for empty in axes.flat[len(losses) :]:
        empty.remove()
    for axis, loss in zip(axes.flat, losses):
        mine = [row for row in rows if row.loss == loss]
        axis.set_title(LOSSES[loss].title if loss in LOSSES else loss)
        axis.set_ylabel(unit)
        curves = len({row.tokens for row in mine}) > 1
        (lines if curves else bars)(axis, mine, value)
        axis.set_ylim(0)
        axis.grid(alpha=0.25, axis="both" if curves else "y")
    return figure


def lines(axis: Any, rows: list[Row], value: Value) -> None:
    for who in dict.fromkeys(row.who for row in rows):
        mine = [row for row in rows if row.who == who]
        axis.plot(
            [row.tokens for row in mine], [value(row) for row in mine], marker="o",
            color=COLOURS.get(who), label=LABELS.get(who, who),
            linestyle="--" if who == GEMMS else "-",
        )  # fmt: skip
    axis.set_xlabel("tokens")
    axis.legend(frameon=False, fontsize=7)


def growth(results: Results, rows: list[Row]) -> Any:
    """Time, with p20 and p80, and memory against tokens. Ours stands out."""
    rows = [row for row in rows if row.workspace is not None and row.who != GEMMS]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), dpi=130, layout="constrained")
    label(figure, results)
    loss = rows[0].loss
    figure.suptitle(LOSSES[loss].title if loss in LOSSES else loss, fontsize=10)
    for who in dict.fromkeys(row.who for row in rows):
        mine = [row for row in rows if row.who == who]
        tokens = [row.tokens for row in mine]
        ours = who in OURS
        style = {
            "color": OUR_COLOUR if who == "native" else COLOURS.get(who), "marker": "o",
            "label": LABELS.get(who, who), "linewidth": 3 if ours else 1.2,
            "markersize": 6 if ours else 3.5, "zorder": 3 if ours else 2,
        }  # fmt: skip
        spread = list(zip(*(abs_spread(row.both) for row in mine)))
        axes[0].errorbar(tokens, [row.both.median for row in mine], spread, capsize=3, **style)
        axes[1].plot(tokens, [mega(row.workspace) for row in mine], **style)
    for axis, title in zip(axes, ("seconds, loss and gradients", "MB over inputs and gradients")):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens")
        axis.set_ylim(0)
        axis.grid(alpha=0.25)
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def bars(axis: Any, rows: list[Row], value: Value) -> None:
    names = [LABELS.get(row.who, row.who) for row in rows]
    axis.bar(names, [value(row) for row in rows], color=[COLOURS.get(row.who) for row in rows])
    if value(rows[0]) == rows[0].both.median:
        spread = [abs_spread(row.both) for row in rows]
        axis.errorbar(
            names, [value(row) for row in rows], list(zip(*spread)), fmt="none", color="black",
            capsize=2, linewidth=0.8,
        )  # fmt: skip
    axis.tick_params(axis="x", rotation=40)
    for text in axis.get_xticklabels():
        text.set_horizontalalignment("right")


def abs_spread(times: Times) -> tuple[float, float]:
    return times.median - times.p20, times.p80 - times.median


def roofline(results: Results, rows: list[Row]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4.4), dpi=130, layout="constrained")
    label(figure, results)
    # A part of the tokens does not make the products of the floor.
    rows = [row for row in rows if row.loss in LOSSES and not LOSSES[row.loss].selects]
    points = [(row, *work(results, row)) for row in rows]
    for who in dict.fromkeys(row.who for row in rows):
        mine = [point for point in points if point[0].who == who]
        axis.scatter(
            [flop / moved for _, flop, moved in mine],
            [flop / row.both.median / 1e12 for row, flop, _ in mine],
            s=22, color=COLOURS.get(who), label=LABELS.get(who, who),
        )  # fmt: skip
    ceilings = results.facts.get("ceilings")
    if ceilings:
        top, bandwidth = ceilings["flop_per_second"], ceilings["bytes_per_second"]
        ridge = top / bandwidth
        right = max([ridge, *(flop / moved for _, flop, moved in points)]) * 3
        axis.plot(
            [ridge / 30, ridge, right], [bandwidth * ridge / 30 / 1e12, top / 1e12, top / 1e12],
            color="black", linewidth=1,
            label=f"{top / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} GB/s",
        )  # fmt: skip
    else:
        axis.set_title("no roof: measured without --plot", fontsize=8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP of the floor per byte that has to move")
    axis.set_ylabel("TFLOP/s, of the floor's FLOP")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=7)
    return figure


def work(results: Results, row: Row) -> tuple[float, float]:
    """(FLOP of the floor, bytes that have to move) of this row, for the tokens that count."""
    shape, kind = results.shape, LOSSES[row.loss]
    tokens = row.tokens * (1 - results.facts.get("ignored", 0.0))
    teacher = shape.teacher_hidden_size if kind.multiplies_teacher else 0
    flop = 2 * tokens * shape.vocab_size * (3 * shape.hidden_size + teacher)
    # The student's hidden states and head are read, and as much is written as gradients.
    elements = (tokens + shape.vocab_size) * (2 * shape.hidden_size + teacher)
    return flop, elements * (4 if results.facts["dtype"] == "float32" else 2)


def label(figure: Any, results: Results) -> None:
    on = results.facts["machine"]
    text = f"{results.shape}, {results.facts['dtype']}; {on.get('gpu', on['cpu'])}"
    # 6 points: some 20 characters an inch
    label = textwrap.fill(f"{text}; torch {on['torch']}", int(20 * figure.get_figwidth()))
    figure.supxlabel(label, fontsize=6, color="#57606a")


def mega(value: int | None) -> float | None:
    return None if value is None else value / 1e6
