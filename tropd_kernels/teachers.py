"""The four forms in which a teacher's signal arrives.

| form           | holds, per token                      | can serve                              |
|----------------|---------------------------------------|----------------------------------------|
| HiddenTeacher  | last hidden state, and the head       | every objective; no logits ever stored |
| LogitsTeacher  | the whole row of logits               | every objective                        |
| TopKTeacher    | k ids with log-probs, and the label's | K1, KLs on its ids, MOPD, top-k JSD    |
| SampledTeacher | the label's log-prob                  | K1 alone                               |

A teacher is frozen: a tensor that requires grad is an error. Compute it under torch.no_grad():
hidden states, logits and a head from torch.inference_mode() serve only a loss that forms its
gradients in the forward. Log-probs given by a top-k or sampled teacher are taken as they are:
`temperature` does not touch them. NaN and those above 0 by more than a rounding are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .arguments import check_float, is_number
from .objectives import TokenRule
from .summary import Summarized
from .symbolic import shown


@dataclass(frozen=True, eq=False, repr=False)
class HiddenTeacher(Summarized):
    """A teacher as hidden states and head.

    Attributes:
        hidden: (*, G) last hidden states, one per label; G may differ from the student's width.
        weight: (V, G) head; its vocabulary may differ in height from the student's: the ids
            that both have are used. Of any float dtype: the product is in that of hidden.
        bias: (V,) or None.
        logit_scale: Factor on the logits.
        softcap: Bound of the tanh behind it: softcap * tanh(logit_scale * (h W^T + b) / softcap).

    Examples:
        >>> import torch
        >>> from tropd_kernels import HiddenTeacher
        >>> HiddenTeacher(torch.zeros(2, 5, 24), torch.zeros(300, 24)).vocab_size
        300
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        _frozen(self, "hidden", "weight", "bias")
        check_head("teacher", self.hidden, self.weight, self.bias)
        check_scale("teacher", self.logit_scale, self.softcap)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def tokens_shape(self):
        return self.hidden.shape[:-1]


@dataclass(frozen=True, eq=False, repr=False)
class LogitsTeacher(Summarized):
    """A teacher as logits (*, V), of any float dtype, before temperature.

    Examples:
        >>> import torch
        >>> from tropd_kernels import LogitsTeacher
        >>> LogitsTeacher(torch.zeros(2, 5, 300)).tokens_shape
        torch.Size([2, 5])
    """

    logits: Tensor

    def __post_init__(self):
        _frozen(self, "logits")
        if self.logits.dim() < 1 or self.logits.shape[-1] == 0:
            raise ValueError(f"teacher logits must be (*, V), got {tuple(self.logits.shape)}")

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    @property
    def tokens_shape(self):
        return self.logits.shape[:-1]


@dataclass(frozen=True, eq=False, repr=False)
class TopKTeacher(Summarized):
    """A teacher as its k likeliest ids.

    Attributes:
        ids: (*, K) int64, distinct within a row: an error, or NaN in that row where values are
            not looked at (`ignore_index=None` on a GPU). Ids outside [0, V) and entries with
            log-prob -inf are padding, which may repeat.
        log_probs: (*, K) log q of those ids, normalised over the teacher's whole vocabulary.
        label_log_probs: (*) log q of the label.
        entropy: (*) the teacher's entropy in nats, where known. Without it, objectives that ask
            for it use the lower bound with the mass outside K lumped into one id.

    Examples:
        >>> import torch
        >>> from tropd_kernels import TopKTeacher
        >>> log_q = torch.zeros(2, 5, 300).log_softmax(-1)
        >>> top, ids = log_q.topk(8)
        >>> TopKTeacher(ids, top, label_log_probs=log_q[..., 0]).tokens_shape
        torch.Size([2, 5])
    """

    ids: Tensor
    log_probs: Tensor
    label_log_probs: Tensor
    entropy: Tensor | None = None

    def __post_init__(self):
        _frozen(self, "log_probs", "label_log_probs", "entropy")
        if not isinstance(self.ids, Tensor):
            raise TypeError(f"teacher ids must be a tensor, got {type(self.ids).__name__}")
        if self.ids.is_floating_point() or self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f"teacher ids and log_probs must both be (*, K), int64 and float; got "
                f"{self.ids.dtype} {tuple(self.ids.shape)} and {tuple(self.log_probs.shape)}"
            )
        for name in ("label_log_probs", "entropy"):
            value = getattr(self, name)
            if value is not None and value.shape != self.ids.shape[:-1]:
                raise ValueError(
                    f"teacher {name} must have the shape of the ids without K, "
                    f"{tuple(self.ids.shape[:-1])}; got {tuple(value.shape)}"
                )
        if self.ids.shape[-1] == 0:
            raise ValueError("teacher ids are (*, 0): a top-k teacher needs at least one id")

    @property
    def tokens_shape(self):
        return self.ids.shape[:-1]


@dataclass(frozen=True, eq=False, repr=False)
class SampledTeacher(Summarized):
    """A teacher as the log-probs (*) that it gives to the labels.

    Examples:
        >>> import torch
        >>> from tropd_kernels import SampledTeacher
        >>> SampledTeacher(torch.full((2, 5), -1.0)).tokens_shape
        torch.Size([2, 5])
    """

    label_log_probs: Tensor

    def __post_init__(self):
        _frozen(self, "label_log_probs")

    @property
    def tokens_shape(self):
        return self.label_log_probs.shape


Teacher = HiddenTeacher | LogitsTeacher | TopKTeacher | SampledTeacher
#: A tuple: under Python 3.10 torch.compile cannot ask isinstance of a union.
FORMS = (HiddenTeacher, LogitsTeacher, TopKTeacher, SampledTeacher)


