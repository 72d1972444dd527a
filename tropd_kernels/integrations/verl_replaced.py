"""The functions of verl and VeOmni that are replaced, for want of a hook where they stand.

| function                                                 | why                                   |
|----------------------------------------------------------|---------------------------------------|
| losses.compute_topk_loss                                 | is verl's forward KL for every name   |
| veomni's chunk_topk_distill_function                     | the same, from hidden states          |
| model_forward_fused.linear_cross_entropy (Megatron)      | gets hidden states, gives log-probs   |
| vllm_async_server.extract_prompt_logprobs                | drops a label's log-prob beyond the k |
| async_sglang_server._extract_prompt_logprobs_sglang      | the same                              |
| AsyncTeacherLLMServerManager                             |                                       |
|                         .compute_teacher_logprobs_single | verl's own losses want k columns      |

Each takes the calls for a loss of ours and hands on every other. `replace_function` says so where
one is no longer the function that was read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .frameworks import replace_function
from .verl_batch import RULES, WHOLE_ROWS, k_of, rows_of, rule_of
from .verl_rows import IGNORED, Rows, top_k_losses

#: The `Request` of the micro-batch that VeOmni's model is running on.
CURRENT: ContextVar[Any] = ContextVar("tropd_request", default=None)

_ON_LOGITS = ("config", "distillation_config", "data", "student_logits", "data_format")
_ON_HIDDEN = (
    "hidden_states", "weights", "labels", "teacher_topk_ids", "teacher_topk_log_probs",
    "chunk_size", "ignore_index", "shift_labels", "temperature", "log_prob_min_clamp",
)  # fmt: skip
_ON_HEAD = ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
_OF_VLLM = ("output", "num_prompt_logprobs", "result_dict")
_OF_SGLANG = ("meta_info", "num_prompt_logprobs", "sequence_length", "result_dict")
_OF_MANAGER = (
    "self", "sequence_ids", "multi_modal_data", "mm_processor_kwargs", "mm_processor_output",
    "routing_key",
)  # fmt: skip


def take_over_logits(losses: Any) -> None:
    """Puts `on_logits` before verl's `compute_topk_loss`, for the names registered here."""

    def ours(original: Callable) -> Callable:
        def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
            of_ours = distillation_config.distillation_loss.loss_mode in RULES
            call = on_logits if of_ours else original
            return call(config, distillation_config, data, student_logits, data_format)

        return compute_topk_loss

    replace_function(
        "verl", losses, "compute_topk_loss", ours, parameters=_ON_LOGITS, expected="1599d382534b"
    )


def on_logits(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """The losses of a top-k teacher on logits (1, n, V), or Megatron's (B, n, V / ranks). Under
    sequence parallelism n is this rank's share."""
    from verl.utils import tensordict_utils

    rule = rule_of(distillation_config)
    rows, group = rows_of(config, distillation_config, data), None
    if config.strategy == "megatron":
        rows, group = as_megatron(rows, data["input_ids"].offsets(), data_format)
    elif config.strategy not in WHOLE_ROWS:
        raise NotImplementedError(
            f"loss_mode={distillation_config.distillation_loss.loss_mode!r} was not tested with "
            f"strategy={config.strategy!r}: use {', '.join(WHOLE_ROWS)} or megatron, or a loss of "
            "a sampled teacher (tropd_opd, tropd_mask, ...)"
        )
    logits = student_logits.flatten(0, 1)
    if not tensordict_utils.get_non_tensor_data(data, key="distillation_only", default=False):
        logits = logits.clone()  # verl's own log-probs may overwrite them in their backward
    outputs = top_k_losses(
        logits, rows.labels, rows.teacher_log_probs, rows.teacher_ids, rule,
        k=k_of(distillation_config), old_log_probs=rows.old_log_probs, uniforms=rows.uniforms,
        process_group=group,
    )  # fmt: skip
    return {name: value.view(student_logits.shape[:2]) for name, value in outputs.items()}


def as_megatron(rows: Rows, offsets: Tensor, data_format: str) -> tuple[Rows, Any]:
    """The rows laid out as Megatron's logits are, by verl's own way: padded, and each rank's share
    under context parallelism; and the ranks over which the vocabulary is split."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from verl.models.mcore import util

    lay_out = util.preprocess_thd_engine if data_format == "thd" else util.preprocess_bshd_engine

    def laid_out(values: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(values, offsets)
        return lay_out(nested, pre_process=True)[0].flatten(0, 1)

    found = {name: laid_out(v) for name, v in vars(rows).items() if v is not None}
    # Padding is 0, which would be a label: those that count are laid out as 1.
    counts = laid_out((rows.labels != IGNORED).long()) > 0
    found["labels"] = found["labels"].masked_fill(~counts, IGNORED)
    return Rows(**found), get_tensor_model_parallel_group()


def take_over_hidden(cross_entropy: Any) -> None:
    """Puts `on_hidden` before VeOmni's `chunk_topk_distill_function`, for the request at hand."""

    def ours(original: Callable) -> Callable:
        def chunk_topk_distill_function(hidden_states, weights, *arguments, **named):
            request = CURRENT.get()
            if request is None:
                return original(hidden_states, weights, *arguments, **named)
            found = request.of_head(
                hidden_states.squeeze(0), weights, temperature=named.get("temperature", 1.0)
            )
            entropy = found.get("entropy", found["log_probs"])  # which verl did not ask for
            names = ("distillation_losses", "student_mass", "teacher_mass")
            values = (found["log_probs"], entropy, *(found[name] for name in names))
            return tuple(value.unsqueeze(0) for value in values)

        return chunk_topk_distill_function

    replace_function(
        "veomni", cross_entropy, "chunk_topk_distill_function", ours,
        parameters=_ON_HIDDEN, expected="f9fb38d6ceef",
    )  # fmt: skip


def take_over_head(fused: Any, kernel: Any) -> None:
    """Puts ours before `linear_cross_entropy`, which verl calls with the hidden states and this
    rank's part of Megatron's head, for the request at hand. fused: verl's module that calls it;
    kernel: the one that has it."""

    def ours(original: Callable) -> Callable:
        def linear_cross_entropy(hidden, weight, labels, temperature, reduction, group):
            request = CURRENT.get()
            if request is None:
                return original(hidden, weight, labels, temperature, reduction, group)
            hidden = hidden.flatten(0, -2)
            if len(hidden) != len(request.labels):
                raise NotImplementedError(
                    f"Megatron has {len(hidden)} rows where the batch has {len(request.labels)}: a "
                    "fused distillation loss takes no padding by pad_to_length or for fp8. Leave "
                    "it out, or set actor_rollout_ref.model.use_fused_kernels=false"
                )
            if request.sums_d_hidden and hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient / group.size())  # ours is the sum
            found = request.of_head(hidden, weight, temperature=temperature, process_group=group)
            names = ("distillation_losses", "student_mass", "teacher_mass")
            request.found |= {name: found[name] for name in names if name in found}
            return found["log_probs"], found.get("entropy", found["log_probs"])

        return linear_cross_entropy

    replace_function(
        "verl", fused, "linear_cross_entropy", ours, source=kernel.LinearCrossEntropy.forward,
        parameters=_ON_HEAD, expected="3f0631b40a0f",
    )  # fmt: skip


