"""A teacher that reads a prompt of its own, from the column `teacher_prompt`.

Its prompt holds what the student is not told: a solution, a demonstration, feedback (SDFT, arXiv
2601.19897; OPSD, 2601.18734; SDPO, 2601.20802). Both sides read the same completion:

    student   [padding, prompt,         completion, padding]
    teacher   [padding, teacher_prompt, completion, padding]

Prompts are padded on the left, so the last C positions of a row are the completion's on either
side, however long the prompts are: the loss compares those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

COLUMN = "teacher_prompt"
#: Why each row has to have it.
OTHERS_HAVE_IT = "the training data has it, and an evaluation reads what training reads"
NOTHING_ELSE = "with teacher_model 'self' the student is taught nothing without it"
_IDS, _MASK = f"{COLUMN}_ids", f"{COLUMN}_mask"


def missing_error(row: Mapping[str, Any], why: str) -> ValueError:
    """For a row of a stream that lacks the column. why: `OTHERS_HAVE_IT` or `NOTHING_ELSE`."""
    return ValueError(
        f"{COLUMN}: the row {row!r:.200} has none: {why}: give the column to all rows of all data "
        "sets"
    )


def batch_tensors(
    prompt_ids: Sequence[Sequence[int]], padding: Any, multiple: Any, device: Any
) -> dict[str, Tensor]:
    """Ids and mask (B, P) of the teacher's prompts, padded as TRL pads the student's."""
    rows = [torch.tensor(ids) for ids in prompt_ids]
    return {
        name: pad(each, value, padding_side="left", pad_to_multiple_of=multiple).to(device)
        for name, each, value in (
            (_IDS, rows, padding), (_MASK, [torch.ones_like(row) for row in rows], 0),
        )
    }  # fmt: skip


def teachers_view(inputs: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch as the teacher reads it."""
    if _IDS not in inputs:
        return inputs
    return inputs | {"prompt_ids": inputs[_IDS], "prompt_mask": inputs[_MASK]}


def refuse_fields(is_vlm: bool, fields: Mapping[str, Any]) -> None:
    """Raises NotImplementedError where a prompt is more than ids, which belong to the student's."""
    if is_vlm or fields:
        what = "a processor of images" if is_vlm else f"a tokenizer that makes {sorted(fields)}"
        raise NotImplementedError(
            f"{COLUMN}: a teacher reads a prompt of its own as ids alone, and processing_class is "
            f"{what}: give the teacher the student's prompt, or take models of text"
        )
