"""verl's settings and batch, as the losses want them: the rule of a configuration, and the rows of
a micro-batch. verl is imported where it is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives import TokenRule
from .log_probs import token_uniforms
from .verl_rows import IGNORED, Rows

#: The rules registered so far, by name.
RULES: dict[str, TokenRule] = {}
#: Those of them that need the label's log-prob from a top-k teacher.
NEEDS_LABEL: set[str] = set()
#: The strategies whose logits or hidden states have the whole vocabulary.
WHOLE_ROWS = ("fsdp", "fsdp2", "veomni")


def rule_of(distillation_config: Any) -> TokenRule:
    """The rule of `loss_mode`; raises ValueError for settings that would make it another."""
    settings = distillation_config.distillation_loss
    for name, wanted, written, why in (
        ("use_policy_gradient", False, "false", "would be taken for a reward"),
        ("log_prob_min_clamp", None, "null", "clamps no log-prob"),
    ):
        if getattr(settings, name) != wanted:
            raise ValueError(
                f"loss_mode={settings.loss_mode!r} is back-propagated as it is, and {why}: set "
                f"distillation.distillation_loss.{name}={written}, got {getattr(settings, name)!r}"
            )
    return RULES[settings.loss_mode]


def k_of(distillation_config: Any) -> int | None:
    """How many ids of the teacher the loss gets; None for a sampled teacher."""
    settings = distillation_config.distillation_loss
    return settings.topk if settings.loss_settings.use_topk else None


def rows_of(config: Any, distillation_config: Any, data: Any, pad: int = 0) -> Rows:
    """The rows of a packed micro-batch, `pad` rows that do not count behind them; under Ulysses
    this rank's share."""
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
    from verl.workers.utils.padding import no_padding_2_padding

    ids = data["input_ids"].values()
    counted = padded(data["response_mask"]).bool()
    # The rows whose next token counts, found by verl's own way from rows to responses.
    rows = no_padding_2_padding(torch.arange(ids.shape[0], device=ids.device), data)[counted]
    flat = {
        "counts": torch.zeros_like(ids).index_fill(0, rows, 1),
        "labels": ids.roll(-1),
        "teacher_ids": data["teacher_ids"].values(),
        "teacher_log_probs": data["teacher_logprobs"].values().float(),
        "uniforms": uniforms_of(config, data),
    }
    if (old := data.get("old_log_probs", None)) is not None:
        old = padded(old)[counted].float()
        flat["old_log_probs"] = old.new_zeros(ids.shape[0]).index_copy(0, rows, old)
    if pad:
        flat = {k: torch.cat([v, v.new_zeros(pad, *v.shape[1:])]) for k, v in flat.items()}
    if get_ulysses_sequence_parallel_world_size() > 1:
        flat = {k: slice_input_tensor(v.unsqueeze(0), dim=1)[0] for k, v in flat.items()}
    counts = flat.pop("counts") > 0
    flat["labels"] = torch.where(counts, flat["labels"].long(), IGNORED)
    found = Rows(**flat)
    check_label(distillation_config, found)
    return found


def check_label(distillation_config: Any, rows: Rows) -> None:
    """Raises RuntimeError where a rule needs a log-prob that the teacher did not send."""
    settings = distillation_config.distillation_loss
    width = rows.teacher_ids.shape[-1]
    if settings.loss_mode in NEEDS_LABEL and width <= (k_of(distillation_config) or 0):
        raise RuntimeError(
            f"loss_mode={settings.loss_mode!r} needs the teacher's log-prob of each token beside "
            f"its top {settings.topk}, and this batch has {width} a token: serve the teacher with "
            "vllm or sglang, and set VERL_USE_EXTERNAL_MODULES for its processes, too"
        )


def uniforms_of(config: Any, data: Any) -> Tensor:
    """The gate's draws, one a row."""
    ids = data["input_ids"]
    return token_uniforms(config.data_loader_seed, ids.values(), ids.offsets())


def padded(tensor: Tensor) -> Tensor:
    """(B, R) of a nested tensor, or the tensor itself."""
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor
