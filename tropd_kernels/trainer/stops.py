"""Errors that stop a run on every process, and how the run can be resumed."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .progress import last_checkpoint


def how_to_resume(folder: str) -> str:
    """The end of an error message: what a stopped run can do, given the checkpoints in `folder`."""
    last = last_checkpoint(folder)
    if last is not None:
        return f"go on from {last} by resume_from_checkpoint"
    return (
        f"begin anew: no checkpoint is in {folder!r}; save_strategy and save_steps say when one is "
        "saved"
    )


@contextlib.contextmanager
def checkpoint_named(folder: str) -> Iterator[None]:
    """Adds to an error from inside which checkpoint the run can go on from, if one was saved
    inside and the error does not say so itself."""
    before = last_checkpoint(folder)
    try:
        yield
    except Exception as error:
        last = last_checkpoint(folder)
        if last not in (None, before) and str(last) not in str(error):
            error.add_note(
                f"The run can go on from {last} by resume_from_checkpoint. If a row of the data "
                "set is at fault, mend it rather than drop it: of another number of rows the order "
                "would be another"
            )
        raise


def raise_nonfinite(
    loss: float, inputs: Mapping[str, Any], folder: str, step: int, process: int
) -> None:
    """Raises FloatingPointError on every process; one whose loss is not finite saves its batch."""
    if math.isfinite(loss):
        raise FloatingPointError(f"the loss of another process is not finite at step {step}")
    path = Path(folder) / f"nonfinite_loss_step_{step}_process_{process}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"loss": loss, "step": step, "inputs": dict(inputs)}, path)
    raise FloatingPointError(
        f"the loss is {loss} at step {step}: the batch is in {path} (torch.load). The weights may "
        f"hold NaN already; lower learning_rate, or take an objective of bounded loss, and "
        f"{how_to_resume(folder)}"
    )


def raise_nonfinite_weights(step: int, folder: str) -> None:
    """Raises FloatingPointError: sampling would fail on a NaN probability with a vaguer message,
    and the end of a run would not notice."""
    raise FloatingPointError(
        f"the student's weights hold NaN or infinity at step {step}, though the losses so far were "
        "finite: lower learning_rate or max_grad_norm, or take an objective of bounded loss; if "
        "the first grad_norm in the log is NaN, the model's own backward makes it, as "
        "transformers' Gemma 3n's does behind the padding of shorter prompts: train on prompts of "
        f"one length. Then {how_to_resume(folder)}"
    )
