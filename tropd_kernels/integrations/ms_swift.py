"""The objectives in ms-swift's GKD trainer.

    # tropd.py, for swift rlhf --rlhf_type gkd --external_plugins tropd.py --use_liger_kernel true
    from tropd_kernels.integrations import ms_swift
    ms_swift.install()                      # its own divergence, of --beta
    ms_swift.install("tropd", top_k=64)     # or an objective of ours

ms-swift has no hook for a distillation's loss. `install` replaces two names of the module of its
trainer: the class that it makes for --use_liger_kernel, which gets hidden states and heads, so that
no logits are formed; and `gkd_loss`, which gets logits, or a top-k teacher's answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import distillation_loss, linear_distillation_loss
from ..objectives import GKD, Divergence, TokenRule
from ..teachers import HiddenTeacher, LogitsTeacher, Teacher, TopKTeacher
from .frameworks import check_version, replace_function
from .log_probs import named_rule

_GKD = ("student_logits", "teacher_output", "labels", "beta", "temperature", "gather_fn",
        "log_softmax_fn", "kl_div_fn", "chunk_size")  # fmt: skip


def install(objective: str | None = None, **knobs: Any) -> None:
    """Makes ms-swift's GKD trainer take the objective; None: its divergence of --beta.

    Raises ValueError for an objective or knobs that it does not have, RuntimeError where the
    trainer has an objective already, or another `gkd_loss`.
    """
    from swift.rlhf_trainers import gkd_trainer

    check_version("ms-swift")
    rule = None if objective is None else named_rule("ms_swift.install", objective, knobs)
    take_over(gkd_trainer, rule)


def take_over(trainer: Any, rule: TokenRule | None) -> None:
    """Replaces the two names of the trainer's module."""
    if getattr(getattr(trainer, "gkd_loss", None), "serves_tropd", False):
        raise RuntimeError(
            "ms_swift.install: the trainer has an objective from an earlier call: install one, once"
        )
    replace_function(
        "ms-swift", trainer, "gkd_loss", lambda original: loss_of(rule), parameters=_GKD,
        expected="98f9f0e63e2e",
    )  # fmt: skip
    trainer.LigerFusedLinearJSDLoss = lambda **settings: FusedLoss(rule, **settings)
    trainer._liger_kernel_available = True


def loss_of(rule: TokenRule | None) -> Callable:
    """A function that takes what ms-swift gives `gkd_loss`, and gives (sum, tokens)."""

    def gkd_loss(student_logits, teacher_output, labels, beta, temperature, *_, **functions):
        if functions:
            raise ValueError(
                f"ms-swift: {', '.join(functions)}: functions of a split vocabulary are not taken; "
                "use the trainer without Megatron"
            )
        counts = labels != -100
        its_labels = labels if teacher_output.labels is None else teacher_output.labels
        answers = teacher_output.select(its_labels != -100)
        logits, tokens = student_logits[counts], labels[counts]
        teacher: Teacher
        if answers.is_topk_mode:
            ids, log_probs = answers.topk_indices, answers.topk_logprobs
            # Tokens that the teacher did not score count for nothing, as there.
            tokens = tokens.masked_fill(log_probs.isinf().all(-1), -100)
            ruled, teacher = of_top_k(rule, beta, temperature, ids, log_probs, tokens)
        else:
            teacher = LogitsTeacher(answers.full_logits.detach())
            ruled = rule or GKD(beta)
        out = distillation_loss(
            logits, tokens, teacher, ruled, temperature=temperature, reduction="sum"
        )
        return out.loss, (tokens != -100).sum()

    return gkd_loss


def of_top_k(
    rule: TokenRule | None,
    beta: float,
    temperature: float,
    ids: Tensor,
    given: Tensor,
    labels: Tensor,
) -> tuple[TokenRule, TopKTeacher]:
    """ms-swift renormalises both sides over the k ids, at its temperature."""
    log_probs = given.float()
    if rule is None:
        if beta not in (0, 1):
            raise ValueError(
                f"ms-swift: beta={beta} on the teacher's top k is no divergence here: take beta 0 "
                'or 1, or ms_swift.install("topk_jsd")'
            )
        name = "forward_kl" if beta == 0 else "reverse_kl"
        rule = Divergence(name, top_k=ids.shape[-1], top_k_tail="renormalize_both")
        # Rows without any answer stay without.
        log_probs = (log_probs / temperature).log_softmax(-1).nan_to_num(nan=-torch.inf)
    elif temperature != 1:
        raise ValueError(f"ms-swift: temperature={temperature} with a top-k teacher: set it to 1")
    label = torch.where(ids == labels[:, None], log_probs, -torch.inf).amax(-1)
    return rule, TopKTeacher(ids, log_probs, label)


class FusedLoss(torch.nn.Module):
    """In the place of Liger's fused divergence: hidden states, heads and labels in one call."""

    def __init__(self, rule: TokenRule | None, *, beta: float = 0.5, ignore_index: int = -100,
                 temperature: float = 1.0, compiled: bool = False, **others: Any):  # fmt: skip
        super().__init__()
        usual = dict(weight_hard_loss=0.0, weight_soft_loss=1.0)
        wrong = [name for name, value in others.items() if usual.get(name, ...) != value]
        if wrong:
            raise ValueError(f"ms-swift: {', '.join(wrong)} of Liger's loss is not served here")
        self.rule, self.ignore_index, self.temperature = (
            rule or GKD(beta),
            ignore_index,
            temperature,
        )

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """The mean over the tokens that count."""
        return linear_distillation_loss(
            student_input, student_weight, true_labels,
            HiddenTeacher(teacher_input, teacher_weight, teacher_bias), self.rule,
            bias=student_bias, temperature=self.temperature, ignore_index=self.ignore_index,
        ).loss  # fmt: skip
