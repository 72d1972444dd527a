"""Guidance: the teacher begins each answer, and leaves more to the student at every step.

    python -m examples.prefixes

The first step is written by the teacher alone, and its share of each answer falls to nothing on a
cosine, as in TrOPD's paper. The log says how long the prefixes are, and what
the student thinks of them: `tropd/prefix_length` falls, `tropd/prefix_nll` should.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer


def main(arguments: list[str] | None = None) -> list[float]:
    """The mean length of the prefixes, step by step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="build/train/student")
    parser.add_argument("--teacher", default="build/train/teacher")
    parser.add_argument("--prompts", type=Path, default=Path("build/train/prompts.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("build/prefixes"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    trainer = TrOPDTrainer(
        model=given.student,
        teacher_model=given.teacher,
        args=TrOPDConfig(
            str(given.out),
            objective="tropd",
            prefix_schedule="cosine",
            prefix_relative=True,
            max_completion_length=given.tokens,
            max_steps=given.steps,
            per_device_train_batch_size=4,
            logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=not gpu, bf16=gpu,
        ),
        train_dataset=load_dataset("json", data_files=str(given.prompts), split="train"),
    )  # fmt: skip
    trainer.train()
    logged = [log for log in trainer.state.log_history if "tropd/prefix_length" in log]
    return [log["tropd/prefix_length"] for log in logged][: given.steps]


if __name__ == "__main__":
    main()
