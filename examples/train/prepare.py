"""Writes what `run.yaml` reads: the teacher, the student and the prompts, in build/train/."""

import json
import sys

from examples.demo import DemoError
from examples.demo.__main__ import CACHE, REPOSITORY
from examples.demo.damage import damaged
from examples.demo.model import load_teacher
from examples.demo.prompts import PROMPTS

FOLDER = REPOSITORY / "build" / "train"


def main() -> int:
    try:
        teacher, tokenizer = load_teacher(CACHE)
    except DemoError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    student = damaged(teacher, tokenizer)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(FOLDER / name)
        tokenizer.save_pretrained(FOLDER / name)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (FOLDER / "prompts.jsonl").write_text(lines, encoding="utf-8")
    print(FOLDER.relative_to(REPOSITORY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
