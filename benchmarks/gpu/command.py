"""The options, and one call from the facts of the machine to the tables."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, records
from benchmarks.gpu import baselines, first, second
from benchmarks.gpu.jobs import Facts, Job
from benchmarks.gpu.runner import Runner

#: Time limit of the job that reads the facts of the machine.
FACTS_SECONDS = 40
#: Length of the tables at the end: of a long output often only the last 12,000 characters are kept.
CHARACTERS = 11_000
TABLES_SECONDS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every job ended well; 1 where one did not; 2 where nothing could be begun."""
    options = parse(arguments)
    start = time.monotonic()
    try:
        before = second.load(options.after) if options.after else None
        if options.after and options.after.resolve() == options.out.resolve():
            raise ValueError("it is also --out, which begins empty: name another folder there")
    except ValueError as error:
        print(f"--after: {error}", file=sys.stderr)
        return 2
    try:
        folder = emptied(options.out)
    except OSError as error:
        print(f"--out: {error}; name a folder that can be written", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-logs-") as logs:
        environment = baselines.environment(options.carried, Path(logs))
        runner = Runner(
            folder, Path(logs), environment, max(2, (os.cpu_count() or 2) - 1),
            clock=lambda: time.monotonic() - start,
        )  # fmt: skip
        handlers = stop_by_signal(runner)
        try:
            facts = read_facts(runner)
            runner.run(jobs_of(options, before, facts, Path(logs)), facts)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        pack(folder, Path(logs))
        print_tables(folder, environment)
    found, _ = records.read(folder / "results.jsonl")
    return 0 if all(record.get("state") in (None, "done", "skipped") for record in found) else 1


def jobs_of(
    options: argparse.Namespace, before: list[records.Record] | None, facts: Facts | None,
    folder: Path,
) -> list[Job]:  # fmt: skip
    """Of the first call, or of the second; folder: for a copy of what is known."""
    if before is None:
        return first.jobs(options.carried, options.tiny, options.minutes or first.MINUTES)
    sizes = first.TINY if options.tiny else first.FULL
    lines = [second.chosen_chunks(before, sizes.tokens)[1], second.other_card(before, facts)]
    for line in filter(None, lines):
        print(f"!  {line}", flush=True)
    known = folder / "known.jsonl"
    for record in before:
        records.append(known, record)
    minutes = options.minutes or second.MINUTES
    return second.jobs(before, known, options.carried, options.tiny, minutes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="What a GPU has to tell, in one call."
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu", help="a folder; what lies there goes")
    add("--carried", type=Path, default=ROOT / "build" / "carry",
        help="what `python -m benchmarks.gpu.prepare` made; default: build/carry")  # fmt: skip
    add("--after", type=Path, metavar="FOLDER",
        help="of an earlier call: what that leaves to ask; without it, the first call")  # fmt: skip
    add("--minutes", type=minutes,
        help=f"default: {first.MINUTES:g}, and {second.MINUTES:g} with --after")  # fmt: skip
    add("--tiny", action="store_true", help="every step, small, on a CPU too")
    return parser.parse_args(arguments)


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 24 * 60:
        raise argparse.ArgumentTypeError(f"must be more than 0 and less than a day, got {text}")
    return value


def emptied(out: Path) -> Path:
    """The folder, without an earlier call's files: records of two calls must not mix."""
    folder = out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "logs.txt", "gpu.tar.gz"):
        (folder / name).unlink(missing_ok=True)
    (folder / "results.jsonl").touch()
    return folder


def stop_by_signal(runner: Runner) -> dict[int, Any]:
    """A call that is asked to end stops its jobs, and still packs and prints; the handlers that
    were there before are returned."""

    def handle(number: int, frame: object) -> None:
        runner.stop(f"the call got {signal.Signals(number).name}")

    return {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}


def read_facts(runner: Runner) -> Facts | None:
    """The facts of the machine; None if they cannot be read: then every job is tried."""
    job = Job(step="facts", name="facts", seconds=FACTS_SECONDS,
              command=first.module("benchmarks.gpu.facts"))  # fmt: skip
    runner.run([job], None)
    found, _ = records.read(runner.results)
    for record in found:
        if isinstance(record.get("facts"), dict):
            for line in record.get("warnings", []):
                print(f"!  {line}", flush=True)
            return record["facts"]
    print("!  the machine's facts are not known: every job is tried", flush=True)
    return None


def pack(folder: Path, logs: Path) -> None:
    """Records and logs in one file."""
    try:
        with tarfile.open(folder / "gpu.tar.gz", "w:gz") as tar:
            tar.add(folder / "results.jsonl", "results.jsonl")
            for log in sorted(logs.glob("*.log")):
                tar.add(log, f"logs/{log.name}")
    except OSError as error:
        print(f"!  no gpu.tar.gz: {error}", flush=True)


def print_tables(folder: Path, environment: dict[str, str]) -> None:
    """In a process of its own, which imports torch: if it fails, the records are safe."""
    command = first.module("benchmarks.gpu.tables", folder / "results.jsonl")
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True,
            errors="replace", timeout=TABLES_SECONDS,
        )  # fmt: skip
        text = done.stdout if done.returncode == 0 else f"no tables: {done.stderr[-500:]}"
    except subprocess.TimeoutExpired:
        text = "no tables: they took too long"
    print(text[-CHARACTERS:], flush=True)
