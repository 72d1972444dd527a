"""Shows completions with their tokens colored by the objective's region.

    prefix    the teacher wrote it
    trusted   inside the gate
    outlier   outside
    left out  the objective's or the config's selection did not take it

In the terminal if rich is installed, and as a self-contained HTML file.
"""

import html
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .prefix import prefix_mask

#: For each region its style in a terminal and its background in a browser.
STYLES = {
    "prefix": ("blue", "#cfe2ff"),
    "trusted": ("green", "#d1e7dd"),
    "outlier": ("bold red", "#f8c9cd"),
    "left_out": ("dim", "#e9ecef"),
}
#: Completions that are kept of a micro-batch.
SHOWN = 4


@dataclass(frozen=True)
class Sample:
    """A prompt, and its completion's tokens as (text, region)."""

    prompt: str
    tokens: tuple[tuple[str, str], ...]


def samples(
    inputs: Mapping[str, Any],
    trust: Tensor,  # (B, C)
    counted: Tensor,  # (B, C) bool
    tokenizer: Any,
) -> list[Sample]:
    """The first completions of a micro-batch. A trust of 0.5 or more counts as trusted."""
    prefix = prefix_mask(inputs)
    result = []
    for i in range(min(SHOWN, len(counted))):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        parts = []
        for token, inside, guided, counts in zip(
            inputs["completion_ids"][i].tolist(), trust[i].tolist(), prefix[i].tolist(),
            counted[i].tolist(),
        ):  # fmt: skip
            if counts:
                region = "prefix" if guided else _region(inside)
                parts.append((tokenizer.decode([token]), region))
        result.append(Sample(tokenizer.decode(prompt), tuple(parts)))
    return result


def _region(trust: float) -> str:
    if math.isnan(trust):
        return "left_out"
    return "trusted" if trust >= 0.5 else "outlier"


def show(shown: Sequence[Sample]) -> None:
    """Prints the samples, if rich is installed."""
    if importlib.util.find_spec("rich") is None:
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for sample in shown:
        text = Text(sample.prompt, style="dim")
        for token, region in sample.tokens:
            text.append(token, style=STYLES[region][0])
        console.print(text)
    console.print(Text.assemble(*((f" {name} ", style) for name, (style, _) in STYLES.items())))


def write_page(shown: Sequence[Sample], path: Path) -> None:
    """Writes the samples as an HTML page."""
    rules = "".join(f".{name}{{background:{colour}}}" for name, (_, colour) in STYLES.items())
    legend = " ".join(f'<span class="{name}">{name}</span>' for name in STYLES)
    blocks = "".join(
        f"<pre><i>{html.escape(sample.prompt)}</i>"
        + "".join(f'<span class="{r}">{html.escape(token)}</span>' for token, r in sample.tokens)
        + "</pre>"
        for sample in shown
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{path.stem}</title>'
        f"<style>body{{font:16px sans-serif}}pre{{white-space:pre-wrap}}{rules}</style>"
        f"<p>{legend}</p>{blocks}\n",
        encoding="utf-8",
    )
