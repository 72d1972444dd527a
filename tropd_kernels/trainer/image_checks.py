"""Whether a teacher sees the images of prompts as the student's processor makes them.

One processor, the student's, makes pixels and grids for both sides. A teacher of another family, or
with another image token or patch size, would read them as something else. A teacher of text is no
matter of this module: `fields.read_fields` refuses the images.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .hooks import MULTIMODAL_FIELDS
from .patching import base_of

#: What a config says of how an image becomes tokens: its own entries ...
_OF_MODEL = ("image_token_id", "mm_tokens_per_image", "scale_factor", "image_grid_pinpoints",
             "vision_feature_select_strategy", "projector_patch_to_query_dict")  # fmt: skip
#: ... and those of its vision_config.
_OF_VISION = ("patch_size", "image_size", "spatial_merge_size", "temporal_patch_size")


def check_sight(
    student: PreTrainedModel, teacher: PreTrainedModel, processor: Any, teacher_processor: Any
) -> None:
    """Raises ValueError where the teacher would read other images than the student.

    Args:
        student: A model that sees images.
        teacher: A model, perhaps one of text.
        processor: The student's.
        teacher_processor: The teacher's image processor, or None where it is not found.
    """
    ours, theirs = base_of(student), base_of(teacher)
    if any(getattr(side.config, "vision_config", None) is None for side in (ours, theirs)):
        return
    differ = _differing(_facts(ours.config), _facts(theirs.config))
    made = _pixels_of(getattr(processor, "image_processor", None))
    unread = _reads(ours) - _reads(theirs)
    differ += [
        f"the student reads {name!r} and the teacher does not"
        for name in (*made, "token_type_ids", "mm_token_type_ids")
        if name in unread
    ]
    if not differ and teacher_processor is not None:
        differ = _differing_pixels(made, _pixels_of(teacher_processor))
    if differ:
        kinds = f"{theirs.config.model_type} and {ours.config.model_type}"
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"teacher_model: it sees images otherwise than the student ({kinds}): "
            f"{'; '.join(differ[:3])}{more}. Both read what the student's processor makes: "
            "choose a teacher with the student's image processor, as those of its family have"
        )


def _facts(config: Any) -> dict[str, Any]:
    facts = {name: getattr(config, name, None) for name in _OF_MODEL}
    if facts["image_token_id"] is None:
        facts["image_token_id"] = getattr(config, "image_token_index", None)
    return facts | {name: getattr(config.vision_config, name, None) for name in _OF_VISION}


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {_shown(value)} for the student and {_shown(theirs[name])} for the teacher"
        for name, value in ours.items()
        if theirs[name] != value
    ]


def _shown(value: Any) -> str:
    return "not in the config" if value is None else f"{value}"


def _reads(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.base_model.forward).parameters) & set(MULTIMODAL_FIELDS)


def _pixels_of(image_processor: Any | None) -> dict[str, torch.Tensor]:
    """What becomes of one image, of a single color, which no resampling changes."""
    from PIL import Image

    if image_processor is None:
        return {}
    made = image_processor(images=[Image.new("RGB", (96, 64), (200, 120, 40))], return_tensors="pt")
    return {name: value for name, value in made.items() if torch.is_tensor(value)}


def _differing_pixels(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> list[str]:
    """Another mean, deviation or scale. Sizes and tiles are choices, and not compared."""
    if "pixel_values" not in ours.keys() & theirs.keys():
        return []
    # Zeros are padding.
    pairs = [made["pixel_values"].float() for made in (ours, theirs)]
    ends = [torch.stack(pixels[pixels != 0].aminmax()) for pixels in pairs]
    if (ends[0] - ends[1]).abs().max() <= 0.01:  # of values of about 1
        return []
    shown = ("{:.3g} to {:.3g}".format(*of_one.tolist()) for of_one in ends)
    return [
        "the student's processor makes pixels of {} of an image, the teacher's of {}".format(*shown)
    ]
