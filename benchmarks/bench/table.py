"""The table on the terminal: a block for each number of tokens and loss, 120 columns at most."""

from __future__ import annotations

from benchmarks.bench.losses import LOSSES
from benchmarks.bench.providers import GEMMS, LABELS
from benchmarks.bench.results import Row
from benchmarks.measure import Times

HEAD = (
    f"{'':16}{'forward':>20}{'backward':>20}{'both (p20 to p80)':>22}{'% GEMMs':>8}"
    f"{'tok/s':>8}{'peak MB':>9}{'over':>7}{'error':>9}"
)
NOTES = (
    "seconds (s) or milliseconds (ms), median and p20 to p80 of runs in turns",
    "% GEMMs: of the time of the bare products of the same shapes, which is 100; less is better",
    "peak MB: over the inputs; over: over the inputs and the returned gradients",
    "error: of the gradients, the larger of two relative norms, against float64",
)


def block(rows: list[Row], head: bool) -> str:
    """The rows of one loss at one number of tokens; the first block has the head of the table."""
    start = f"--- {rows[0].tokens} tokens, {title(rows[0])} ".ljust(len(HEAD), "-")
    return "\n".join([*([HEAD] if head else []), start, *map(line, rows)])


def notes(rows: list[Row]) -> str:
    """What the losses and the columns mean, below the last block."""
    lines = []
    for loss in dict.fromkeys(row.loss for row in rows):
        if loss in LOSSES:
            lines.append(f"{loss}: {LOSSES[loss].meaning}")
    return "\n".join([*lines, *NOTES])


def short(rows: list[Row]) -> str:
    """A line for each provider, 72 columns: for a log of which only the end is kept."""
    lines = [
        f"{'loss':12}{'who':16}{'tokens':>7}{'both':>10}{'% GEMMs':>9}{'over MB':>9}{'error':>9}"
    ]
    for row in rows:
        start = f"{row.loss:12}{LABELS.get(row.who, row.who):16}{row.tokens:>7}"
        if row.both is None:
            lines.append(f"{start}  {shorten(row.reason, 60)}")
            continue
        error = "" if row.error is None else f"{row.error:.1e}"
        lines.append(
            f"{start}{seconds(row.both.median):>10}{percent(row.to_gemms):>9}"
            f"{megabytes(row.workspace):>9}{error:>9}".rstrip()
        )
    return "\n".join(lines)


def title(row: Row) -> str:
    known = LOSSES.get(row.loss)
    return row.loss if known is None else f"{row.loss}, floor {known.floor}"


def line(row: Row) -> str:
    who = f"{LABELS.get(row.who, row.who):16}"
    error = "-" if row.error is None else f"{row.error:.1e}"
    if row.both is None:
        return f"{who}  {shorten(row.reason, 92):94}{error if row.error else '':>7}".rstrip()
    if row.who == GEMMS:
        error = ""
    return (
        f"{who}{times(row.forward):>20}{times(row.backward):>20}{times(row.both):>22}"
        f"{percent(row.to_gemms):>8}{count(row.tokens_per_second):>8}"
        f"{megabytes(row.peak):>9}{megabytes(row.workspace):>7}{error:>9}"
    ).rstrip()


def times(t: Times | None) -> str:
    """All three in the unit that suits the median."""
    if t is None:
        return "-"
    unit, factor = ("ms", 1e3) if t.median < 1 else ("s", 1.0)
    return (
        f"{figures(t.median * factor)} {unit} ({figures(t.p20 * factor)}-{figures(t.p80 * factor)})"
    )


def seconds(value: float) -> str:
    return f"{figures(value * 1e3)} ms" if value < 1 else f"{figures(value)} s"


def figures(value: float) -> str:
    """Three figures, and all those before the point."""
    for limit, places in ((10, 2), (100, 1)):
        if abs(value) < limit - 0.5 * 10**-places:
            return f"{value:.{places}f}"
    return f"{value:.0f}"


def percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.0f}"


def count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{figures(value / 1e3)}k" if value >= 1e3 else figures(value)


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def shorten(text: str | None, width: int) -> str:
    text = text or "not run"
    return text if len(text) <= width else text[: width - 1] + "…"
