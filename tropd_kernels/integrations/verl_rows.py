"""verl's losses on plain tensors, from logits and from hidden states and a head. (`log_probs` has
those from log-probs.) Each takes n tokens and knows nothing of verl.

The student is at the temperature of the rollout, the teacher as its log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..functional import distillation_loss, linear_distillation_loss
from ..objectives import TokenRule
from ..outputs import DistillationOutput
from ..teachers import SampledTeacher, Teacher, TopKTeacher

IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """What verl's batch says of n packed rows, row i being about token i + 1.

    labels: int64, `IGNORED` where the token does not count. teacher_ids, teacher_log_probs: (n, 1)
    of a sampled teacher, (n, k) of a top-k one, or (n, k + 1), the label's own coming last.
    """

    labels: Tensor
    teacher_ids: Tensor
    teacher_log_probs: Tensor
    uniforms: Tensor
    old_log_probs: Tensor | None = None

    def of_call(self) -> dict[str, Any]:
        """The arguments that every loss of ours takes."""
        return dict(
            old_log_probs=self.old_log_probs, uniforms=self.uniforms, ignore_index=IGNORED,
            reduction="none",
        )  # fmt: skip

    def teacher(self, rule: TokenRule, k: int | None) -> tuple[Teacher, TokenRule]:
        """The teacher, and the rule with its top_k set to k. A label whose log-prob is not known
        counts as one that the teacher rules out. k: None for a sampled teacher."""
        hit = self.teacher_ids == self.labels.unsqueeze(-1)
        known = torch.where(hit, self.teacher_log_probs, -torch.inf).amax(-1)
        if k is None:
            return SampledTeacher(known.masked_fill(self.labels < 0, 0.0)), rule
        if rule.top_k is not None:
            rule = replace(rule, top_k=k)
        ids = self.teacher_ids[..., :k].long()
        return TopKTeacher(ids, self.teacher_log_probs[..., :k].contiguous(), known), rule

    def carried(self, out: DistillationOutput, k: int | None) -> dict[str, Tensor]:
        """What verl takes from here to the loss."""
        found = {"distillation_losses": out.loss, "tropd_trust": out.stats.trust}
        if out.stats.score is not None:
            found["tropd_score"] = out.stats.score
        if k is not None:
            found["student_mass"] = out.stats.student_topk_mass
            found["teacher_mass"] = out.stats.teacher_topk_mass
            hit = self.teacher_ids[..., :k] == self.labels.unsqueeze(-1)
            found["tropd_label_in_topk"] = hit.any(-1).to(out.loss.dtype)
        return found


def top_k_losses(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n), -100 where a token does not count
    teacher_log_probs: Tensor,  # (n, k), or (n, k + 1) with the label's own
    teacher_ids: Tensor,  # (n, k), or (n, k + 1)
    rule: TokenRule,
    *,
    k: int | None = None,
    old_log_probs: Tensor | None = None,  # (n)
    uniforms: Tensor | None = None,  # (n)
    backend: str | None = None,
    process_group: Any = None,
) -> dict[str, Tensor]:
    """What verl carries from the logits to the loss, each (n), by name: the loss of each token,
    the masses of the k ids, the gate's M, whether the label is among the k ids, and the score by
    which the rule selects tokens, if it does.

    k: how many of the columns are the top-k; by default all. process_group: the ranks over which
    the logits are split.
    """
    rows = Rows(labels, teacher_ids, teacher_log_probs, uniforms, old_log_probs)
    k = k or teacher_ids.shape[-1]
    teacher, rule = rows.teacher(rule, k)
    out = distillation_loss(
        logits, labels, teacher, rule, backend=backend, process_group=process_group,
        **rows.of_call(),
    )  # fmt: skip
    return rows.carried(out, k)


def head_losses(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    rows: Rows,
    rule: TokenRule,
    k: int | None,
    **head: Any,
) -> dict[str, Tensor]:
    """The same from hidden states and a head, without logits; k None for a sampled teacher.

    head: bias, logit_scale, softcap, temperature, process_group and backend of
    `linear_distillation_loss`.
    """
    teacher, rule = rows.teacher(rule, k)
    out = linear_distillation_loss(
        hidden, weight, rows.labels, teacher, rule, **head, **rows.of_call()
    )
    return rows.carried(out, k) | {"log_probs": out.stats.log_probs}
