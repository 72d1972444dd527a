"""The first call: what it does, and until when. Most important first, in steps with a deadline.

until   step
  5 s   facts; then the headline's kernels are compiled, while the smoke checks run
 45 s   smoke: is anything wrong?
 65 s   rates of the products, by shape
 80 s   passes over rows, against the bandwidth of a copy
150 s   the headline: ours, bare products and eager PyTorch
175 s   chunk sizes
190 s   cluster kernels
240 s   baselines
310 s   tests, until time is up
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.jobs import Job, scaled, step
from benchmarks.gpu.smoke import CHECKS, LOSSES, NEEDS_GPU

#: Of the deadlines above; the last seconds are for the tar and the tables.
MINUTES = 5.5
#: (shape, loss) of ours and eager, by what is most worth knowing.
SHAPES = ("qwen3-1.7b", "qwen3-8b-self", "liger")
#: (baseline, loss, shape).
BASELINES = (
    ("liger-fused", "gkd", "qwen3-1.7b"), ("trl", "gkd", "qwen3-1.7b"),
    ("liger-fused", "gkd", "liger"), ("cce", "sft", "qwen3-1.7b"), ("ours", "sft", "qwen3-1.7b"),
    ("trl", "gkd", "liger"), ("liger-fused", "gkd", "qwen3-8b-self"),
    ("trl", "gkd", "qwen3-8b-self"),
)  # fmt: skip
MODULES = {"liger": "liger_kernel", "liger-fused": "liger_kernel", "trl": "trl",
           "cce": "cut_cross_entropy"}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Options of each command, and the boxes' lengths."""

    tokens: int
    shapes: tuple[str, ...]
    repeats: int
    gemms: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    chunks: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    smoke: tuple[str, ...] = ()


FULL = Sizes(
    tokens=8192, shapes=SHAPES, repeats=7, rows=("--tokens", "4096", "--repeats", "7"),
    chunks=("--repeats", "5"),
)  # fmt: skip
TINY = Sizes(
    tokens=96, shapes=("small",), repeats=1, gemms=("--tiny",),
    rows=("--tokens", "16", "--vocab-size", "512", "--repeats", "1"),
    chunks=("--tokens", "160", "--repeats", "1", "--rows", "128", "--super-rows", "256"),
    tests=("tests/public/test_draws.py",), smoke=("--tiny",),
)  # fmt: skip


def module(name: str, *options: object) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *map(str, options))


def warm(sizes: Sizes) -> list[Job]:
    return [
        Job(step="warm", name=loss, seconds=55, exclusive=False, needs=("gpu",),
            command=module("benchmarks.gpu.warm", loss, "--shape", sizes.shapes[0]))
        for loss in LOSSES
    ]  # fmt: skip


def smoke(sizes: Sizes, names: Sequence[str] | None = None) -> list[Job]:
    """All checks, or those."""
    return [
        Job(step="smoke", name=name, seconds=38, exclusive=False,
            needs=("gpu",) if name in NEEDS_GPU else (),
            command=module("benchmarks.gpu.smoke", name, *sizes.smoke))
        for name in (CHECKS if names is None else names)
    ]  # fmt: skip


def gemms(sizes: Sizes) -> Job:
    command = module("benchmarks.gpu.gemms", *sizes.gemms)
    return Job(step="gemms", name="gemms", command=command, seconds=25, prestart=True)


def rows(sizes: Sizes, *options: str) -> Job:
    command = module("benchmarks.rows", *sizes.rows, *options)
    return Job(step="rows", name="sweep" if options else "rows", command=command, seconds=40,
               prestart=True)  # fmt: skip


def headline(sizes: Sizes, who: str, loss: str, shape: str, *more: object) -> Job:
    """One provider on one loss, and the bare products in the same turns."""
    command = module(
        "benchmarks.gpu.headline", who, loss, "--shape", shape, "--tokens", sizes.tokens,
        "--repeats", sizes.repeats, *more,
    )  # fmt: skip
    return Job(step="headline", name=f"{shape} {loss} {who}", command=command, seconds=25,
               prestart=True)  # fmt: skip


def headlines(sizes: Sizes) -> list[Job]:
    first, *others = sizes.shapes
    jobs = [headline(sizes, "ours", loss, first) for loss in LOSSES]
    jobs += [headline(sizes, "eager", loss, first) for loss in LOSSES]
    return jobs + [
        headline(sizes, "ours", loss, shape) for shape in others for loss in ("gkd", "tropd")
    ]


def chunks(sizes: Sizes) -> Job:
    command = module(
        "benchmarks.bench.tuning", "--shape", sizes.shapes[0], "--tokens", sizes.tokens,
        *sizes.chunks,
    )  # fmt: skip
    return Job(step="chunks", name="chunks", command=command, seconds=40, prestart=True)


def clusters(carried: Path) -> Job:
    command = module("benchmarks.gpu.clusters.launch", carried / "cubins")
    return Job(step="clusters", name="clusters", command=command, seconds=20,
               needs=("sm_90", "cupy"), prestart=True)  # fmt: skip


def baselines(sizes: Sizes) -> list[Job]:
    jobs = []
    for who, loss, shape in BASELINES:
        shape = shape if shape in sizes.shapes else sizes.shapes[0]
        job = headline(sizes, who, loss, shape)
        needs = (MODULES[who],) if who in MODULES else ()
        needs += ("gpu",) if who in ("liger-fused", "cce") else ()
        job = replace(job, step="baselines", needs=needs, seconds=20)
        if job.name not in [other.name for other in jobs]:
            jobs.append(job)
    return jobs


def tests(sizes: Sizes, *options: object) -> Job:
    command = module("benchmarks.gpu.suite", *(sizes.tests or ()), *options)
    return Job(step="tests", name="tests", command=command, seconds=600, needs=("pytest",),
               open_end=True)  # fmt: skip


def jobs(carried: Path, tiny: bool, minutes: float) -> list[Job]:
    """All of the call but its facts."""
    sizes = TINY if tiny else FULL
    found = [
        *step(50, warm(sizes)), *step(45, smoke(sizes)), *step(65, [gemms(sizes)]),
        *step(80, [rows(sizes)]), *step(150, headlines(sizes)), *step(175, [chunks(sizes)]),
        *step(190, [clusters(carried)]), *step(240, baselines(sizes)), *step(310, [tests(sizes)]),
    ]  # fmt: skip
    return scaled(found, minutes / MINUTES)
