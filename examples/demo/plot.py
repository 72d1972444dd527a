"""The picture: how the student learns, and what the fused and the eager loss cost."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from examples.demo.compare import Measured
from examples.demo.report import seconds
from examples.demo.train import Step

COLORS = {"eager": "#b0b7c3", "fused": "#1f6feb"}
CURVE = "#1f6feb"


def draw(measured: list[Measured], steps: list[Step], caption: str, file: Path) -> None:
    """Curves above, bars below, hardware and versions at the foot."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    figure.suptitle(
        "TrOPD distillation of SmolLM2-135M-Instruct into a third of its layers", weight="bold"
    )
    figure.supxlabel(caption, fontsize=7, color="#57606a")

    _curve(axes[0, 0], steps, lambda step: step.loss, "loss")
    _curve(axes[0, 1], steps, lambda step: step.trust, "trust ratio", floor=0)
    _curve(axes[0, 2], steps, lambda step: step.entropy, "student's entropy (nats)", floor=0)

    tokens = f"{measured[0].tokens:,} tokens"
    _bars(
        axes[1, 0],
        measured,
        lambda m: (m.memory or 0) / 2**30,
        lambda m: "unknown" if m.memory is None else f"{m.memory / 2**30:.2f} GiB",
        f"peak memory, {tokens}",
    )
    _bars(
        axes[1, 1],
        measured,
        lambda m: m.times.median,
        lambda m: seconds(m.times.median),
        f"time of loss and gradients, {tokens}",
        spread=True,
    )
    _bars(
        axes[1, 2],
        measured,
        lambda m: m.errors.d_weight,
        lambda m: f"{m.errors.d_weight:.1e}",
        "relative error of d_weight",
    )
    axes[1, 0].legend(frameon=False, loc="upper left")

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def _curve(
    axes: Axes,
    steps: list[Step],
    value: Callable[[Step], float],
    title: str,
    floor: float | None = None,
) -> None:
    axes.plot([s.number for s in steps], [value(s) for s in steps], color=CURVE, marker=".")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    if floor is not None:
        axes.set_ylim(floor, 1.1 * max(value(s) for s in steps) or 1)


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
    axes.margins(y=0.3)
