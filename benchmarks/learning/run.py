"""One run: one arm, one student, one seed, through `TrOPDTrainer`. Settings in, curves out."""

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

from . import arms, models, task
from .collect import hardware

#: Optimiser steps between two measurements of accuracy.
EVERY = 10
#: The trainer's metrics that are kept for each step, and what they are called here.
CURVES = {
    "grad_norm": "grad_norm",
    "entropy": "entropy",
    "loss": "loss",
    "tropd/trust_ratio": "trust_ratio",
    "tropd/reverse_kl": "reverse_kl",
    "tropd/forward_kl": "forward_kl",
    "tropd/reward_mean": "reward_mean",
    "tropd/reward_min": "reward_min",
    "tropd/teacher_topk_mass": "teacher_topk_mass",
    "tropd/student_topk_mass": "student_topk_mass",
    "tropd/prefix_length": "prefix_length",
    "tropd/prefix_nll": "prefix_nll",
}


@dataclass(frozen=True)
class Run:
    """What distinguishes one run from another."""

    mismatch: str
    arm: str
    seed: int
    steps: int = arms.STEPS
    learning_rate: float = arms.LEARNING_RATE

    def path(self, folder: Path) -> Path:
        name = f"{self.arm}_{self.steps}_{self.learning_rate:g}_{self.seed}.json"
        return folder / self.mismatch / name


class Measured(TrainerCallback):
    """Measures the student before training, every `every` steps and at the end.

    A measurement draws none of the run's random numbers, so that runs stay as they were.
    """

    def __init__(self, measure: Callable[[Any], Any], every: int):
        self.measure, self.every = measure, every
        self.steps: list[int] = []
        self.values: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **rest):
        self._measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **rest):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(model, state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        self.steps.append(step)
        self.values.append(self.measure(model))


def trained(
    student: Any,
    teacher: Any,
    given: Mapping[str, Any],
    rows: Dataset,
    tokenizer: Any,
    measured: Measured,
    trainer_class: type[TrOPDTrainer] = TrOPDTrainer,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains the student: each step's log, and what a record says of every run.

    given: settings of `TrOPDConfig`."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            student,
            teacher,
            TrOPDConfig(folder, **given),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[measured],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return logs, {
        "seconds": time.perf_counter() - start,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def train(
    run: Run,
    cache: Path,
    arm: Mapping[str, Any] | None = None,
    trainer_class: type[TrOPDTrainer] = TrOPDTrainer,
) -> dict[str, Any]:
    """Trains and measures. `cache`: where pre-trained models are kept; `arm`: settings of the arm,
    where its name is none of `arms`."""
    task_name = models.STUDENTS[run.mismatch].task
    writing = task.TASKS[task_name]
    teacher = models.load_teacher(task_name, cache)
    student = models.load_student(run.mismatch, run.seed, cache)
    arm = arm or (arms.ARMS | arms.SELECTIONS)[run.arm]
    given = arms.settings(arm, run.seed, run.steps, run.learning_rate)
    given |= {"max_completion_length": writing.longest + 1}
    accuracy = Measured(lambda model: models.evaluate(model, writing), EVERY)
    logs, of_run = trained(
        student, teacher, given, prompts(run), writing.tokenizer(), accuracy, trainer_class
    )
    return {
        **asdict(run),
        "settings": given,
        "eval_steps": accuracy.steps,
        "accuracy": [value["accuracy"] for value in accuracy.values],
        "notation": [value["notation"] for value in accuracy.values],
        "curves": {ours: [log.get(theirs) for log in logs] for theirs, ours in CURVES.items()},
        **of_run,
    }


def prompts(run: Run) -> Dataset:
    """Problems of this seed, a fresh one for each completion; the same for every arm."""
    rng = random.Random(f"prompts {run.seed}")
    rows = [" ".join(task.prompt(task.draw(rng))) for _ in range(run.steps * arms.BATCH)]
    return Dataset.from_dict({"prompt": rows})


def pretrain(recipe: models.Recipe, seed: int, folder: Path) -> None:
    """Makes the model, unless it is there; for a worker process."""
    torch.set_num_threads(1)
    models.load(recipe, seed, folder / "models")


def train_to_file(run: Run, folder: Path) -> Path:
    """`train`, unless its file is there; for a worker process."""
    path = run.path(folder / "runs")
    if path.exists():
        return path
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = train(run, folder / "models")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(path)
    return path
