"""The picture: how the student learns, what it says, and what fused and eager loss cost."""

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from examples.demo.compare import Measured
from examples.demo.record import Record
from examples.demo.report import seconds
from examples.demo.train import Step

COLORS = {"eager": "#b0b7c3", "fused": "#1f6feb"}
CURVE = "#1f6feb"
HELD_OUT = "#d1242f"
GREY = "#57606a"
#: Prompts whose completions the picture has room for.
DRAWN = 3


def draw(record: Record, file: Path) -> None:
    """The PNG: curves, bars, completions before and after, and the hardware at the foot."""
    with _figure(11, 9.2) as figure:
        figure.suptitle(f"SmolLM2-135M-Instruct teaches {record.student}", weight="bold")
        figure.supxlabel(record.caption, fontsize=7, color=GREY)
        curves, bars, words = figure.subfigures(3, 1, height_ratios=(3, 2.6, 3.4))
        _curves(curves, record)
        _costs(bars, record)
        _completions(words, record)
        file.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():  # a damaged student writes what no font has
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            figure.savefig(file)


def as_svg(record: Record) -> tuple[str, str]:
    """Curves and bars, each an <svg> element for the page."""
    parts = []
    for part, height in ((_curves, 2.9), (_costs, 2.6)):
        with _figure(11, height) as figure:
            part(figure, record)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
        _, opening, rest = file.getvalue().partition("<svg")  # without the XML prologue
        parts.append(opening + rest)
    return parts[0], parts[1]


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    # Identifiers by content, not at random: the same run gives the same page.
    no_spines = {"axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({"font.size": 9, "svg.hashsalt": "demo", **no_spines}):
        figure = plt.figure(figsize=(width, height), dpi=150, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
        try:
            yield figure
        finally:
            plt.close(figure)


def _curves(figure: FigureBase, record: Record) -> None:
    steps, last = record.steps, len(record.steps)
    kl, trust, loss = figure.subplots(1, 3)
    _curve(kl, steps, lambda step: step.reverse_kl, "KL(student || teacher), nats a token")
    held_out = [record.before.reverse_kl, record.after.reverse_kl]
    kl.plot([0, last], held_out, "o", color=HELD_OUT, label="held-out prompts")
    kl.set_ylim(0)
    kl.legend(frameon=False)
    _curve(trust, steps, lambda step: step.trust, "trust ratio")
    trust.set_ylim(0, 1)
    _curve(loss, steps, lambda step: step.loss, "loss (a surrogate)", color=GREY)


def _costs(figure: FigureBase, record: Record) -> None:
    measured = record.measured
    memory, times, errors = figure.subplots(1, 3)
    tokens = f"{measured[0].tokens:,} tokens"
    _bars(
        memory,
        measured,
        lambda m: (m.memory or 0) / 2**30,
        lambda m: "unknown" if m.memory is None else f"{m.memory / 2**30:.2f} GiB",
        f"peak memory, {tokens}",
    )
    _bars(
        times,
        measured,
        lambda m: m.times.median,
        lambda m: seconds(m.times.median),
        f"time of loss and gradients, {tokens}",
        spread=True,
    )
    _bars(
        errors,
        measured,
        lambda m: m.errors.d_weight,
        lambda m: f"{m.errors.d_weight:.1e}",
        "relative error of d_weight",
    )
    memory.legend(frameon=False, loc="upper left", ncols=2)


def _completions(figure: FigureBase, record: Record) -> None:
    """The first prompts, each a row with what was said before and after, and by the teacher."""
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_title(record.verdict, weight="bold")
    columns = ("prompt, held out", "before", "after", "teacher")
    sayings = (record.prompts, record.before.completions, record.after.completions, record.teacher)
    for column, (name, texts) in enumerate(zip(columns, sayings)):
        axes.text(column / 4, 0.95, name, va="top", color=GREY)
        for row, text in enumerate(texts[:DRAWN]):
            # Not a line more than there is room for; the page has all of it.
            lines = textwrap.wrap(" ".join(text.split()), 36)[:4]
            place = 0.84 - 0.84 * row / DRAWN
            axes.text(column / 4, place, "\n".join(lines), va="top", fontsize=8, parse_math=False)


def _curve(
    axes: Axes,
    steps: list[Step],
    value: Callable[[Step], float],
    title: str,
    color: str = CURVE,
) -> None:
    axes.plot([s.number for s in steps], [value(s) for s in steps], color=color, marker=".")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)


def _bars(
    axes: Axes,
    measured: list[Measured],
    value: Callable[[Measured], float],
    text: Callable[[Measured], str],
    title: str,
    spread: bool = False,
) -> None:
    """Eager and fused side by side, a pair for each vocabulary, each bar with its figure; `spread`
    adds the 20th and 80th percentiles of the runs."""
    vocabularies = sorted({m.vocabulary for m in measured})
    for m in measured:
        x = vocabularies.index(m.vocabulary) + (-0.19 if m.name == "eager" else 0.19)
        first = m.vocabulary == vocabularies[0]
        axes.bar(x, value(m), width=0.36, color=COLORS[m.name], label=m.name if first else None)
        top = value(m)
        if spread:
            axes.vlines(x, m.times.p20, m.times.p80, color="#24292f", linewidth=1)
            top = max(top, m.times.p80)
        axes.annotate(
            text(m), (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_xticks(range(len(vocabularies)), [f"V = {v:,}" for v in vocabularies])
    axes.set_yticks([])  # every bar carries its figure
    axes.spines["left"].set_visible(False)
    axes.set_title(title)
    axes.margins(y=0.4)  # room for figures and legend
