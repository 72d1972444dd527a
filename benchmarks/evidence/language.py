"""A language model: SmolLM2-135M-Instruct teaches a copy of itself that lost three of its layers.

The models are the demo's, `examples.demo.model`. The teacher is in the process, so that every arm
has what it asks for: OPD the sampled token's log-prob, TrOPD's outliers the top 64, reverse KL and
GKD the whole vocabulary of 49,152 ids.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.learning.arms import settings
from benchmarks.learning.measures import Result
from benchmarks.learning.run import Measured, Run, trained
from examples.demo.judge import distance
from examples.demo.model import load_teacher, make_student

from . import questions
from .records import named

#: Of the teacher's 30 layers, evenly spaced.
LAYERS = 27
STUDENT = f"{LAYERS} of 30 layers"
BATCH = 4
TOKENS = 32
#: Steps between two measurements on the held-out questions.
EVERY = 20
#: Of the samples by which students are measured: the same for all.
JUDGED = 0


def record_of(run: Run, arm: Mapping[str, Any], cache: Path) -> Result:
    """One run, and what is kept of it."""
    torch.set_num_threads(1)
    teacher, tokenizer = load_teacher(cache / "models")
    student = make_student(teacher, LAYERS)
    given = settings(arm, run.seed, run.steps, run.learning_rate)
    given |= {"per_device_train_batch_size": BATCH, "max_completion_length": TOKENS}
    judged = {"new_tokens": TOKENS, "seed": JUDGED, "dtype": torch.float32}
    measured = Measured(
        lambda model: distance(model, teacher, tokenizer, questions.HELD_OUT, **judged), EVERY
    )
    logs, of_run = trained(student, teacher, given, _asked(run), tokenizer, measured)
    return named(
        run,
        {
            "held_out_kl": measured.values,
            "entropy": [log["entropy"] for log in logs],
            "grad_norm": [log["grad_norm"] for log in logs],
            "trust": [log["tropd/trust_ratio"] for log in logs],
            **of_run,
        },
    )


def _asked(run: Run) -> Dataset:
    """Questions for every step, drawn with this seed; the same for every arm."""
    rng = random.Random(f"questions {run.seed}")
    rows = [rng.choice(questions.TRAIN) for _ in range(run.steps * BATCH)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in rows]})
