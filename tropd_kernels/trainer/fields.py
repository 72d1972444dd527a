"""Fields that a processor makes of prompts besides ids and mask: token types, pixels, grids.

Generation reads all of them, so the loss must, too, or it would be that of another model. A
per-token field has one number for each id of the prompt and grows with the completion; pixels and
grids do not. TRL's loss takes a fixed list of fields, and in a batch without images none at all:
`KeptFields` holds the others.
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

from .patching import added_keywords, base_of

#: `token_type_ids` of a generated token, where it is not 0. PaliGemma's 0 is the prefix, in which
#: every token attends to every other; 1 follows it.
_WRITTEN = {"paligemma": 1}
#: Suffix of the names of fields with token types. Other per-token fields are not supported: how
#: they continue after the prompt differs (position_ids count).
_TYPES = "token_type_ids"
#: Prefix, in a batch, of the name of a field that TRL leaves out.
_KEPT = "field:"
#: Images (B,) of each row of a batch whose pixels have an item a row.
_IMAGES = "images_of_row"


def written_type(name: str, config: Any) -> int:
    """The value of a model's per-token field for a token that is generated after the prompt."""
    if name != "token_type_ids":
        return 0
    return _WRITTEN.get(getattr(config, "model_type", ""), 0)


def mark_written(batch: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    """token_type_ids (B, P + C) of a generation batch, if its completions' type is not TRL's 0."""
    written = written_type("token_type_ids", config)
    if written == 0 or "token_type_ids" not in batch:
        return {}
    types = batch["token_type_ids"].clone()
    types[:, batch["prompt_ids"].shape[1] :] = written
    return {"token_type_ids": types}


def keep_padded_rows(batch: dict[str, Any]) -> None:
    """Has TRL leave pixels alone that have an item for each row, padded to the most images of a row
    (Idefics, SmolVLM).

    With as many images as rows TRL would take them for an item an image, and give rows those of
    others.
    """
    pixels = batch.get("pixel_values")
    # With sizes they have an item for each image, padded to the most tiles (LLaVA-NeXT).
    if pixels is not None and pixels.ndim == 5 and "image_sizes" not in batch:
        if (images := batch.pop("num_images", None)) is not None:
            batch[_IMAGES] = torch.tensor(images, device=pixels.device)


@dataclass(frozen=True, eq=False)
class KeptFields:
    """Fields of a generation batch's prompts that TRL's loss leaves out.

    Attributes:
        types: For each prompt one number per token.
        pixels: Arrays with as many rows as pixel_values.
    """

    types: Mapping[str, list[list[int]]]
    pixels: Mapping[str, Any]

    def __or__(self, other: "KeptFields") -> "KeptFields":
        return KeptFields({**self.types, **other.types}, {**self.pixels, **other.pixels})

    def tensors(self, batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Entries for a batch in TRL's form, before it is split into micro-batches.

        Tensors (B, P + C); for pixels a list with one item per row where TRL splits pixel_values
        into such a list.
        """
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


def read_fields(fields: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A processor's fields without those that neither the model's forward nor its generation reads:
    token types of a tokenizer of other models.

    Raises NotImplementedError for pixels beside a model of text.
    """
    base = base_of(model)
    reads = _read_by(base)
    if "pixel_values" in fields.keys() - reads:
        raise NotImplementedError(
            f"images: a {type(base).__name__} does not see them, and would read their tokens as "
            "text: choose a model that does, or leave the images out"
        )
    return {name: value for name, value in fields.items() if name in reads}


def _read_by(base: Any) -> set[str]:
    """The keywords that the forwards of a model and its backbone name, and its generation."""
    parts = [base.base_model.forward, base.forward]
    parts += [getattr(base, "prepare_inputs_for_generation", base.forward)]
    return {name for part in parts for name in inspect.signature(part).parameters}


def kept_fields(
    fields: Mapping[str, Any],
    prompt_ids: Sequence[Sequence[int]],
    model: PreTrainedModel,
    taken_by_trl: Collection[str],
) -> KeptFields:
    """A processor's fields of these prompts without those that TRL takes.

    Raises NotImplementedError for a field that the model reads and the loss cannot pass.
    """
    base = base_of(model)
    reads, whole = inspect.signature(base.base_model.forward).parameters, _read_by(base)
    types, pixels = {}, {}
    for name in fields.keys() - {"labels", *taken_by_trl}:
        if name in reads and name.endswith(_TYPES):
            nothing = [0] * len(prompt_ids)
            types[name] = _extended(fields[name], prompt_ids, nothing, 0)
        elif name in reads and _goes_with_pixels(name, fields):
            pixels[name] = fields[name]
        elif name in whole:
            raise NotImplementedError(
                f"processing_class: {name!r}, which it makes of the prompts and a "
                f"{type(base).__name__} reads, cannot be taken along into the loss, which would "
                "be that of another model than generation's: choose a model without it"
            )
    return KeptFields(types, pixels)


@contextlib.contextmanager
def passing_fields(
    model: PreTrainedModel, inputs: Mapping[str, Any], **others: Any
) -> Iterator[None]:
    """Passes a micro-batch's kept fields, and `others`, to the backbone's forwards inside.

    Only arguments of the backbone's `forward` are passed.
    """
    backbone = base_of(model).base_model
    reads = inspect.signature(backbone.forward).parameters
    kept = {
        name.removeprefix(_KEPT): torch.cat(value) if isinstance(value, list) else value
        for name, value in inputs.items()
        if name.startswith(_KEPT)
    }
    kept = {name: value for name, value in kept.items() if has_rows({**inputs, **kept}, name)}
    given = {name: value for name, value in (kept | others).items() if name in reads}
    with added_keywords(backbone, **given):
        yield


def has_rows(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether a micro-batch has a value in this field.

    It has no pixels if none of its rows has an image, though the generation batch may have some:
    none at all, or the padding of its rows alone, of which some models cannot make features.
    """
    if name not in inputs or len(inputs[name]) == 0:
        return False
    images = inputs.get(_IMAGES, inputs.get("num_images"))  # the latter in a batch in TRL's form
    return images is None or name.endswith(_TYPES) or bool(torch.as_tensor(images).any())


def extend_token_fields(
    fields: Mapping[str, Any],
    prompt_ids: Sequence[Sequence[int]],
    added: Sequence[int],
    config: Any,
) -> dict[str, Any]:
    """A processor's fields of these prompts after `added` tokens have been appended to each."""
    return {
        name: _extended(value, prompt_ids, added, written_type(name, config))
        if _is_per_token(name, value, prompt_ids)
        else value
        for name, value in fields.items()
    }


def fields_of_rows(fields: Mapping[str, Any], places: Sequence[int], rows: int) -> dict[str, Any]:
    """A processor's fields of these of a batch's prompts.

    Raises NotImplementedError for a field that has not one item for each of the `rows` prompts.
    """
    for name, value in fields.items():
        if not hasattr(value, "__len__") or len(value) != rows:
            raise NotImplementedError(
                f"teacher_models: {name!r}, which processing_class makes of {rows} prompts, has "
                "not an item for each, so that it cannot be split by teacher: give one "
                "teacher_model, or take another tokenizer"
            )
    return {name: [value[i] for i in places] for name, value in fields.items()}


def _is_per_token(name: str, value: Any, prompt_ids: Sequence[Sequence[int]]) -> bool:
    if name.endswith(_TYPES):  # a processor may have padded them to other lengths
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
    # Counted from the right, since padding is on the left.
    return [
        [*row, *[written] * more][-(len(ids) + more) :]
        for row, ids, more in zip(rows, prompt_ids, added, strict=True)
    ]


def _goes_with_pixels(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a field has the rows of pixel_values: images, tiles, or rows of the batch."""
    if "pixel" not in name or "pixel_values" not in fields or "image_grid_thw" in fields:
        return False  # with a grid the rows are patches
    return len(fields[name]) == len(fields["pixel_values"])


def _split(name: str, value: Tensor, batch: Mapping[str, Any]) -> Any:
    """Splits a field as TRL splits pixel_values."""
    pixels, images = batch["pixel_values"], batch.get("num_images")
    if len(value) != len(pixels):
        raise NotImplementedError(
            f"processing_class: {name!r} has {len(value)} rows and pixel_values {len(pixels)}: "
            "images in a tool's answer go only with models that read no such field"
        )
    if "num_tiles" in batch:
        return list(value.split(batch["num_tiles"]))
    return value if images is None or len(value) != sum(images) else list(value.split(images))
