"""Results as JSON lines, appended as they come, so that a crash loses none of them.

    emit(what="copy", gbs=2900)       one line on stdout, and in the file that TROPD_RECORDS names
    read(path)                        (records, number of other lines)

Each line is one write to a file opened for appending, so that several processes may share it. Under
`benchmarks.gpu` each line also names its step and job.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

#: Environment of a process whose results are collected: the file, and the fields of each line.
FILE, FIELDS = "TROPD_RECORDS", "TROPD_RECORD_FIELDS"
#: Set for a process that is started before its turn, so that its imports cost it no time.
TURN = "TROPD_TURN"

#: Exit status of a process whose records say what failed.
RECORDED_FAILURE = 3

Record = dict[str, Any]


def emit(**fields: Any) -> None:
    """One record: on stdout, and where a runner collects them."""
    print(line_of(fields), flush=True)
    if os.environ.get(FILE):
        append(Path(os.environ[FILE]), json.loads(os.environ.get(FIELDS, "{}")) | fields)


def append(path: Path, record: Record) -> None:
    """A file whose last line was cut off gets its end first, so that only that line is lost."""
    data = (line_of(record) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data
        os.write(file, data)
    finally:
        os.close(file)


def read(path: Path) -> tuple[list[Record], int]:
    """The records of a file, and how many of its lines are not records: a writer may have been
    killed, or have printed garbage. A missing file has no lines."""
    if not path.exists():
        return [], 0
    found: list[Record] = []
    bad = 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            bad += 1
    return found, bad


def line_of(record: Record) -> str:
    """Strict JSON, which knows no NaN and no infinity: those are written as text."""
    return json.dumps(_plain(record), ensure_ascii=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def wait_for_turn() -> None:
    """After the imports: returns once the runner says so, at once without a runner."""
    if os.environ.get(TURN):
        sys.stdin.readline()