def check_serves(teacher: Teacher | None, rule: TokenRule) -> None:
    """Raises where this form of teacher cannot give what the rule needs, naming the forms that
    can."""
    if teacher is None:
        if rule.of_all().uses_teacher:
            raise ValueError(f"{rule!r} needs a teacher: pass one, or choose SFT()")
        if rule.uses_teacher:
            raise ValueError(
                f"select_by={rule.select_by!r} needs a teacher: pass a teacher, or take "
                "select_by 'entropy' or 'scores'"
            )
        return
    form = type(teacher).__name__
    if not isinstance(teacher, FORMS):
        raise TypeError(
            "teacher must be a HiddenTeacher, LogitsTeacher, TopKTeacher or SampledTeacher; "
            f"got {form}"
        )
    if isinstance(teacher, (HiddenTeacher, LogitsTeacher)):
        return
    dense = "HiddenTeacher or LogitsTeacher"
    if rule.reshapes_target:
        raise ValueError(
            f"{rule!r} multiplies powers of distributions and renormalises over the vocabulary, "
            f"which a {form} does not hold: use a {dense}, or leave teacher_power, student_power "
            "and reference_power at 1, 0 and 0"
        )
    if rule.top_k_ids != "teacher":
        whose = "the student's top-k" if rule.top_k_ids == "student" else "ids that are given"
        raise ValueError(
            f"{rule!r} takes {whose} for K, which a {form} does not score: use a {dense}; or ask "
            "the served teacher for the log-probs of those ids, pass them as a TopKTeacher's own, "
            "and set top_k_ids='teacher' and top_k to their number"
        )
    if rule.score == "reverse_kl":
        raise ValueError(
            "select_by='reverse_kl' needs the teacher's whole distribution, which a "
            f"{form} does not hold: use a {dense}, or select_by='disagreement'"
        )
    if rule.uses_dense_teacher:
        remedy = " or set top_k" if rule.uses_forward_kl and not rule.uses_reverse_kl else ""
        raise ValueError(
            f"{rule!r} needs the teacher's whole distribution, which a {form} does not hold: "
            f"use a {dense}{remedy}"
        )
    if isinstance(teacher, SampledTeacher):
        if rule.score == "teacher_entropy":
            raise ValueError(
                "select_by='teacher_entropy' ranks tokens by H(q), which a SampledTeacher does not "
                f"hold: use a TopKTeacher or a {dense}, or select_by='entropy'"
            )
        if rule.uses_top_k:
            raise ValueError(
                f"{rule!r} needs the teacher's top-k log-probs, which a SampledTeacher does not "
                f"hold: use a TopKTeacher, {dense}, or an objective of K1 alone "
                "(OPD, ClipOutlier, MaskOutlier, TrOPD(outlier='mask'))"
            )
        return
    if rule.uses_top_k and rule.top_k > teacher.ids.shape[-1]:
        raise ValueError(
            f"top_k={rule.top_k}, but the TopKTeacher holds {teacher.ids.shape[-1]} ids a token: "
            f"ask the teacher for more, or set top_k={teacher.ids.shape[-1]}"
        )


def check_reference(reference: Teacher | None, rule: TokenRule) -> None:
    """Raises where a reference teacher is missing, not asked for, or not dense."""
    if reference is None:
        if rule.reference_power:
            raise ValueError(
                f"reference_power={rule.reference_power} is the power of a reference teacher's "
                "distribution: pass reference_teacher=<a HiddenTeacher or LogitsTeacher>"
            )
        return
    if not isinstance(reference, (HiddenTeacher, LogitsTeacher)):
        raise TypeError(
            "reference_teacher must be a HiddenTeacher or a LogitsTeacher, whose whole "
            f"distribution enters the target; got {type(reference).__name__}"
        )
    if not rule.reference_power:
        raise ValueError(
            f"{rule!r} has no reference_power, so a reference_teacher would have no effect: leave "
            "it out, or choose an objective with one, such as ExOPD"
        )


def check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The types and shapes of one head; `side` names it in errors."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{side} {name} must be a tensor, got {type(tensor).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"{side} weight must be (V, H), got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(
            f"{side} weight has 0 rows: under ZeRO-3 a head is empty outside its own forward; "
            "gather it first (deepspeed.zero.GatheredParameters)"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side} hidden must be (*, {weight.shape[1]}) to go with a weight of "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_float(f"{side} {name}", tensor)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side} bias must be ({weight.shape[0]},) as the weight has rows, got "
            f"{tuple(bias.shape)}"
        )


def check_scale(side: str, logit_scale: float, softcap: float | None) -> None:
    """logit_scale: a finite number other than 0; softcap: a positive number or None."""
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if not is_number(value) and not (name == "softcap" and value is None):
            raise TypeError(f"{side} {name} must be a number, got {shown(value)}")
    if not -math.inf < logit_scale < math.inf or logit_scale == 0:
        raise ValueError(f"{side} logit_scale must be finite and not 0, got {shown(logit_scale)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{side} softcap must be a positive number or None, got {shown(softcap)}")


def _frozen(teacher, *names):
    for name in names:
        tensor = getattr(teacher, name)
        if tensor is None and name in ("bias", "entropy"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"teacher {name} must be a tensor, got {type(tensor).__name__}")
        check_float(f"teacher {name}", tensor)
        if tensor.requires_grad:
            raise ValueError(
                f"teacher {name} requires grad, but a teacher is frozen: compute it under "
                "torch.no_grad(), or detach() it"
            )