def keep_labels(server: Any) -> None:
    """In the module of a teacher's server: the label's log-prob is one more column, the last,
    beside the top k."""
    if hasattr(server, "_extract_prompt_logprobs_sglang"):

        def of_sglang(original: Callable) -> Callable:
            def extract(meta_info, num_prompt_logprobs, sequence_length, result_dict):
                original(meta_info, num_prompt_logprobs, sequence_length, result_dict)
                if num_prompt_logprobs:
                    labels = [(i, lp) for lp, i, _ in meta_info["input_token_logprobs"][1:]]
                    add_column(result_dict, labels)

            return extract

        replace_function(
            "verl", server, "_extract_prompt_logprobs_sglang", of_sglang,
            parameters=_OF_SGLANG, expected="f80d59b6c5c7",
        )  # fmt: skip
        return

    def of_vllm(original: Callable) -> Callable:
        def extract_prompt_logprobs(output, num_prompt_logprobs, result_dict):
            original(output, num_prompt_logprobs, result_dict)
            if num_prompt_logprobs:
                # vLLM puts the prompt's own token first.
                first = [next(iter(found.items())) for found in output.prompt_logprobs[1:]]
                add_column(result_dict, [(token, entry.logprob) for token, entry in first])

        return extract_prompt_logprobs

    replace_function(
        "verl", server, "extract_prompt_logprobs", of_vllm,
        parameters=_OF_VLLM, expected="7a3dfe3e8c60",
    )  # fmt: skip


def add_column(result: dict[str, list], labels: list[tuple[Any, float]]) -> None:
    """Appends each position's label and log-prob to verl's lists, whose last row is a dummy."""
    for row, (token, log_prob) in enumerate([*labels, (0, 0.0)]):
        result["prompt_ids"][row].append(int(token))
        result["prompt_logprobs"][row].append(float(log_prob))


def cut_for_others(manager: Any) -> None:
    """Takes the label's column away again where the loss is one of verl's own."""

    def ours(original: Callable) -> Callable:
        async def compute_teacher_logprobs_single(self, *arguments, **named):
            ids, log_probs = await original(self, *arguments, **named)
            settings = self.distillation_loss_config
            if settings.loss_settings.use_topk and settings.loss_mode not in RULES:
                ids, log_probs = ids[:, : settings.topk], log_probs[:, : settings.topk]
            return ids, log_probs

        return compute_teacher_logprobs_single

    replace_function(
        "verl", manager, "compute_teacher_logprobs_single", ours,
        parameters=_OF_MANAGER, expected="6d67cd33736f",
    )  # fmt: skip
