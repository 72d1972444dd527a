"""The losses that the table compares, each with the rule that computes it here and its floor.

The floor of a loss is the matrix products that no implementation can leave out: three with the
student's head, and one with the teacher's where the teacher comes as hidden states. A loss of a
part of the tokens is put beside the products of all of them, which it need not make.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tropd_kernels import GKD, OPD, SFT, Divergence, TokenRule, TrOPD

#: Ids that a top-k teacher gives.
TOP_K = 64


@dataclass(frozen=True)
class Loss:
    """rule: what `linear_distillation_loss` takes. teacher: the form of teacher, "hidden", "top_k",
    "sampled" or None. beta: where it is one of the Jensen-Shannon family, 0 for the forward KL, 1
    for the reverse."""

    rule: TokenRule
    teacher: str | None
    title: str
    meaning: str
    beta: float | None = None

    @property
    def multiplies_teacher(self) -> bool:
        return self.teacher == "hidden"

    @property
    def selects(self) -> bool:
        """Some of the tokens enter the loss, by a score that is ranked over all."""
        return self.rule.score is not None

    @property
    def floor(self) -> str:
        products = "3S + T" if self.multiplies_teacher else "3S"
        return f"{products} of all tokens" if self.selects else products


LOSSES = {
    "opd": Loss(
        OPD(), "sampled", "OPD, sampled teacher",
        "K1 as a policy gradient, given the teacher's log-prob of each label",
    ),
    "tropd_given": Loss(
        TrOPD(), "top_k", "TrOPD, top 64 given",
        "TrOPD given the teacher's top 64 ids and log-probs",
    ),
    "tropd": Loss(
        TrOPD(), "hidden", "TrOPD, top 64",
        "K1 where trusted, else forward KL on the teacher's top 64; dense teacher",
    ),
    "tropd_exact": Loss(
        TrOPD(top_k=None), "hidden", "TrOPD, whole vocabulary",
        "the same, its forward KL over the whole vocabulary",
    ),
    "reverse_kl": Loss(
        Divergence("reverse_kl"), "hidden", "reverse KL",
        "KL(student || teacher) over the whole vocabulary", beta=1.0,
    ),
    "gkd": Loss(
        GKD(0.5), "hidden", "JSD (GKD 0.5)",
        "Jensen-Shannon divergence, beta 0.5, over the whole vocabulary", beta=0.5,
    ),
    "gkd_tenth": Loss(
        replace(GKD(0.5), select_by="entropy", select_fraction=0.1), "hidden", "JSD of a tenth",
        "gkd of the tenth of the tokens with the student's highest entropy: S + (3S + T) / 10, in "
        "% of gkd's 3S + T",
    ),
    "forward_kl": Loss(
        Divergence("forward_kl"), "hidden", "forward KL",
        "KL(teacher || student) over the whole vocabulary", beta=0.0,
    ),
    "sft": Loss(
        SFT(), None, "cross-entropy",
        "of the labels, without a teacher: what linear cross-entropy kernels compute",
    ),
}  # fmt: skip
