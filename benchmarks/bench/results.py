"""The rows of the table, and the JSON file that keeps them.

A file holds what a reader needs to judge the rows: the command, machine and versions, shape, dtype,
and under `--plot` the ceilings that the machine reached. It is written after every loss, so that a
run that is cut short keeps what it has.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench.shapes import Shape
from benchmarks.measure import Times

#: Providers' names in stored results, and what they are called now.
RENAMED = {"lean": "checkpointed"}


@dataclass(frozen=True)
class Row:
    """One provider on one loss. Seconds and bytes; `reason` says why there are no figures.

    to_gemms: time over that of the bare products, timed in the same turns. peak: over the inputs;
    workspace: over the inputs and the returned gradients. error: of the gradients, against float64.
    """

    tokens: int
    loss: str
    who: str
    forward: Times | None = None
    backward: Times | None = None
    both: Times | None = None
    to_gemms: float | None = None
    peak: int | None = None
    workspace: int | None = None
    error: float | None = None
    reason: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.both is None else self.tokens / self.both.median


@dataclass(frozen=True)
class Results:
    """facts: what the file says besides its rows."""

    facts: dict[str, Any]
    rows: list[Row]

    @property
    def shape(self) -> Shape:
        shape = self.facts["shape"]
        return Shape(**{key: shape.get(key) for key in Shape.__dataclass_fields__})

    def write(self, path: Path) -> None:
        """By a second file: a run that ends while it writes leaves the last one whole."""
        rows = [asdict(row) | {"tokens_per_second": row.tokens_per_second} for row in self.rows]
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.facts | {"rows": rows}, indent=1) + "\n", "utf-8")
        part.replace(path)


def read(path: Path) -> Results:
    """Raises ValueError where the file is none of ours."""
    try:
        found = json.loads(path.read_text("utf-8"))
        rows = found.pop("rows")
        return Results(found, [row_of(row) for row in rows])
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{path.name} is not a file of results: expected the JSON that `tropd bench` writes"
        ) from error


def is_results(path: Path) -> bool:
    """Whether a JSON file holds rows of this table; the folder holds others."""
    found = json.loads(path.read_text("utf-8"))
    return "machine" in found and "rows" in found


def row_of(record: dict[str, Any]) -> Row:
    """The row in a JSON record, whose other keys are left out."""
    row = {key: value for key, value in record.items() if key in Row.__dataclass_fields__}
    row["who"] = RENAMED.get(row["who"], row["who"])
    halves = ("forward", "backward", "both")
    return Row(**row | {key: Times(**row[key]) for key in halves if row.get(key)})
