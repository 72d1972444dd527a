"""The second call: what the first one left open.

    until   step
     45 s   smoke checks that did not pass, while kernels are compiled again
    130 s   the headline: the chosen chunk sizes, the plan's, and the bare products in one process's
            turns; then what the first call did not come to
    165 s   tests that failed
    215 s   Liger as its defaults have it, compiled, which takes most of a minute; only `gkd`
    250 s   other launches of the row passes
    290 s   tests that have not run yet

All choices are functions of the first call's records.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks import records
from benchmarks.gpu import first
from benchmarks.gpu.first import FULL, TINY, Sizes
from benchmarks.gpu.jobs import Facts, Job, scaled, step
from benchmarks.gpu.smoke import CHECKS, LOSSES
from benchmarks.records import Record

MINUTES = 5.0
#: Chunk sizes are changed for a gain of 1 % at least, or of 2 % if only the rates of the products
#: promise it; within 0.5 % those that take less memory win.
GAIN, PROMISED_GAIN, TIE = 0.01, 0.02, 0.005

Chunks = tuple[int, int]


def load(folder: Path) -> list[Record]:
    """The first call's records, from `results.jsonl` or else from its tar.

    Raises:
        ValueError: There are none; the text says what to do.
    """
    plain, packed = folder / "results.jsonl", folder / "gpu.tar.gz"
    found: list[Record] = []
    if plain.exists():
        found, _ = records.read(plain)
    elif packed.exists():
        with tempfile.TemporaryDirectory() as unpacked:
            try:
                with tarfile.open(packed, "r:gz") as tar:
                    data = tar.extractfile("results.jsonl")
                    (Path(unpacked) / "results.jsonl").write_bytes(data.read() if data else b"")
            except (OSError, EOFError, KeyError, tarfile.TarError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{packed} cannot be read: {reason}") from None
            found, _ = records.read(Path(unpacked) / "results.jsonl")
    if not found:
        raise ValueError(
            f"{folder} has no records of a first call: expected its results.jsonl or gpu.tar.gz"
        )
    return found


# --- choices -----------------------------------------------------------------------------------


def failed_checks(found: Iterable[Record]) -> list[str]:
    """Those that were not seen to pass: a check that crashed or came too late has no record."""
    passed = {r["check"] for r in found if r.get("step") == "smoke" and r.get("ok") is True}
    return [name for name in CHECKS if name not in passed]


def failed_tests(found: Iterable[Record]) -> list[str]:
    last = {r["test"]: r.get("outcome") for r in found if "test" in r}
    return [name for name, outcome in last.items() if outcome == "failed"]


def not_measured(found: Iterable[Record], jobs: Iterable[Job]) -> list[Job]:
    """Of those jobs, the ones that came too late, crashed or were stopped. What was skipped misses
    something that will be missing again; what failed has said why."""
    ended = {(r.get("step"), r.get("job")): r["state"] for r in found if "state" in r}
    states = ("done", "failed", "skipped")
    return [job for job in jobs if ended.get((job.step, job.name)) not in states]


def chosen_chunks(found: Sequence[Record], tokens: int) -> tuple[Chunks | None, str]:
    """(sizes, why); None for those that the plan takes."""
    timed = [
        r for r in found
        if r.get("step") == "chunks" and isinstance(r.get("over_default"), (int, float))
    ]  # fmt: skip
    others = [r for r in timed if not r["default"]]
    if not others:
        return _promised(found, tokens)
    best = min(r["over_default"] for r in others)
    if best > 1 - GAIN:
        return None, f"the plan's chunk sizes stay: no others take less than {best:.3f} of its time"
    tied = [r for r in others if r["over_default"] <= best + TIE]
    taken = min(tied, key=lambda r: r.get("workspace") or 0)
    sizes = taken["rows"], taken["super_rows"]
    return sizes, f"chunks of {sizes[0]} and {sizes[1]}: {taken['over_default']:.3f} of the time"


def _promised(found: Sequence[Record], tokens: int) -> tuple[Chunks | None, str]:
    """`chosen_chunks` from the rates of the products, if no chunk sizes were timed."""
    ms: dict[tuple[str, int], float] = {}
    shape, plan = None, None
    for r in found:
        if r.get("step") == "gemms" and r.get("what") == "plan":
            plan = plan or (r["rows"], r["super_rows"])
        if r.get("step") == "gemms" and "ms" in r and "tokens" in r:
            shape = shape or (r["vocab"], r["width"])
            if (r["vocab"], r["width"]) == shape:
                ms[r["what"], r["tokens"]] = r["ms"]

    def takes(rows: int, super_rows: int) -> float:
        whole = super_rows >= tokens and ("d_weight, bf16", super_rows) in ms
        weight = ms["d_weight, bf16" if whole else "d_weight +=", super_rows]
        return ms["logits", rows] / rows + (ms["d_hidden", super_rows] + weight) / super_rows

    sizes = sorted({m for _, m in ms})
    known = {}
    for pair in product(sizes, sizes):
        try:
            known[pair] = takes(*pair) if pair[1] >= pair[0] else float("inf")
        except KeyError:  # that product was not timed
            continue
    if plan not in known:
        return None, "the plan's chunk sizes stay: the first call timed neither others nor products"
    best = min(known, key=known.__getitem__)
    share = known[best] / known[plan]
    if share > 1 - PROMISED_GAIN:
        return None, f"the plan's chunk sizes stay: products promise {share:.3f} of their time"
    return best, f"chunks of {best[0]} and {best[1]}: products promise {share:.3f} of their time"


def other_card(found: Iterable[Record], facts: Facts | None) -> str | None:
    """A line where the two calls ran on different GPUs."""
    before = next((r["facts"].get("gpu") for r in found if isinstance(r.get("facts"), dict)), None)
    now = (facts or {}).get("gpu")
    names = [gpu["name"] if gpu else "no GPU" for gpu in (before, now)]
    if names[0] == names[1]:
        return None
    return f"the first call ran on {names[0]}, this one on {names[1]}: compare no times of the two"


# --- jobs --------------------------------------------------------------------------------------


def headlines(sizes: Sizes, chunks: Chunks | None) -> list[Job]:
    more = ("--chunks", *chunks) if chunks else ()
    jobs = [first.headline(sizes, "ours", loss, sizes.shapes[0], *more) for loss in LOSSES]
    jobs += [
        first.headline(sizes, "ours", loss, shape, *more)
        for shape in sizes.shapes[1:] for loss in ("gkd", "tropd")
    ]  # fmt: skip
    return jobs


def failed_first(names: Sequence[str]) -> list[Job]:
    """In one process; none where none failed."""
    if not names:
        return []
    command = first.module("benchmarks.gpu.suite", *names)
    return [Job(step="tests", name="failed", command=command, seconds=600, needs=("pytest",))]


def jobs(
    found: Sequence[Record], known: Path, carried: Path, tiny: bool, minutes: float
) -> list[Job]:
    """All of the call but its facts. known: the first call's records as a file."""
    sizes = TINY if tiny else FULL
    chunks, _ = chosen_chunks(found, sizes.tokens)
    headline = headlines(sizes, chunks)
    again = {job.name for job in headline}
    left = not_measured(found, [
        *(job for job in first.headlines(sizes) if job.name not in again), *first.baselines(sizes),
        first.clusters(carried),
    ])  # fmt: skip
    liger = replace(
        first.headline(sizes, "liger", "gkd", sizes.shapes[0]), step="baselines", seconds=50,
        needs=("gpu", "liger_kernel"),
    )  # fmt: skip
    sweep = replace(first.rows(sizes, "--sweep"), needs=("gpu", "triton"))
    rest = first.tests(sizes, "--passed", known)
    made = [
        *step(50, first.warm(sizes)), *step(45, first.smoke(sizes, failed_checks(found))),
        *step(130, [*headline, *left]), *step(165, failed_first(failed_tests(found))),
        *step(215, [liger]), *step(250, [sweep]), *step(290, [rest]),
    ]  # fmt: skip
    return scaled(made, minutes / MINUTES)
