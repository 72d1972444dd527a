"""Prints the tables, rewrites them in docs/scaling.md, runs the check."""

import argparse
import json
from pathlib import Path

from benchmarks import ROOT, markdown

from . import check, plan

DOCUMENT = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results" / "scaling_cpu.json"
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"


def tables() -> dict[str, str]:
    """Every generated part of the document, by name."""
    parts = {
        "forms": plan.forms_table(), "room": plan.room_table(), "workspace": plan.workspace_table(),
        "parts": plan.parts_table(), "share": plan.share_table(), "step": plan.step_table(),
        "communication": plan.communication_table(),
    }  # fmt: skip
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())
        parts |= {
            "machine": check.machine_line(found["machine"]),
            "bytes measured": check.bytes_check_table(found["bytes"]),
            "workspace measured": check.workspace_check_table(found["workspace"]),
            "share measured": check.share_check_table(found["shares"]),
        }
    return parts


def write(document: Path) -> None:
    text = document.read_text()
    for name, part in tables().items():
        begin, end = BEGIN.format(name), END.format(name)
        text = text.replace(markdown.block(text, begin, end), f"{begin}\n{part}\n{end}")
    document.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="measure the small runs here first")
    parser.add_argument("--write", action="store_true", help="rewrite the tables of the document")
    arguments = parser.parse_args()
    if arguments.check:
        RESULTS.write_text(json.dumps(check.check(), indent=1) + "\n")
    for name, part in tables().items():
        print(f"{name}\n\n{part}\n")
    if arguments.write:
        write(DOCUMENT)


if __name__ == "__main__":
    main()
