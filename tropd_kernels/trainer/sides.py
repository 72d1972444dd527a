"""One model on one micro-batch, as the fused loss takes it: hidden states and head, no logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..heads import Head, current
from ..teachers import HiddenTeacher
from .context import check_width
from .fields import has_rows, passing_fields, read_fields
from .hooks import MULTIMODAL_FIELDS
from .patching import base_of, evaluation_mode
from .positions import check_mask, positions_after_padding

#: Models whose hidden states have been found to be free of the padding.
_FREE_OF_PADDING: WeakSet[PreTrainedModel] = WeakSet()
#: How many tokens tell it, behind how many of padding.
_TOKENS, _PADDING = 32, 8
#: Relative changes of a hidden state by padding that no rounding makes: of a row's first token, of
#: half of its tokens in float32 with TF32 (which kernels may take on their own), and without.
_LARGE, _TF32, _FLOAT32 = 0.2, 1e-2, 1e-4


@dataclass(frozen=True, eq=False)
class ModelSide:
    """A model's hidden states (B, C, H) and its head, both in the dtype of the matrix product.

    hidden[:, i] predicts token i of the completion.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def of_ids(self, count: int) -> "ModelSide":
        """The side with a head of the ids below `count`."""
        if count >= len(self.weight):
            return self
        bias = None if self.bias is None else self.bias[:count]
        return replace(self, weight=self.weight[:count], bias=bias)

    def as_teacher(self) -> HiddenTeacher:
        bias = None if self.bias is None else self.bias.detach()
        return HiddenTeacher(
            self.hidden.detach(), self.weight.detach(), bias, self.logit_scale, self.softcap
        )


def read_side(
    model: PreTrainedModel,
    head: Head,
    inputs: dict[str, Any],
    last_hidden_state: Callable[..., Tensor],
) -> ModelSide:
    """Runs the backbone of a model without accelerate's wrappers on a micro-batch.

    head: as `sharding.read_head_form` gives it. last_hidden_state: TRL's `_get_last_hidden_state`.
    """
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    check_width(mask.shape[1], model.config)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    check_mask(model, mask)
    _check_padding(model, ids, mask, last_hidden_state)
    fields = {name: inputs[name] for name in MULTIMODAL_FIELDS if has_rows(inputs, name)}
    fields = read_fields(fields, model)
    with passing_fields(model, inputs, **positions_after_padding(model, mask)):
        hidden = last_hidden_state(model, ids, mask, inputs["completion_ids"].shape[1], **fields)
    return side_of(hidden, current(head, model))  # an engine may have put shards into its place


def side_of(hidden: Tensor, head: Head) -> ModelSide:
    """Hidden states with the head that reads them, on its device."""
    weight, bias, device = head.weight, head.bias, head.weight.device
    dtype = weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    usable = slice(head.vocab_size)
    weight, bias = weight[usable].to(dtype), None if bias is None else bias[usable].to(dtype)
    return ModelSide(hidden.to(device, dtype), weight, bias, head.logit_scale, head.softcap)


@torch.no_grad()
def _check_padding(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, last_hidden_state: Callable[..., Tensor]
) -> None:
    """Raises ValueError where the padding in front of a prompt reaches its hidden states although
    the model takes a mask, as in transformers' first RWKV.

    Seen once for each model, by a row behind its padding and alone. In half precision, where a
    router may send a token elsewhere by a rounding, by its first token alone, which then reads
    nothing else. Not of models that see images, and not of sharded ones, whose processes would have
    to do it together.
    """
    base = base_of(model)
    if base in _FREE_OF_PADDING:
        return
    tokens = mask.sum(1) * (mask[:, 0] == 0)  # of rows behind padding
    row = int(tokens.argmax())
    if tokens[row] < 2:
        return
    if base.config.get_text_config() is not base.config or any(
        hasattr(part, "ds_id") or hasattr(part, "device_mesh") for part in base.parameters()
    ):
        return
    first, found = int(mask[row].argmax()), []
    count = min(int(tokens[row]) - 1, _TOKENS)  # the last predicts nothing
    with evaluation_mode(model):
        for start in (max(first - _PADDING, 0), first):
            place = slice(row, row + 1), slice(start, first + count + 1)
            with passing_fields(model, {}, **positions_after_padding(model, mask[place])):
                found.append(last_hidden_state(model, ids[place], mask[place], count)[0].float())
    change = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    if change[0] > _LARGE or change.median() > _rounding_of(base, ids.device):
        raise ValueError(
            f"a {base.config.model_type} model takes an attention_mask and does not heed it, so "
            "that padding in front of a prompt changes its hidden states: choose another model, or "
            "give prompts of one length, without pad_to_multiple_of"
        )
    _FREE_OF_PADDING.add(base)


def _rounding_of(model: PreTrainedModel, device: torch.device) -> float:
    """A relative change of most hidden states that rounding does not make."""
    half = any(part.dtype not in (torch.float32, torch.float64) for part in model.parameters())
    error = _error_of_products(device)
    if half or torch.is_autocast_enabled(device.type) or error > 1e-3:  # bf16's is twice that
        return _LARGE
    return _FLOAT32 if device.type == "cpu" and error < 1e-5 else _TF32


def _error_of_products(device: torch.device) -> float:
    """Relative error of a float32 product, whose factors `torch.set_float32_matmul_precision` and
    its like let some processors round to TF32 or bf16."""
    factor = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact, there = factor.double() @ factor.double(), factor.to(device)
    return float(((there @ there).cpu().double() - exact).norm() / exact.norm())
