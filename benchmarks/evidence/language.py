"""A language model: SmolLM2-135M-Instruct teaches a copy of itself that lost three of its layers.

The models are the demo's, `examples.demo.model`. The teacher is in the process, so that every arm
has what it asks for: OPD the sampled token's log-prob, TrOPD's outliers the top 64, reverse KL and
GKD the whole vocabulary of 49,152 ids.
"""

import random
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks.learning.arms import settings
from benchmarks.learning.collect import hardware
from benchmarks.learning.measures import Result
from benchmarks.learning.run import Run
from examples.demo.judge import distance
from examples.demo.model import load_teacher, make_student
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

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


class _Distance(TrainerCallback):
    """Measures before training, every `EVERY` steps and at the end."""

    def __init__(self, teacher: Any, tokenizer: Any):
        self.models = teacher, tokenizer
        self.values: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **rest):
        self._measure(model)

    def on_step_end(self, args, state, control, model=None, **rest):
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            self._measure(model)

    def _measure(self, student: Any) -> None:
        self.values.append(
            distance(
                student,
                *self.models,
                questions.HELD_OUT,
                new_tokens=TOKENS,
                seed=JUDGED,
                dtype=torch.float32,
            )
        )


def record_of(run: Run, arm: Mapping[str, Any], cache: Path) -> Result:
    """One run, and what is kept of it."""
    torch.set_num_threads(1)
    teacher, tokenizer = load_teacher(cache / "models")
    student = make_student(teacher, LAYERS)
    given = settings(arm, run.seed, run.steps, run.learning_rate)
    given |= {"per_device_train_batch_size": BATCH, "max_completion_length": TOKENS}
    measured = _Distance(teacher, tokenizer)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TrOPDTrainer(
            student,
            teacher,
            TrOPDConfig(folder, **given),
            train_dataset=_asked(run),
            processing_class=tokenizer,
            callbacks=[measured],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return named(
        run,
        {
            "held_out_kl": measured.values,
            "entropy": [log["entropy"] for log in logs],
            "grad_norm": [log["grad_norm"] for log in logs],
            "trust": [log["tropd/trust_ratio"] for log in logs],
            "seconds": time.perf_counter() - start,
            "hardware": hardware(),
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        },
    )


def _asked(run: Run) -> Dataset:
    """Questions for every step, drawn with this seed; the same for every arm."""
    rng = random.Random(f"questions {run.seed}")
    rows = [rng.choice(questions.TRAIN) for _ in range(run.steps * BATCH)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in rows]})
