"""The fields of a `TokenRule`, and what follows from them for teachers, chunk plan and row engines.

`rule.py` says what they mean together; `rule_checks.py` what a rule refuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .divergences import DIVERGENCES, NO_DIVERGENCE, DivergenceSpec
from .rewards import REWARDS, is_bounded

#: log(0.2 / 0.8): the static threshold of REOPOLD and of TrOPD's clipping ablation.
STATIC_THRESHOLD = math.log(0.25)


@dataclass(frozen=True, repr=False)
class RuleFields:
    """One distillation objective. Usually made by a named constructor (`TrOPD()`, `GKD()`, ...).

    Attributes:
        policy_gradient: Weight on the K1 policy gradient -R * rho; 0 leaves it out
            (kl_penalty_coef).
        gate: How M is drawn. "always": M = 1. "bernoulli": M = 1 where u < P, P =
            min(q(y)/p(y), 1) with lo in place of lp where given. "expected": M = P.
            "threshold": M = 1 where R0 (the mixture's of "topk_jsd"), or the caller's
            advantage, > threshold. No gate sees a transform or clip of the reward. An infinite
            R that no gate rejects is an infinite loss, with gradient 0.
        outlier: The loss outside the gate. "mask": none. "clip": R floored at `threshold`.
            "forward_kl": forward KL on K, back-propagated. "forward_kl_reward": minus that KL
            as a detached reward on y.
        threshold: The static gate's level and the clip's floor, in nats, at most 0; behind any
            gate the reward that `TrOPDTrainer`'s returns count for a token that the teacher
            excludes.
        top_k: Size of K; None is the whole vocabulary. Ids that tie with the k-th largest
            belong to K, to within the rounding of a logit that is made twice.
        top_k_tail: What is done with the mass outside K: "raw", "bucket", "renormalize_teacher"
            or "renormalize_both". The masses of a bucket are summed over the ids outside K, but
            the teacher's, with a top-k teacher, is a difference from 1, good to about 1e-6 (in
            float32), and in a reverse KL at least the precision, 1.2e-7: the loss is
            underestimated for a teacher with less mass than that outside K, and infinite where
            a dense teacher's underflows (e^-103 in float32). In a forward KL a student's is at
            least the square of the precision. In the gradient of "renormalize_both" a student
            with less than e^-80 on K counts as having nothing there.
        top_k_ids: Whose ids K holds. "teacher": its top-k. "student": the student's own top-k,
            exactly `top_k` ids; of those that tie for the last places the lowest on a CPU, any
            on a GPU. "given": the call's `ids`, whatever their number; leave top_k None. The
            last two want a HiddenTeacher or LogitsTeacher: a top-k teacher that was asked for
            the student's ids has them as its own, "teacher". There K holds ids that the teacher
            excludes, too, with which a reverse KL is infinite; where it renormalises the
            teacher, a mass on K that underflows counts as none.
        prefix_weight: Weight of the K1 forward KL on teacher-written tokens; None treats them
            as any other.
        clip_ratio_low: PPO clips rho at 1 minus this; None leaves the side open.
        clip_ratio_high: PPO clips rho at 1 plus this; None leaves the side open.
        forward_kl_entropy: Adds the forward KL on K where H(q) exceeds this many nats; None:
            nowhere.
        select_by: The score by which tokens are selected; None selects all. Only the selected
            tokens enter the loss, and only they cost a gradient. "entropy": H(p).
            "teacher_entropy": H(q). "reverse_kl": KL(p || q), exact. "reward": R.
            "disagreement": abs(lq - lo). "scores": the call's `scores`. Computing a score costs
            one logits GEMM over all tokens for each side that it reads; "scores" reads none.
            Teacher-written tokens (where `prefix_weight` is given) are not ranked, and always
            enter the loss; so do tokens with a NaN score, so that the NaN reaches the loss.
        select_fraction: The tokens whose score reaches the call's quantile at 1 - this fraction
            (linear between tokens), with all that tie there: many, where a reward is a sign or
            is clipped.
        select_threshold: In place of a fraction, the tokens whose score is at least this.
        entropy_top_fraction: Short for select_by="entropy" with this `select_fraction`.
            `credit.entropy_quantile_mask` takes an exact number instead.
        divergence: One of `DIVERGENCES`, on every token; None: none. With a top_k the forward KL of
            "forward_kl" and "jeffreys" is over K, the reverse KL of the latter over all ids.
        divergence_parameter: Its parameter: beta of "jsd" and "topk_jsd", alpha of `skew_*` and
            "alpha", the head's teacher mass of "akl"; unused elsewhere. Near a limit ("jsd" at 0
            and 1, `skew_*` at 1, "alpha" at 1) float32 loses digits where student and teacher
            nearly agree: at 4e-4 nats of KL a token a "skew_reverse" of 0.9 has its gradient to
            2e-3, one of 0.99 to a tenth.
        nll_weight: Weight on -log p(y).
        label_smoothing: Share in [0, 1] of the NLL's weight that is on the mean of -log p over
            all ids (that student and teacher share) in place of -log p(y), as in PyTorch's
            cross-entropy (arXiv 1512.00567); needs an nll_weight. An id that the student
            excludes (logit -inf) makes the mean infinite, without a gradient; the rest of the
            NLL keeps its own.
        entropy_coef: Entropy bonus: subtracts entropy_coef * H(p).
        z_loss: Weight on lse^2, at least 0: keeps the log of the softmax's normaliser near 0
            (PaLM, arXiv 2204.02311, with 1e-4). lse is of the logits after scale, softcap and
            temperature.
        normalize: What the mean divides by: every token that counts, or the tokens "kept" by
            gate and selection (REOPOLD); one of which a part is trusted (gate "expected") is
            kept.
        reward: The transform T of R0, one of `REWARDS`: "log_ratio" (none), "power",
            "proximal", "log1p", "tanh" or "sign" (formulas in `rewards`). The caller's
            advantages are not transformed. The divergence "topk_jsd" brings its own, "proximal"
            with its beta.
        reward_parameter: Its parameter: a > 0 of "power", a in (0, 1] of "proximal", where 1 is the
            log-ratio, a > 0 of "tanh", whose None is 1; None elsewhere.
        reward_policy: Whose log-prob R0 is relative to. "old": the sampling policy's, lo.
            "current": the student's own, sg(lp), where the sample is stale. rho keeps lo, as
            does the acceptance P.
        clip_reward_low: Lower bound of R, and of the caller's advantages, before the floor of
            `outlier` and before A; None leaves the side open.
        clip_reward_high: The upper one.
        task_weight: Weight of A, the call's `task_advantages`, on every token that the student
            sampled, inside and outside the gate; a token that is not selected has none.
        reward_filter: "positive" keeps R' only where A > 0, "negative" only where A < 0,
            "agree" only where R' has the sign of A, "agree_scaled" there times abs(A); elsewhere
            R' is 0, the floored one and minus the KL as well. Back-propagated divergences stay.
            None keeps all.
        teacher_power: Power of q in the target q', proportional to q^teacher_power
            sg(p)^student_power r^reference_power with r the call's `reference_teacher` and
            renormalised over the vocabulary, which stands in for q everywhere: reward, gate,
            divergences, entropy, K and the teacher's statistics. An id that a side with a power
            other than 0 excludes has probability 0. Dense teachers only. The call's `blending` w
            gives each token a target between q and this one: q^(1 - w) q'^w.
        student_power: Power of sg(p) in it.
        reference_power: Power of r in it.

    Raises:
        ValueError, TypeError: A wrong value; the text names the argument.

    Examples:
        >>> from tropd_kernels import TokenRule
        >>> TokenRule(gate='threshold', outlier='clip', reward='tanh')
        TokenRule(gate='threshold', outlier='clip', reward='tanh')
    """

    policy_gradient: float = 1.0
    gate: str = "always"
    outlier: str = "mask"
    threshold: float = STATIC_THRESHOLD
    top_k: int | None = None
    top_k_tail: str = "raw"
    prefix_weight: float | None = None
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    forward_kl_entropy: float | None = None
    select_by: str | None = None
    select_fraction: float | None = None
    select_threshold: float | None = None
    entropy_top_fraction: float | None = None
    divergence: str | None = None
    divergence_parameter: float = 0.5
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    entropy_coef: float = 0.0
    z_loss: float = 0.0
    normalize: str = "tokens"
    reward: str = "log_ratio"
    reward_parameter: float | None = None
    reward_policy: str = "old"
    clip_reward_low: float | None = None
    clip_reward_high: float | None = None
    task_weight: float = 0.0
    reward_filter: str | None = None
    teacher_power: float = 1.0
    student_power: float = 0.0
    reference_power: float = 0.0
    top_k_ids: str = "teacher"

    @property
    def has_a_term(self) -> bool:
        rejected = self.gate != "always" and self.outlier == "forward_kl"
        weights = self.policy_gradient, self.nll_weight, self.entropy_coef, self.prefix_weight
        chosen = self.divergence, self.forward_kl_entropy
        return (
            rejected or any((*weights, self.z_loss)) or any(choice is not None for choice in chosen)
        )

    @property
    def divergence_spec(self) -> DivergenceSpec:
        return NO_DIVERGENCE if self.divergence is None else DIVERGENCES[self.divergence]

    @property
    def label_weights(self) -> tuple[float, float]:
        """Weights of -log p(y), and of the mean of -log p over all ids, in every token's loss."""
        smoothed = self.nll_weight * self.label_smoothing
        return self.nll_weight - smoothed, smoothed

    # What a rule needs: for the check of teachers, the chunk plan and the row engines.

    @property
    def reward_transform(self) -> tuple[str, float | None]:
        """Name and parameter of the reward's transform."""
        if self.divergence_spec.mixes_reward:
            return "proximal", self.divergence_parameter
        if self.reward_parameter is None:
            return self.reward, REWARDS[self.reward].default
        return self.reward, self.reward_parameter

    @property
    def gates_transformed(self) -> bool:
        """The static gate sees the transformed reward."""
        return self.divergence_spec.mixes_reward

    @property
    def clips_reward(self) -> bool:
        return self.clip_reward_low is not None or self.clip_reward_high is not None

    @property
    def bounds_reward(self) -> bool:
        """R is finite where the teacher gives the token probability 0."""
        return self.clip_reward_low is not None or is_bounded(*self.reward_transform)

    @property
    def reads_advantages(self) -> bool:
        """The reward, which the caller's advantages replace, enters the loss, gate or score."""
        return self.policy_gradient != 0 or self.gate == "threshold" or self.score == "reward"

    @property
    def uses_task_advantages(self) -> bool:
        return self.task_weight != 0 or self.reward_filter is not None

    @property
    def score(self) -> str | None:
        """The score that selects tokens; None where all are."""
        if self.entropy_top_fraction is not None:
            return None if self.entropy_top_fraction == 1 else "entropy"
        return None if self.select_fraction == 1 else self.select_by

    @property
    def fraction(self) -> float | None:
        """The fraction that is selected, where the rule says it."""
        return self.select_fraction or self.entropy_top_fraction

    @property
    def score_reads_student(self) -> bool:
        """It is made of every token's student logits (relative to lo: unless that is given)."""
        return self.score in ("entropy", "reverse_kl", "disagreement", "reward")

    @property
    def score_reads_teacher(self) -> bool:
        """... and of what the teacher knows of every token."""
        return self.score in ("teacher_entropy", "reverse_kl", "disagreement", "reward")

    @property
    def uses_forward_kl(self) -> bool:
        """The forward KL (on K) may enter a token's loss."""
        return self.chooses_forward_kl or self.divergence_spec.forward_kl

    @property
    def chooses_forward_kl(self) -> bool:
        """... where the gate or the teacher's entropy says so."""
        outside = self.gate != "always" and self.outlier.startswith("forward_kl")
        return outside or self.forward_kl_entropy is not None

    @property
    def uses_reverse_kl(self) -> bool:
        """The exact reverse KL may enter a token's loss."""
        return self.divergence_spec.reverse_kl

    @property
    def kl_weights(self) -> tuple[float, float]:
        """Weights of the forward KL (on K) and of the reverse KL in every token's loss."""
        return self.divergence_spec.kl_weights or (0.0, 0.0)

    @property
    def weighs_by_gaps(self) -> bool:
        """... which each token has of its own, from its gaps abs(p - q) on head and tail (AKL)."""
        return self.divergence_spec.by_gaps

    @property
    def weighs_by_mixing(self) -> bool:
        """... which the call's `mixing` gives each token."""
        return self.divergence_spec.by_mixing

    @property
    def generator(self) -> str | None:
        """The divergence's generator, where it needs one."""
        return self.divergence if self.divergence_spec.generator else None

    @property
    def uses_top_k(self) -> bool:
        """A set K smaller than the vocabulary has to be found."""
        on_k = self.uses_forward_kl or self.divergence_spec.ids == "top_k"
        return (self.top_k is not None or self.top_k_ids == "given") and on_k

    @property
    def uses_sums(self) -> bool:
        """Sums over K, or over the whole vocabulary, enter the loss."""
        return self.uses_forward_kl or self.generator is not None

    @property
    def sums_of_every_row(self) -> bool:
        """... of every token; else of those alone that the gate or the teacher's entropy picks."""
        return self.divergence_spec.forward_kl or self.generator is not None

    @property
    def sums_from_statistics(self) -> bool:
        """... and the first pass over a dense teacher's row has them all."""
        return not (self.uses_top_k or self.generator or self.divergence == "akl")

    @property
    def sums_only_on_k(self) -> bool:
        """... or need nothing from outside K."""
        return self.uses_top_k and self.top_k_tail != "bucket"

    @property
    def p_differs_on_k(self) -> bool:
        """The student's own term of the gradient has another coefficient on K than off it."""
        return self.divergence_spec.has_tails or self.top_k_tail in ("bucket", "renormalize_both")

    @property
    def value_on_renormalized(self) -> bool:
        """The generator's value is a mean under the student renormalised on K."""
        return self.divergence_spec.has_tails and self.top_k_tail == "renormalize_both"

    @property
    def reads_teacher_rows(self) -> bool:
        """The gradient pass may read a dense teacher's row."""
        return self.uses_sums or self.uses_reverse_kl

    @property
    def uses_dense_teacher(self) -> bool:
        """The loss needs the teacher's whole distribution."""
        whole = self.uses_forward_kl and not self.uses_top_k
        generator = self.generator is not None and self.divergence_spec.ids != "top_k"
        exact = self.uses_reverse_kl or self.score == "reverse_kl"
        other = self.reshapes_target or self.top_k_ids != "teacher"
        return whole or generator or exact or other

    @property
    def reshapes_target(self) -> bool:
        """Another distribution stands in for the teacher's."""
        return (self.teacher_power, self.student_power, self.reference_power) != (1.0, 0.0, 0.0)

    @property
    def uses_teacher(self) -> bool:
        return self.terms_use_teacher or self.score_reads_teacher

    @property
    def terms_use_teacher(self) -> bool:
        reward = self.policy_gradient != 0 or self.gate != "always"
        label = reward or self.prefix_weight is not None
        return label or self.uses_forward_kl or self.divergence is not None
