"""The page: what the terminal shows and the picture draws, in one HTML file that needs no other."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.demo.plot import as_svg
from examples.demo.record import WATCH, Record
from examples.demo.report import seconds

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { border-top: 1px solid #d0d7de; padding: .4rem .8rem .4rem 0; text-align: left;
         vertical-align: top }
.said { table-layout: fixed }
.numbers td, .numbers th { text-align: right; font-variant-numeric: tabular-nums }
.before { color: #a40e26 }  .after { color: #0a3d91 }
svg { width: 100%; height: auto }
pre { color: #57606a; white-space: pre-wrap }
"""


def write_page(record: Record, file: Path) -> None:
    """Writes the page; whatever a model said is text there, never markup."""
    curves, costs = as_svg(record)
    title = f"SmolLM2-135M-Instruct teaches {record.student}"
    facts = "\n".join(f"{name:<16}{value}" for name, value in record.facts.items())
    parts = (
        f"<h1>{html.escape(title)}</h1>",
        f"<p><b>{html.escape(record.verdict)}.</b></p>",
        "<h2>What it says</h2><p>Greedy completions, cut at "
        f"{record.settings['tokens']} tokens.</p>",
        _completions(record),
        f"<h2>How it learns</h2><p>{html.escape(WATCH)}</p>",
        curves,
        f"<details><summary>every step</summary>{_steps(record)}</details>",
        "<h2>What the loss costs</h2>",
        costs,
        _comparison(record),
        f"<h2>Where</h2><pre>{html.escape(record.caption)}\n\n{html.escape(facts)}</pre>",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</html>\n",
        encoding="utf-8",
    )


def _completions(record: Record) -> str:
    sayings = (record.before.completions, record.after.completions, record.teacher)
    return _table(
        "said",
        ("prompt, held out", "before", "after", "teacher"),
        zip(record.prompts, *sayings),
        classes=("", "before", "after", ""),
    )


def _steps(record: Record) -> str:
    return _table(
        "numbers",
        ("step", "KL(student || teacher)", "trust ratio", "loss", "entropy", "tokens"),
        (
            (s.number, *(f"{x:.3f}" for x in (s.reverse_kl, s.trust, s.loss, s.entropy)), s.tokens)
            for s in record.steps
        ),
    )


def _comparison(record: Record) -> str:
    return _table(
        "numbers",
        ("V", "", "loss", "d_hidden", "d_weight", "gate", "median time", "memory"),
        (
            (
                f"{m.vocabulary:,}",
                m.name,
                *(f"{e:.1e}" for e in (m.errors.loss, m.errors.d_hidden, m.errors.d_weight)),
                m.errors.gate,
                seconds(m.times.median),
                "unknown" if m.memory is None else f"{m.memory / 2**30:.2f} GiB",
            )
            for m in record.measured
        ),
    )


def _table(
    kind: str,
    names: Sequence[str],
    rows: Iterable[Sequence[object]],
    classes: Sequence[str] = (),
) -> str:
    """An HTML table; classes: one for each column."""
    classes = classes or [""] * len(names)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "\n".join(
        "<tr>"
        + "".join(f'<td class="{c}">{html.escape(str(x))}</td>' for c, x in zip(classes, row))
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><tr>{head}</tr>\n{body}</table>'
