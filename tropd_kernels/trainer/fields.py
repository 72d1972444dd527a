"""Fields that a processor makes of prompts besides ids and mask: types of tokens, pixels, grids.

A per-token field has as many numbers in a row as the prompt has ids, and grows with what is
written after it; pixels and grids stay.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

#: What `token_type_ids` gives a written token, where that is not 0. PaliGemma's 0 is the prefix,
#: in which every token attends to every other: 1 is what comes after it.
_WRITTEN = {"paligemma": 1}


def written_type(name: str, config: Any) -> int:
    """The number that a per-token field gives to a token written after the prompt.

    config: of the model that reads the field.
    """
    if name != "token_type_ids":
        return 0
    return _WRITTEN.get(getattr(config, "model_type", ""), 0)


def mark_written(batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    """The types (B, P + C) of a generation batch whose completions are not of TRL's type, 0."""
    written = written_type("token_type_ids", config)
    if written == 0 or "token_type_ids" not in batch:
        return {}
    types = batch["token_type_ids"].clone()
    types[:, batch["prompt_ids"].shape[1] :] = written
    return {"token_type_ids": types}


def extend_token_fields(
    fields: Mapping[str, Any],
    prompt_ids: Sequence[Sequence[int]],
    added: Sequence[int],
    config: Any,
) -> dict[str, Any]:
    """The fields that a processor made of these prompts, once `added` tokens follow each of them.

    config: of the model that reads them.
    """
    return {
        name: _extended(value, prompt_ids, added, written_type(name, config))
        if _is_per_token(name, value, prompt_ids)
        else value
        for name, value in fields.items()
    }


def _is_per_token(name: str, value: Any, prompt_ids: Sequence[Sequence[int]]) -> bool:
    if name.endswith("token_type_ids"):  # where a processor padded them the lengths differ
        return True
    return (
        isinstance(value, list)
        and len(value) == len(prompt_ids)
        and all(isinstance(row, list) for row in value)
        and [len(row) for row in value] == [len(ids) for ids in prompt_ids]
    )


def _extended(
    value: Any, prompt_ids: Sequence[Sequence[int]], added: Sequence[int], written: int
) -> list[list[int]]:
    rows = value if isinstance(value, list) else value.tolist()
    # From the right, as any padding is on the left.
    return [
        [*row, *[written] * more][-(len(ids) + more) :]
        for row, ids, more in zip(rows, prompt_ids, added, strict=True)
    ]
