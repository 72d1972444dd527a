"""Off-policy guidance: the teacher writes the first l tokens of a completion, the student goes on.

    l(step) = floor(alpha(step / steps) * L)         alpha from 1 to 0; L the initial length, or
                                                     that of the row's answer, as in the paper

    "cosine"    alpha(x) = (1 + cos(pi x)) / 2       TrOPD (arXiv 2606.01249)
    "linear"    alpha(x) = 1 - x
    "constant"  alpha(x) = 1
    "none"      alpha(x) = 0

The prefix comes from a column of the data set or from the teacher itself; this module cuts and
checks token ids, and knows neither models nor trainers.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SCHEDULES = ("none", "cosine", "linear", "constant")

_ALPHA: dict[str, Callable[[float], float]] = {
    "none": lambda x: 0.0,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}


def shrinking_steps(args: Any, max_steps: int) -> int:
    """Optimizer steps after which a prefix that shrinks is gone.

    Raises ValueError where no step would have one. args: a `TrOPDConfig`. max_steps: the run's.
    """
    if args.prefix_steps is not None:
        return args.prefix_steps
    steps = round(args.prefix_fraction * max_steps)
    if steps < 1 and args.prefix_schedule not in ("none", "constant"):
        of = f", of {max_steps}" if max_steps > 0 else ""
        raise ValueError(
            f"prefix_fraction: {args.prefix_fraction} of the run's steps are none{of}: no "
            "completion would have a prefix: raise it, or set prefix_steps, or prefix_schedule "
            "'none'"
        )
    return steps


def scheduled_length(schedule: str, initial: int, step: int, steps: int) -> int:
    """Length of the prefix in tokens at this step, counted from 0.

    It reaches 0 at `steps`. With steps = 0 the schedule is at its end from the start.
    """
    done = 1.0 if steps <= 0 else min(step / steps, 1.0)
    # 1e-9: the cosine schedule may end slightly below 0, which floor would take to -1.
    return math.floor(_ALPHA[schedule](done) * initial + 1e-9)


def have_column(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether the rows of a batch have the teacher's text. Raises ValueError if only some have."""
    without = [row for row in rows if column not in row]
    if without and len(without) < len(rows):
        raise ValueError(
            f"{column}: some rows of the data set have it, and {without[0]!r:.120} does not: give "
            "it to all, or to none"
        )
    return not without


def column_ids(
    answer: str | list[dict[str, str]],
    prompt: str | list[dict[str, str]],
    prompt_ids: Sequence[int],
    tokenize: Callable[[Any], list[int]],
    column: str,
) -> list[int]:
    """Token ids of the teacher's answer, as a continuation of `prompt_ids`.

    Prompt and answer are tokenized together, and the prompt's ids removed from the front: ids
    across the boundary may differ from those of the answer alone. For a conversational prompt the
    answer is one message of the assistant, in a list, or its text. tokenize: maps text or messages
    to ids.

    Raises ValueError, with the column's name, if the answer is of the wrong kind, or if the joint
    ids do not begin with the prompt's: then the student could not continue at any position.
    """
    conversation = not isinstance(prompt, str)
    if conversation and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, str if isinstance(prompt, str) else list):
        raise ValueError(
            f"{column}: expected text{' or messages' if conversation else ''} to go with the "
            f"prompt {_short(prompt)}, got {_short(answer)}"
        )
    if not isinstance(answer, str) and [
        isinstance(one, Mapping) and one.get("role") for one in answer
    ] != ["assistant"]:
        raise ValueError(
            f"{column}: expected one message of the assistant, got {_short(answer)}: what others "
            "say in between would be learned, or nothing after the first end: give the last "
            "answer, and put the messages before it into the prompt"
        )
    joint = tokenize(prompt + answer)  # type: ignore[operator]  # both text, or both messages
    if list(joint[: len(prompt_ids)]) != list(prompt_ids):
        first = first_difference(prompt_ids, joint)
        raise ValueError(
            f"{column}: {_short(answer)} does not tokenise to a continuation of its prompt "
            f"{_short(prompt)}: together they differ from the prompt's ids from token {first} on. "
            + (
                "The chat template does not render this turn of the assistant as it begins one to "
                "be generated. If it writes reasoning, or leaves it out, by the answer or by a key "
                "such as enable_thinking, let answer and chat_template_kwargs agree; else give it "
                "a template that does, by the tokenizer's chat_template"
                if conversation
                else "Let the answer begin at a token's border (usually with a space or a new line)"
            )
        )
    return list(joint[len(prompt_ids) :])


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The first index at which two sequences differ; the shorter one's length if there is none."""
    pairs = enumerate(zip(a, b))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def row_images(row: Mapping[str, Any]) -> list[Any] | None:
    """A row's images, from the columns that TRL reads: `images`, or the one in `image`."""
    if "images" in row:
        return row["images"]
    return [row["image"]] if row.get("image") is not None else None


def cut(ids: Sequence[int], length: int, eos_token_ids: Collection[int]) -> list[int]:
    """The first `length` ids, up to and including the first that ends a completion."""
    kept = list(ids[:length])
    end = next((i for i, token in enumerate(kept) if token in eos_token_ids), None)
    return kept if end is None else kept[: end + 1]


def prefix_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Mask (B, C) of the tokens of a micro-batch's completions that the teacher wrote."""
    ids = inputs["completion_ids"]
    return torch.arange(ids.shape[1], device=ids.device)[None] < inputs["prefix_lengths"][:, None]


def is_complete(prefix: Sequence[int], limit: int, eos_token_ids: Collection[int]) -> bool:
    """Whether nothing is left for the student to write."""
    return len(prefix) >= limit or (len(prefix) > 0 and prefix[-1] in eos_token_ids)


def _short(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
