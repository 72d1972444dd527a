"""The objectives in ms-swift's GKD trainer.

    # tropd.py, for swift rlhf --rlhf_type gkd --external_plugins tropd.py --use_liger_kernel true
    from tropd_kernels.integrations import ms_swift
    ms_swift.install()                      # its own divergence, of --beta
    ms_swift.install("tropd", top_k=64)     # or an objective of ours

ms-swift has no hook for a distillation's loss. `install` replaces two names of the module of its
trainer: the class that --use_liger_kernel makes, which gets hidden states and heads, so that no
logits are formed; and `gkd_loss`, which gets logits, or a top-k teacher's answers. Its Megatron
trainer, which splits the vocabulary, is in another module, and keeps its own loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..functional import distillation_loss, linear_distillation_loss
from ..objectives import GKD, Divergence, TokenRule
from ..teachers import HiddenTeacher, LogitsTeacher, Teacher, TopKTeacher
from .frameworks import check_version, replace_function
from .log_probs import named_rule, row_uniforms

_GKD = ("student_logits", "teacher_output", "labels", "beta", "temperature", "gather_fn",
        "log_softmax_fn", "kl_div_fn", "chunk_size")  # fmt: skip


def install(objective: str | None = None, seed: int = 0, **knobs: Any) -> None:
    """Makes ms-swift's GKD trainer take the objective; None: its divergence of --beta. seed: of the
    draws of a Bernoulli gate, which go with a sequence's labels, too.

    Raises ValueError for an objective or knobs that it does not have, RuntimeError where the
    trainer has an objective already, or another `gkd_loss`.
    """
    from swift.rlhf_trainers import gkd_trainer

    check_version("ms-swift")
    rule = None if objective is None else rule_of(objective, knobs)
    if hasattr(getattr(gkd_trainer, "gkd_loss", None), "serves_tropd"):
        raise RuntimeError(
            "ms_swift.install: the trainer has an objective from an earlier call: install one, once"
        )
    replace_function(
        "ms-swift", gkd_trainer, "gkd_loss", lambda original: loss_of(rule, seed), parameters=_GKD,
        expected="98f9f0e63e2e",
    )  # fmt: skip
    gkd_trainer.LigerFusedLinearJSDLoss = partial(FusedLoss, rule, seed)
    gkd_trainer._liger_kernel_available = True


def rule_of(objective: str, knobs: dict[str, Any]) -> TokenRule:
    """The rule, checked for what this trainer's losses are given."""
    missing = "teacher_prefix", "old_log_probs"
    return named_rule("ms_swift.install", objective, knobs, missing=missing)


def loss_of(rule: TokenRule | None, seed: int = 0) -> Callable:
    """`gkd_loss` of this rule, which takes what ms-swift gives its own; None: GKD of its beta."""
    return partial(gkd_loss, rule, seed)


def gkd_loss(rule, seed, student_logits, teacher_output, labels, beta, temperature):
    """(sum over the tokens that count, their number), of student_logits (B, T, V), a TeacherOutput
    and labels (B, T), shifted; the teacher's own labels mark the same tokens in its sequences."""
    answers = teacher_output.select(teacher_output.labels != -100)
    counts = labels != -100
    logits, tokens = student_logits[counts], labels[counts]
    draws = row_uniforms(seed, labels)[counts]
    if answers.is_topk_mode:
        # Tokens that the teacher did not score count for nothing, as there.
        tokens = tokens.masked_fill(answers.topk_logprobs.isinf().all(-1), -100)
        rule, teacher = of_top_k(rule, beta, temperature, answers, tokens)
    else:
        rule, teacher = rule or GKD(beta), LogitsTeacher(answers.full_logits.detach())
    out = distillation_loss(
        logits, tokens, teacher, rule, uniforms=draws, temperature=temperature, reduction="sum"
    )
    return out.loss, (tokens != -100).sum()


def of_top_k(rule, beta, temperature, answers, labels) -> tuple[TokenRule, Teacher]:
    """The rule and the teacher of answers (N, K): both sides renormalised over K, or ours."""
    ids, log_probs = answers.topk_indices, answers.topk_logprobs.float()
    if rule is None:
        if beta not in (0, 1):
            raise ValueError(
                f"ms-swift: beta={beta} on the teacher's top k is no divergence here: take beta 0 "
                'or 1, or ms_swift.install("topk_jsd")'
            )
        name = "reverse_kl" if beta else "forward_kl"
        rule = Divergence(name, top_k=ids.shape[-1], top_k_tail="renormalize_both")
        # Rows without any answer stay without.
        log_probs = (log_probs / temperature).log_softmax(-1).nan_to_num(nan=-torch.inf)
    elif temperature != 1:
        raise ValueError(f"ms-swift: temperature={temperature} with a top-k teacher: set it to 1")
    elif rule.policy_gradient and rule.gate == "always" and not rule.bounds_reward:
        raise ValueError(
            f"ms-swift: {rule!r} has a reward without a lower bound on every token, and a teacher "
            "that answers with its top k gives no log-prob of a token outside the top k: take an "
            'objective with a gate ("tropd", "mask_outlier") or a bounded reward ("power_opd")'
        )
    label = torch.where(ids == labels[:, None], log_probs, -torch.inf).amax(-1)
    return rule, TopKTeacher(ids, log_probs, label)


def fused_loss(
    rule: TokenRule, seed: int, student_input: Tensor, student_weight: Tensor,
    teacher_input: Tensor, teacher_weight: Tensor, true_labels: Tensor,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The mean over the tokens that count, of hidden states (B, T, H), heads (V, H) and labels
    (B, T), shifted."""
    teacher = HiddenTeacher(teacher_input, teacher_weight, teacher_bias)
    return linear_distillation_loss(
        student_input, student_weight, true_labels, teacher, rule, bias=student_bias,
        uniforms=row_uniforms(seed, true_labels), **options,
    ).loss  # fmt: skip


class FusedLoss:
    """In the place of Liger's class: `fused_loss` with its options; rule None: GKD of its beta.

    Raises ValueError for an option of Liger's that is not served.
    """

    def __init__(self, rule: TokenRule | None, seed: int = 0, *, beta: float = 0.5,
                 ignore_index: int = -100, temperature: float = 1.0, **others: Any):  # fmt: skip
        usual = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
        wrong = [name for name, value in others.items() if usual.get(name, ...) != value]
        if wrong:
            raise ValueError(f"ms-swift: {', '.join(wrong)} of Liger's loss is not served here")
        self.rule, self.seed = rule or GKD(beta), seed
        self.options: dict[str, Any] = dict(ignore_index=ignore_index, temperature=temperature)

    def __call__(self, **inputs: Any) -> Tensor:
        return fused_loss(self.rule, self.seed, **inputs, **self.options)
