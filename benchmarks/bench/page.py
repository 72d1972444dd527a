"""The tables of docs/benchmarks.md, generated from the stored results between two marks.

Every file of `benchmarks/results` that holds rows of this table becomes a table of its own, under
the command, commit, machine and versions that it was measured with. `tests/tools/test_bench.py`
fails where page and results differ; `tropd bench --page` renews it.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks import ROOT, markdown
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.providers import GEMMS, LABELS
from benchmarks.bench.results import Results, Row, is_results, read
from benchmarks.bench.table import count, figures, megabytes, seconds, times

README = ROOT / "README.md"
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
#: README's table: the losses of one file that all compute, without the rows of the bare products.
SUMMARY_BEGIN, SUMMARY_END = "<!-- summary: begin (tropd bench --page) -->", "<!-- summary: end -->"
SUMMARY, SUMMARY_LOSSES = "cpu_4096.json", ("gkd", "reverse_kl")
BEGIN, END = "<!-- figures: begin (tropd bench --page) -->", "<!-- figures: end -->"
#: Columns of the text.
WIDTH = 110
#: Versions that a figure depends on, of those that the file has.
VERSIONS = {
    "torch": "torch", "triton": "Triton", "liger_kernel": "Liger", "trl": "TRL",
    "fla_core": "FLA", "cut_cross_entropy": "CCE", "quack_kernels": "QuACK",
}  # fmt: skip


def write(file: Path = PAGE, folder: Path = RESULTS, readme: Path | None = README) -> None:
    page = file.read_text("utf-8")
    file.write_text(page.replace(block(page), render(folder)), "utf-8")
    if readme is not None:
        text = readme.read_text("utf-8")
        readme.write_text(text.replace(summary_block(text), summary(folder)), "utf-8")


def block(page: str) -> str:
    """The page's tables, with the marks around them."""
    return markdown.block(page, BEGIN, END)


def render(folder: Path = RESULTS) -> str:
    """What should stand there."""
    files = sorted(path for path in folder.glob("*.json") if is_results(path))
    files.sort(key=lambda path: not path.name.startswith("gpu"))  # GPUs first
    return "\n\n".join([BEGIN, *(section(read(path), path) for path in files), END])


def summary_block(text: str) -> str:
    """README's table, with the marks around it."""
    return markdown.block(text, SUMMARY_BEGIN, SUMMARY_END)


def summary(folder: Path = RESULTS) -> str:
    """What should stand in README."""
    path = folder / SUMMARY
    results = read(path)
    rows = [row for row in results.rows if row.loss in SUMMARY_LOSSES and row.who != GEMMS]
    head = caption(results, [rows[0].tokens], path)
    return "\n\n".join([SUMMARY_BEGIN, f"{head}\n\n{by_loss(rows)}", SUMMARY_END])


def section(results: Results, path: Path) -> str:
    rows = results.rows
    tokens = list(dict.fromkeys(row.tokens for row in rows))
    # One provider on one loss over many sizes is a curve.
    grows = len(tokens) > 2 and len({(r.loss, r.who) for r in rows if r.who != GEMMS}) == 1
    return f"{caption(results, tokens, path)}\n\n{curve(rows) if grows else by_loss(rows)}"


def caption(results: Results, tokens: list[int], path: Path) -> str:
    facts, on = results.facts, results.facts["machine"]
    size = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    versions = ", ".join(f"{name} {on[key]}" for key, name in VERSIONS.items() if key in on)
    ignored = f", {facts['ignored']:.0%} of them ignored" if facts.get("ignored") else ""
    commit = on.get("commit", "an unknown commit")
    commit = commit.replace("-dirty", " with uncommitted changes")
    text = (
        f"**{size} tokens**{ignored}, {results.shape}, {facts['dtype']}: `{facts['command']}` at "
        f"{commit}; {on.get('gpu', on['cpu'])}; Python "
        f"{on['python']}, {versions}"
    )
    picture = path.with_suffix(".png")
    if picture.exists():
        text += f" ([picture](../benchmarks/results/{picture.name}))"
    return textwrap.fill(text + ":", WIDTH, break_long_words=False, break_on_hyphens=False)


def by_loss(rows: list[Row]) -> str:
    sizes = len({row.tokens for row in rows}) > 1
    head = ["loss", "who", "forward", "backward", "time (p20-p80)", "over GEMMs", "tokens/s"]
    titles = [*(["tokens"] if sizes else []), *head, "memory", "gradient error"]
    lines, last = [], (0, "")
    for row in rows:
        first = (row.tokens, row.loss) != last
        last = (row.tokens, row.loss)
        size = [f"{row.tokens:,}" if first else ""] if sizes else []
        known = LOSSES.get(row.loss)
        loss = (row.loss if known is None else known.title) if first else ""
        lines.append([*size, loss, LABELS.get(row.who, row.who), *cells(row)])
    return markdown.table(titles, lines)


def cells(row: Row) -> list[str]:
    error = "" if row.error is None else f"{row.error:.1e}".replace("e-0", "e-")
    if row.both is None:
        return ["", "", row.reason or "not run", "", "", "", error]
    parts = [seconds(half.median) for half in (row.forward, row.backward)]
    memory = "-" if row.workspace is None else f"{megabytes(row.workspace)} MB"
    over = "" if row.to_gemms is None else f"{row.to_gemms:.2f}"
    return [*parts, times(row.both), over, count(row.tokens_per_second), memory, error]


def curve(rows: list[Row]) -> str:
    rows = [row for row in rows if row.who != GEMMS and row.both]
    of = f"{LABELS[rows[0].who]}, {LOSSES[rows[0].loss].title}"
    return markdown.table([of, *(f"{r.tokens:,}" for r in rows)], [
        ["ms a token", *(figures(1e3 * r.both.median / r.tokens) for r in rows)],
        ["over GEMMs", *("-" if r.to_gemms is None else f"{r.to_gemms:.2f}" for r in rows)],
        ["memory, MB", *(megabytes(r.workspace) for r in rows)],
    ])  # fmt: skip
