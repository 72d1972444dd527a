"""Everything that needs a GPU, in one call of nine minutes: tests, table, rows, chunk sizes.

    python -m benchmarks.gpu --out FOLDER           on the machine with the GPU
    python -m benchmarks.gpu --tiny --out FOLDER    every step on whatever is here, in a minute

Needs torch, triton and pytest. TROPD_RIVALS names a folder of wheels: those are unpacked and found
by the table, and whoever has none there shows as not installed.

Each step is a process of its own with a share of the time, and its output in a log; one that runs
out of time is stopped, and what it has measured by then stays. Short tables come last, since of a
long output often the end alone is kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import table
from benchmarks.bench.results import read

ROOT = Path(__file__).resolve().parents[1]
RIVALS = "TROPD_RIVALS"
#: Tests that compile kernels, by what is most worth knowing first.
SUITES = (
    "tests/test_correctness.py", "tests/test_triton_rows.py", "tests/test_numbers.py",
    "tests/test_infinities.py", "tests/test_memory.py", "tests/test_compile.py",
    "tests/test_agreement.py", "tests/test_autograd.py", "tests/test_draws.py",
    "tests/test_autocast.py", "tests/test_tolerance.py", "tests/test_selection.py",
)  # fmt: skip
#: Compiling takes most of a minute for each loss, so two stand for all, in a step of their own.
COMPILED = ("tropd", "gkd")
WITHOUT_COMPILE = ("triton", "torch", "eager", "lean", "liger", "liger-fused", "trl", "fla",
                   "torch-lce", "cce", "quack")  # fmt: skip
SHAPE = "--shape qwen3-1.7b --tokens 8192 --repeats 7"
CHUNKS = "--shape qwen3-1.7b --tokens 8192 --repeats 5"
TINY_SHAPE = (
    "--shape small --vocab-size 512 --hidden-size 32 --teacher-hidden-size 48 --tokens 96 "
    "--repeats 1 --losses tropd"
)
TINY_ROWS = "--tokens 16 --vocab-size 512 --repeats 1"
TINY_CHUNKS = "--shape small --tokens 160 --repeats 1 --rows 128 --super-rows 128 256"


@dataclass(frozen=True)
class Step:
    """share: of the whole time; what a step leaves goes to those after it."""

    name: str
    command: list[str]
    share: float


def steps(folder: Path, tiny: bool) -> list[Step]:
    def module(name: str, *options: str) -> list[str]:
        return [sys.executable, "-m", name, *options]

    def bench(out: str, *options: str) -> list[str]:
        sizes = TINY_SHAPE if tiny else SHAPE
        return module("benchmarks.bench", *sizes.split(), *options, "--out", str(folder / out))

    who = ("ours", "eager") if tiny else WITHOUT_COMPILE
    compiled = ("eager",) if tiny else ("eager", "compile")
    chunks = (TINY_CHUNKS if tiny else CHUNKS).split()
    rows = TINY_ROWS.split() if tiny else ["--sweep"]
    return [
        Step("tests", module("pytest", *tests(tiny)), 0.30),
        Step("table", bench("gpu.json", "--providers", *who), 0.36),
        Step("rows", module(
            "benchmarks.rows", *rows, "--out", str(folder / "gpu_rows.json")
        ), 0.10),
        Step("chunks", module(
            "benchmarks.bench.tuning", *chunks, "--out", str(folder / "gpu_tuning.json")
        ), 0.12),
        Step("compiled", bench(
            "gpu_compiled.json", "--losses", *COMPILED, "--providers", "ours", *compiled
        ), 0.12),
    ]  # fmt: skip


def tests(tiny: bool) -> list[str]:
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if tiny:
        return [*quiet, "tests/test_draws.py"]
    # Kernels compile on the processor: several workers keep one GPU busy.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [*quiet, *workers, "-k", "triton or gpu", *SUITES]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every step ended well in its time, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, default=8.7, help="for all steps together")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too")
    options = parser.parse_args(arguments)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    states = {}
    with tempfile.TemporaryDirectory() as unpacked:
        environment = environment_with(Path(unpacked))
        left = 60 * options.minutes
        todo = steps(folder, options.tiny)
        for i, step in enumerate(todo):
            start = time.monotonic()
            weight = step.share / sum(later.share for later in todo[i:])
            states[step.name] = run(step, weight * left, folder, environment)
            left -= time.monotonic() - start
            print(f"{step.name}: {states[step.name]}", flush=True)
    print(summary(folder, states))
    return 0 if all(state.startswith("done") for state in states.values()) else 1


def environment_with(unpacked: Path) -> dict[str, str]:
    """The wheels of TROPD_RIVALS, unpacked: Triton reads its kernels' sources from files."""
    wheels = sorted(Path(os.environ[RIVALS]).glob("*.whl")) if os.environ.get(RIVALS) else []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    print(f"rivals: {', '.join(wheel.name.split('-')[0] for wheel in wheels) or 'no wheels'}")
    paths = [str(ROOT), str(unpacked), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run(step: Step, seconds: float, folder: Path, environment: dict[str, str]) -> str:
    """How it ended, in one line. Its children are stopped with it."""
    start = time.monotonic()
    log = folder / f"{step.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s; last line: {last_line(log)}"
    took = f"{time.monotonic() - start:.0f} s"
    if status == 0:
        return f"done in {took}" + (f"; {last_line(log)}" if step.name == "tests" else "")
    return f"FAILED with status {status} after {took}; last line: {last_line(log)}"


def last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "none"


def summary(folder: Path, states: dict[str, str]) -> str:
    parts = []
    for name in ("gpu", "gpu_compiled"):
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(table.short(read(path).rows))
    for log in (folder / "rows.log", folder / "chunks.log"):
        if log.exists():
            parts.append("\n".join(log.read_text("utf-8").strip().splitlines()[:30]))
    parts.append("\n".join(f"{name}: {state}" for name, state in states.items()))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
