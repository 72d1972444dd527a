"""The objectives as slime's custom loss (and that of miles), for a teacher that scores the tokens.

    --loss-type custom_loss --custom-loss-function-path tropd_kernels.integrations.slime.loss
    --custom-config-path tropd.yaml     # tropd_objective: power_opd, tropd_knobs: {}, tropd_seed: 0

slime gives logits (1, T, V / ranks) of packed samples, whose vocabulary Megatron has split over
the tensor-parallel ranks: they go into `distillation_loss` as they are, with that group. The batch
has the teacher's log-probs of each response's tokens where slime's on-policy distillation asks for
them (`--use-opd`); leave its coefficient, which would add them to the advantages, out of it: this
loss reads no advantages. Options of slime's own loss that would have no effect are refused. Written
from slime/backends/megatron_utils/loss.py at 624b824, and miles' at 00c9154, whose teacher's
log-probs are of whole samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import distillation_loss
from ..teachers import SampledTeacher
from .log_probs import check_rule, named_rule, token_uniforms

#: Of slime's own loss, with the value that asks for nothing.
NOT_READ = dict(
    use_tis=False, use_opsm=False, use_kl_loss=False, use_score_centering=False, entropy_coef=0.0,
    rollout_top_p=1.0,
)  # fmt: skip


def loss(
    args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's (loss, metrics) of a micro-batch."""
    from megatron.core import mpu

    name, knobs = getattr(args, "tropd_objective", "opd"), getattr(args, "tropd_knobs", None) or {}
    rule = check_rule("slime", named_rule("tropd_knobs", name, knobs), logits=True)
    for option, usual in NOT_READ.items():
        if getattr(args, option, usual) != usual:
            raise ValueError(
                f"slime: --{option.replace('_', '-')} is read by slime's own loss, and has no "
                f"effect on this one: leave it {usual!r}, got {getattr(args, option)!r}"
            )
    if mpu.get_context_parallel_world_size() > 1:
        raise NotImplementedError("slime: context parallelism splits the samples: set it to 1")
    if batch.get("teacher_log_probs") is None:
        raise ValueError(
            "slime: the batch has no teacher_log_probs: set --use-opd and --opd-type, or give them "
            "in a rollout function of your own"
        )
    tokens, totals, lengths = (
        batch[key] for key in ("unconcat_tokens", "total_lengths", "response_lengths")
    )
    old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    # Row i of the packed samples is about token i + 1.
    ends = torch.tensor([0, *totals]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(e - r, e) - 1 for e, r in zip(ends[1:], lengths)])
    rows = rows.to(logits.device)
    ids = torch.cat([sample.to(logits.device) for sample in tokens])
    draws = token_uniforms(getattr(args, "tropd_seed", 0), ids, torch.tensor(ends).to(ids.device))

    def of_responses(values: list[Tensor]) -> Tensor:
        cut = (v[len(v) - n :].to(logits.device) for v, n in zip(values, lengths))
        return torch.cat(list(cut)).float()

    teacher = SampledTeacher(of_responses(batch["teacher_log_probs"]))
    out = distillation_loss(
        logits.squeeze(0)[rows], ids[rows + 1], teacher, rule,
        temperature=args.rollout_temperature, uniforms=draws[rows],
        old_log_probs=of_responses(old) if old else None, reduction="none", ignore_index=None,
        process_group=mpu.get_tensor_model_parallel_group(),
    )  # fmt: skip
    found = sum_of_sample_mean(out.loss)
    if not len(rows):
        found = found + 0 * logits.sum()  # so that every rank's backward is the same
    trust = sum_of_sample_mean(out.stats.trust.nan_to_num(1.0))
    return found, {"loss": found.detach(), "trust": trust.detach()}
