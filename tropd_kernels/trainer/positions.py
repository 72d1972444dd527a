"""Where a padded row's positions begin: at its first token, as in generation.

TRL's loss passes no positions, so a model would count the padding on the left. That is wrong where
positions are learned (GPT-2), where position 0 resets a state (RecurrentGemma), where positions
scale the attention (Ministral 3) or where the largest of them sets the scale of the others. Models
with positions of several dimensions (Qwen2-VL's: time, height, width) compute them themselves.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from .patching import base_of

#: Model types whose first position is not 0.
_FIRST_POSITION = {"paligemma": 1}


def positions_after_padding(model: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """position_ids (B, L) that count from the first token that is not padding, for the backbone.

    Empty for a model that computes them itself, or that does not read any.

    Raises:
        ValueError: A multimodal model does not read any, and a row begins with padding.
    """
    base = base_of(model)
    if base.config.get_text_config() is not base.config:
        if computes_positions(base):
            return {}
        reads = inspect.signature(base.base_model.forward).parameters
        if "position_ids" not in reads and bool((mask[:, 0] == 0).any()):
            raise ValueError(
                f"a {base.config.model_type} model takes no position_ids, so that its positions "
                "may count the padding in front of a prompt: choose another model, or give prompts "
                "of one length, without pad_to_multiple_of"
            )
    first = _FIRST_POSITION.get(base.config.model_type, 0)
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0) + first}


def check_mask(model: PreTrainedModel, mask: Tensor) -> None:
    """Raises ValueError for padding in front of a prompt where the model takes no notice of it.

    The backbone's forward tells: one that names `input_ids` but no `attention_mask` lets the mask
    vanish among its further keywords (xLSTM). One that names neither passes both on.
    """
    base = base_of(model)
    reads = inspect.signature(base.base_model.forward).parameters
    if "input_ids" in reads and "attention_mask" not in reads and bool((mask[:, 0] == 0).any()):
        raise ValueError(
            f"a {base.config.model_type} model takes no attention_mask, so that its hidden states "
            "behind the padding in front of a prompt would not be those of the prompt alone: "
            "choose another model, or give prompts of one length, without pad_to_multiple_of"
        )


def computes_positions(model: Any) -> bool:
    """Whether a multimodal model's positions are its own matter, in generation as well.

    model: Without PEFT's wrapper.
    """
    if any(hasattr(part, "get_rope_index") for part in (model, model.base_model)):
        return True
    name = "_prepare_position_ids_for_generation"
    return getattr(type(model), name, None) is not getattr(GenerationMixin, name, None)
