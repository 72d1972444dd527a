"""Fields that a processor makes of prompts besides ids and mask: types of tokens, pixels, grids.

Generation reads all of them, and so must the loss, or it would be that of another model. A
per-token field has as many numbers in a row as the prompt has ids, and grows with what is written
after it; pixels and grids stay. TRL's loss takes the fields of a fixed list, and in a batch without
images none at all: `KeptFields` holds the others.
"""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .router import base_of

#: What `token_type_ids` gives a written token, where that is not 0. PaliGemma's 0 is the prefix,
#: in which every token attends to every other: 1 is what comes after it.
_WRITTEN = {"paligemma": 1}
#: How the names of fields end that give a token's type. How another per-token field would go on
#: after the prompt (position_ids count) is not ours to know.
_TYPES = "token_type_ids"
#: In a batch, before the name of a field that TRL leaves out.
_KEPT = "field:"


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


@dataclass(frozen=True, eq=False)
class KeptFields:
    """Fields of a generation batch's prompts that TRL's loss leaves out.

    types: of each prompt a number a token. pixels: arrays with as many rows as pixel_values.
    """

    types: Mapping[str, list[list[int]]]
    pixels: Mapping[str, Any]

    def tensors(self, batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Entries of the batch (in TRL's form, before it is split into micro-batches): tensors
        (B, P + C), and of pixels a list of each row's, where pixel_values will be one too."""
        kept = {}
        ids, completions = batch["prompt_ids"], batch["completion_ids"]
        width = ids.shape[1]
        for name, rows in self.types.items():
            whole = ids.new_zeros(len(ids), width + completions.shape[1])
            whole[:, width:] = written_type(name, config)
            for row, values in zip(whole, rows, strict=True):
                row[width - len(values) : width] = torch.tensor(values)
            kept[_KEPT + name] = whole
        for name, pixels in self.pixels.items():
            value = torch.as_tensor(np.asarray(pixels)).to(ids.device)
            kept[_KEPT + name] = _split(name, value, batch)
        return kept


def kept_fields(
    fields: Mapping[str, Any],
    prompt_ids: Sequence[Sequence[int]],
    model: PreTrainedModel,
    taken_by_trl: Collection[str],
) -> KeptFields:
    """What is left of a processor's fields of these prompts when TRL has taken its own.

    Raises NotImplementedError for a field that the model reads and that we cannot take along.
    """
    base = base_of(model)
    reads, whole = (inspect.signature(part.forward).parameters for part in (base.base_model, base))
    types, pixels = {}, {}
    for name in fields.keys() - {"labels", *taken_by_trl}:
        if name in reads and name.endswith(_TYPES):
            nothing = [0] * len(prompt_ids)
            types[name] = _extended(fields[name], prompt_ids, nothing, 0)
        elif name in reads and _goes_with_pixels(name, fields):
            pixels[name] = fields[name]
        elif name in reads or name in whole:
            raise NotImplementedError(
                f"processing_class: {name!r}, which it makes of the prompts and a "
                f"{type(base).__name__} reads, cannot be taken along into the loss, which would "
                "be that of another model than generation's: choose a model without it"
            )
    return KeptFields(types, pixels)


@contextlib.contextmanager
def reading(model: PreTrainedModel, inputs: Mapping[str, Any], **others: Any) -> Iterator[None]:
    """Gives a micro-batch's kept fields, and `others`, to the model's backbone in the forwards
    inside, as far as it reads them."""
    backbone = base_of(model).base_model
    reads = inspect.signature(backbone.forward).parameters
    kept = {
        name.removeprefix(_KEPT): torch.cat(value) if isinstance(value, list) else value
        for name, value in inputs.items()
        if name.startswith(_KEPT)
    }
    kept = {name: value for name, value in kept.items() if has_rows(kept, name)}
    given = {name: value for name, value in (kept | others).items() if name in reads}

    def add(module, arguments, keywords):
        return arguments, keywords | given

    hook = backbone.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def has_rows(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether a micro-batch has something in this field: no pixels where no row has an image,
    though others of the generation batch have."""
    return name in inputs and len(inputs[name]) > 0


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
    if name.endswith(_TYPES):  # where a processor padded them the lengths differ
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


def _goes_with_pixels(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a field's rows are those of pixel_values: images, tiles, or rows of the batch."""
    if "pixel" not in name or "pixel_values" not in fields or "image_grid_thw" in fields:
        return False  # with a grid the rows are patches
    return len(fields[name]) == len(fields["pixel_values"])


def _split(name: str, value: Tensor, batch: Mapping[str, Any]) -> Any:
    """In the way in which TRL splits pixel_values."""
    pixels, images = batch["pixel_values"], batch["num_images"]
    if len(value) != len(pixels):
        raise NotImplementedError(
            f"processing_class: {name!r} has {len(value)} rows and pixel_values {len(pixels)}: "
            "images in a tool's answer go only with models that read no such field"
        )
    if "num_tiles" in batch:
        return list(value.split(batch["num_tiles"]))
    return list(value.split(images)) if len(value) == sum(images) else value
