"""Short tables of the records, for a log of which only the end is kept.

    python -m benchmarks.gpu.tables FOLDER/results.jsonl

Most important last.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.bench import table, tuning
from benchmarks.bench.results import row_of
from benchmarks.records import Record


def render(found: Sequence[Record], bad: int) -> str:
    """Records may hold anything: a table that cannot be made says so, and the others come."""
    parts = []
    for part in PARTS:
        try:
            parts.append(part(found))
        except Exception as error:
            parts.append(f"{part.__name__}: no table ({type(error).__name__}: {error})")
    if bad:
        parts.insert(0, f"{bad} lines of the records could not be read")
    return "\n\n".join(text for text in parts if text)


def of(found: Sequence[Record], *steps: str) -> list[Record]:
    return [record for record in found if record.get("step") in steps]


# --- a table each ------------------------------------------------------------------------------


def machine(found: Sequence[Record]) -> str:
    for record in found:
        if isinstance(record.get("facts"), dict):
            facts = record["facts"]
            lines = [f"{k}: {v}" for k, v in facts.get("machine", {}).items()]
            return "\n".join([*lines, *(f"!  {line}" for line in record.get("warnings", []))])
    return ""


def products(found: Sequence[Record]) -> str:
    lines = []
    for r in of(found, "gemms"):
        if "tflops" in r:
            lines.append((r["vocab"], r["width"], r["tokens"], r["what"], r["tflops"], r["ms"]))
    shapes = list(dict.fromkeys(line[:3] for line in lines))
    names = list(dict.fromkeys(line[3] for line in lines))
    if not lines:
        return ""
    head = "TFLOP/s " + "".join(f"{name:>15}" for name in names)
    rates = {line[:4]: f"{line[4]:.0f}" for line in lines}
    return "\n".join([head, *(
        f"{w:>5}{m:>6} " + "".join(f"{rates.get((v, w, m, name), '-'):>15}" for name in names)
        for v, w, m in shapes
    )])  # fmt: skip


def rows(found: Sequence[Record]) -> str:
    lines = [
        f"{r['pass']:<26}{1e3 * r['seconds']['median']:>9.3f} ms{r['of_copy']:>8.0%} of a copy"
        for r in of(found, "rows") if "of_copy" in r and not r.get("launch")
    ]  # fmt: skip
    return "\n".join(lines)


def sweep(found: Sequence[Record]) -> str:
    """Of other launches, times over those of the launch in use."""
    made = [r for r in of(found, "rows") if r.get("launch")]
    names = list(dict.fromkeys(name for r in made for name in r.get("over_default", {})))
    if not made:
        return ""
    head = [f"{i}: {name}" for i, name in enumerate(names, 1)]
    lines = [f"{'launched with':<22}" + "".join(f"{i:>7}" for i in range(1, len(names) + 1))]
    for r in made:
        ratios = r.get("over_default", {})
        cells = [f"{ratios[name]:>7.2f}" if name in ratios else f"{'-':>7}" for name in names]
        lines.append(f"{r['launch']:<22}" + ("".join(cells) if ratios else f"  {r.get('reason')}"))
    return "\n".join([", ".join(head), *lines])


def headline(found: Sequence[Record]) -> str:
    parts = []
    mine = [r for r in of(found, "headline", "baselines") if "who" in r and "tokens" in r]
    for shape in dict.fromkeys(r["shape"] for r in mine):
        made = [row_of(r) for r in mine if r["shape"] == shape]
        # Each process has the bare products in its turns; one row is enough.
        seen: dict[tuple[str, str], object] = {}
        for row in made:
            seen.setdefault((row.loss, row.who), row)
        ordered = sorted(seen.values(), key=lambda row: list(
            dict.fromkeys(row.loss for row in made)).index(row.loss))  # fmt: skip
        parts.append(f"{shape}\n{table.short(ordered)}")
    return "\n\n".join(parts)


def chunks(found: Sequence[Record]) -> str:
    made = [r for r in of(found, "chunks") if "super_rows" in r]
    if not made:
        return ""
    return tuning.render(tuning.fastest_first(made))


def clusters(found: Sequence[Record]) -> str:
    return "\n".join(
        f"{r['kernel']:<16}{r['ms']:>9.3f} ms{r['gbs']:>8.0f} GB/s  error {r['error']:.1e}"
        if "ms" in r else f"{r['kernel']:<16}  {r.get('reason')}"
        for r in of(found, "clusters") if "kernel" in r
    )  # fmt: skip


def tests(found: Sequence[Record]) -> str:
    made = [r for r in of(found, "tests") if "test" in r]
    if not made:
        return ""
    count = Counter(r["outcome"] for r in made)
    failed = [r["test"] for r in made if r["outcome"] == "failed"]
    lines = [f"tests: {', '.join(f'{n} {what}' for what, n in count.most_common())}"]
    lines += [f"  failed: {name[:110]}" for name in failed[:12]]
    return "\n".join([*lines, *([f"  and {len(failed) - 12} more"] if len(failed) > 12 else [])])


def smoke(found: Sequence[Record]) -> str:
    made = [r for r in of(found, "smoke") if "check" in r]
    bad = [f"  {r['check']}: {str(r.get('reason'))[:150]}" for r in made if not r["ok"]]
    if not made:
        return ""
    return "\n".join([f"smoke: {len(made) - len(bad)} of {len(made)} checks ok", *bad])


def ends(found: Sequence[Record]) -> str:
    """Jobs that did not end well; and how many did."""
    made = [r for r in found if "state" in r]
    count = Counter(r["state"] for r in made)
    lines = [f"jobs: {', '.join(f'{n} {what}' for what, n in count.most_common())}"]
    lines += [
        f"  {r['step']} {r['job']}: {r['state']}: {str(r.get('reason', ''))[:110]}"
        for r in made if r["state"] not in ("done", "skipped")
    ]  # fmt: skip
    skipped: dict[str, list[str]] = {}
    for r in made:
        if r["state"] == "skipped":
            skipped.setdefault(r.get("reason", ""), []).append(f"{r['step']} {r['job']}")
    lines += [f"  skipped, {why}: {', '.join(names)[:200]}" for why, names in skipped.items()]
    return "\n".join(lines[:30])


PARTS: tuple[Callable[[Sequence[Record]], str], ...] = (
    machine, products, rows, sweep, clusters, tests, chunks, ends, smoke, headline,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    (path,) = sys.argv[1:] if arguments is None else arguments
    print(render(*records.read(Path(path))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
