"""Published objectives with a reward on the sampled tokens: constructors that each fill in a
`TokenRule` (sources: `rule`).

A default is the publication's. Where it states none, the docstring says what the default rests on,
or the argument has none. `prefix_weight`, 0.001 everywhere, is TrOPD's: no other publication has
teacher-written prefixes, and without them it does nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .checks import number
from .rewards import check_reward_parameter
from .rule import TokenRule
from .rule_fields import STATIC_THRESHOLD


class _TrOPD:
    """Trust Region On-Policy Distillation (arXiv 2606.01249): K1 where the teacher would accept the
    token (the speculative-decoding test), forward KL on the teacher's top-k where it would not, and
    a small K1 forward KL on a teacher-written prefix. Defaults are the paper's (k 64, prefix weight
    0.001; its forward KL is the plain sum over K); without an outlier that sums over K the rule has
    no `top_k`, and with gate "always" no outlier.

    Examples:
        >>> from tropd_kernels import TrOPD
        >>> TrOPD()
        TokenRule(gate='bernoulli', outlier='forward_kl', top_k=64, prefix_weight=0.001)
        >>> TrOPD(gate='expected', outlier='mask')
        TokenRule(gate='expected', prefix_weight=0.001)
    """

    def __call__(
        self,
        *,
        gate: str = "bernoulli",
        outlier: str = "forward_kl",
        top_k: int | None = 64,
        top_k_tail: str = "raw",
        threshold: float = STATIC_THRESHOLD,
        prefix_weight: float | None = 0.001,
        clip_ratio_low: float | None = None,
        clip_ratio_high: float | None = None,
        entropy_coef: float = 0.0,
    ) -> TokenRule:
        # A default that the rest leaves without effect is dropped.
        if gate == "always" and outlier == "forward_kl":
            outlier = "mask"
        if top_k == 64 and top_k_tail == "raw" and outlier in ("mask", "clip"):
            top_k = None
        return TokenRule(
            gate=gate,
            outlier=outlier,
            top_k=top_k,
            top_k_tail=top_k_tail,
            threshold=threshold,
            prefix_weight=prefix_weight,
            clip_ratio_low=clip_ratio_low,
            clip_ratio_high=clip_ratio_high,
            entropy_coef=entropy_coef,
        )

    def paper(self) -> TokenRule:
        """As the paper states it: `TrOPD()`, under a name that stays the paper's."""
        return self()

    def official_code(self) -> TokenRule:
        """As the authors' code is reported to compute it, at second hand: the copies of their
        repository (Xingrun-Xing2/TrOPD) that were read hold no training code, and a reader of its
        recipe/tropd describes it. On an outlier, minus the forward KL is a detached reward of the
        sampled token, of a teacher renormalised on its top-k."""
        return self(outlier="forward_kl_reward", top_k_tail="renormalize_teacher")


TrOPD = _TrOPD()


def OPD(
    *,
    kl_penalty_coef: float = 1.0,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    prefix_weight: float | None = 0.001,
    entropy_coef: float = 0.0,
) -> TokenRule:
    """On-policy distillation: the K1 reverse KL as a policy gradient on every token (Thinking
    Machines; GKD's on-policy limit). Unbounded where the teacher finds a token unlikely.

    Examples:
        >>> from tropd_kernels import OPD
        >>> OPD(clip_ratio_low=0.2, clip_ratio_high=0.2)
        TokenRule(prefix_weight=0.001, clip_ratio_low=0.2, clip_ratio_high=0.2)
    """
    number("kl_penalty_coef", kl_penalty_coef)
    return TokenRule(
        policy_gradient=kl_penalty_coef,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        prefix_weight=prefix_weight,
        entropy_coef=entropy_coef,
    )


def ClipOutlier(*, threshold: float = STATIC_THRESHOLD, prefix_weight: float | None = 0.001):
    """OPD with its reward floored at `threshold` (TrOPD's clipping ablation).

    Examples:
        >>> from tropd_kernels import ClipOutlier
        >>> ClipOutlier(threshold=-2.0)
        TokenRule(gate='threshold', outlier='clip', threshold=-2.0, prefix_weight=0.001)
    """
    return TokenRule(
        gate="threshold", outlier="clip", threshold=threshold, prefix_weight=prefix_weight
    )


def MaskOutlier(*, threshold: float = STATIC_THRESHOLD, prefix_weight: float | None = 0.001):
    """OPD without the tokens whose reward is at or below `threshold` (TrOPD's masking ablation).

    Examples:
        >>> from tropd_kernels import MaskOutlier
        >>> MaskOutlier(threshold=-2.0)
        TokenRule(gate='threshold', threshold=-2.0, prefix_weight=0.001)
    """
    return TokenRule(
        gate="threshold", outlier="mask", threshold=threshold, prefix_weight=prefix_weight
    )


def EOPD(
    *,
    entropy_threshold: float = 0.8,
    top_k: int = 16,
    top_k_tail: str = "renormalize_teacher",
    clip_ratio: float | None = 0.2,
    prefix_weight: float | None = 0.001,
) -> TokenRule:
    """Entropy-aware OPD (arXiv 2603.07079): PPO-clipped OPD, plus forward KL on the teacher's top-k
    where the teacher's entropy exceeds `entropy_threshold` nats. 0.8 nats, k 16 (appendix F) and
    the weight 1 of the forward KL are the paper's, as its readers have it; the authors' code
    renormalises the teacher on its top-k, and not the student, and shows k 32. The clip of 0.2 is
    the default of verl, on which that code rests.

    Examples:
        >>> from tropd_kernels import EOPD
        >>> EOPD()
        TokenRule(top_k=16, top_k_tail='renormalize_teacher', prefix_weight=0.001,
        clip_ratio_low=0.2, clip_ratio_high=0.2, forward_kl_entropy=0.8)
    """
    number("entropy_threshold", entropy_threshold, low=0.0)
    number("clip_ratio", clip_ratio, 0.0, 1.0, optional=True)
    return TokenRule(
        forward_kl_entropy=entropy_threshold,
        top_k=top_k,
        top_k_tail=top_k_tail,
        clip_ratio_low=clip_ratio,
        clip_ratio_high=clip_ratio,
        prefix_weight=prefix_weight,
    )


def EntropyOPD(*, top_fraction: float = 0.2, prefix_weight: float | None = 0.001) -> TokenRule:
    """OPD on the tokens whose student entropy is in the batch's top fraction.

    Examples:
        >>> from tropd_kernels import EntropyOPD
        >>> EntropyOPD()
        TokenRule(prefix_weight=0.001, entropy_top_fraction=0.2)
    """
    return TokenRule(entropy_top_fraction=top_fraction, prefix_weight=prefix_weight)


def REOPOLD(
    *,
    stage: int = 1,
    mixing: float = 0.2,
    entropy_quantile: float = 0.8,
    prefix_weight: float | None = 0.001,
) -> TokenRule:
    """REOPOLD (arXiv 2603.11137): rewards floored at log(mixing / (1 - mixing)). Stage 1 masks the
    tokens at or below the floor; stage 2 keeps the tokens whose student entropy is above the
    batch's `entropy_quantile`. The mean is over the tokens kept. The trainer switches the stage.

    The paper's own text could not be had. Of its readers four have this floor, three of them as
    its equation 7, and four (SaFo-Lab/PW-OPSD, the code of vOPD's authors, two summaries)
    log(mixing) / (1 - mixing). A floor f is that of mixing = 1 / (1 + exp(-f)). They disagree on
    mixing, too: 0.2, 0.1 (PW-OPSD) or 0.3 (EIT-NLP/PowerOPD). The quantile is 0.8 with all but one,
    who has 0.5.

    Examples:
        >>> from tropd_kernels import REOPOLD
        >>> REOPOLD(stage=2)
        TokenRule(gate='threshold', outlier='clip', prefix_weight=0.001,
        entropy_top_fraction=0.19999999999999996, normalize='kept')
    """
    number("mixing", mixing, 0.0, 0.5)
    if mixing == 0:
        raise ValueError("mixing must be above 0: the floor would be minus infinity")
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")
    number("entropy_quantile", entropy_quantile, 0.0, 1.0)
    if entropy_quantile == 1:
        raise ValueError("entropy_quantile must be below 1: no token would count")
    return TokenRule(
        gate="threshold",
        outlier="mask" if stage == 1 else "clip",
        threshold=math.log(mixing / (1 - mixing)),
        entropy_top_fraction=None if stage == 1 else 1 - entropy_quantile,
        normalize="kept",
        prefix_weight=prefix_weight,
    )


def AOPD(
    *, top_k: int | None = 64, top_k_tail: str = "raw", prefix_weight: float | None = 0.001
) -> TokenRule:
    """AOPD (arXiv 2605.06387): K1 where the reward is positive, forward KL to the teacher's top-k
    where it is not. The paper's gate is q(y) - p(y) > 0, which is the same. top_k 64 is TrOPD's; no
    published value was found. One reader of the paper divides the forward KL's sum by k, which
    this, as TrOPD's, does not. Another's code has a top_k of 16, and K1 up to p(y) - q(y) = 0.1.

    Examples:
        >>> from tropd_kernels import AOPD
        >>> AOPD()
        TokenRule(gate='threshold', outlier='forward_kl', threshold=0.0, top_k=64,
        prefix_weight=0.001)
    """
    return TokenRule(
        gate="threshold",
        outlier="forward_kl",
        threshold=0.0,
        top_k=top_k,
        top_k_tail=top_k_tail,
        prefix_weight=prefix_weight,
    )


def TrOPD_AOPD(
    *, top_k: int | None = 64, top_k_tail: str = "raw", prefix_weight: float | None = 0.001
) -> TokenRule:
    """The "TrOPD + AOPD" of TrOPD's tables (arXiv 2606.01249), which print no formula. Read as both
    gates: K1 where either keeps it, forward KL elsewhere. TrOPD accepts every token of positive
    reward, so its own gate adds nothing to AOPD's, and what it brings is its teacher-written
    prefixes: `AOPD` with TrOPD's `top_k` and `prefix_weight`.

    Examples:
        >>> from tropd_kernels import TrOPD_AOPD
        >>> TrOPD_AOPD(top_k=16)
        TokenRule(gate='threshold', outlier='forward_kl', threshold=0.0, top_k=16,
        prefix_weight=0.001)
    """
    return AOPD(top_k=top_k, top_k_tail=top_k_tail, prefix_weight=prefix_weight)


def PowerOPD(*, alpha: float = 5.0, prefix_weight: float | None = 0.001) -> TokenRule:
    """PowerOPD (arXiv 2606.17199, equation 4): OPD with the bounded reward q(y)^alpha - p(y)^alpha.
    `alpha` 5 is that of the authors' code (EIT-NLP/PowerOPD); the paper reports 0.1 to 500 and
    names no one. For a small `alpha` it is about alpha times K1, so the gradient shrinks, too.

    Examples:
        >>> from tropd_kernels import PowerOPD
        >>> PowerOPD()
        TokenRule(prefix_weight=0.001, reward='power', reward_parameter=5.0)
    """
    check_reward_parameter("power", alpha, "alpha")
    return TokenRule(reward="power", reward_parameter=alpha, prefix_weight=prefix_weight)


def TOPD(
    *,
    alpha: float = 0.2,
    clip_ratio_low: float | None = 0.2,
    clip_ratio_high: float | None = 0.2,
    prefix_weight: float | None = 0.001,
) -> TokenRule:
    """TOP-D, Trust Region Policy Distillation (arXiv 2607.04751): OPD with the reward
    log(alpha q/p + 1 - alpha), the log-ratio to a proximal teacher between student and teacher. It
    is at least log(1 - alpha); `alpha` lies in (0, 1], and 1 is OPD. The paper trains with 0.1 and
    0.2, of which prime-rl (#2966) and NeMo-RL (#4011) take 0.2, and clips rho to [0.8, 1.2]; None
    opens a side. Its advantages are the call's `advantages`: the returns that
    `credit.reward_plus_future_mean` makes, z-normalized over the tokens of a prompt's rollouts.

    Examples:
        >>> from tropd_kernels import TOPD
        >>> TOPD()
        TokenRule(prefix_weight=0.001, clip_ratio_low=0.2, clip_ratio_high=0.2, reward='proximal',
        reward_parameter=0.2)
    """
    check_reward_parameter("proximal", alpha, "alpha")
    return TokenRule(
        reward="proximal",
        reward_parameter=alpha,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        prefix_weight=prefix_weight,
    )


def Log1pOPD(*, prefix_weight: float | None = 0.001) -> TokenRule:
    """OPD with the reward sign(R) log(1 + abs(R)) ("Demystifying OPD", arXiv 2607.13399), which
    grows as the logarithm of K1. Its other cure is
    `TokenRule(clip_reward_low=..., clip_reward_high=...)`, for whose bounds it names no value;
    PowerOPD's baseline has -1 and 1 (2606.17199, section 5).

    Examples:
        >>> from tropd_kernels import Log1pOPD
        >>> Log1pOPD()
        TokenRule(prefix_weight=0.001, reward='log1p')
    """
    return TokenRule(reward="log1p", prefix_weight=prefix_weight)


def TVOPD(*, scale: float = 1.0, prefix_weight: float | None = 0.001) -> TokenRule:
    """TV-OPD (arXiv 2609.08341): OPD with the reward `scale` * sign(R), whose expected gradient on
    the student's own tokens is that of twice `scale` times the total variation. At a fixed `scale`
    of 1 it is the paper's Sign-TV. TV-OPD lowers the scale with the total variation, which is the
    caller's: with D the mean of max(1 - q(y)/p(y), 0) in an exponential average (0.95) of the steps
    before, sqrt(D / D of the first step), within [0.1, 1].

    Examples:
        >>> from tropd_kernels import TVOPD
        >>> TVOPD(scale=0.5)
        TokenRule(policy_gradient=0.5, prefix_weight=0.001, reward='sign')
    """
    number("scale", scale)
    if scale == 0:
        raise ValueError("scale must not be 0: the objective would have no term")
    return TokenRule(policy_gradient=scale, reward="sign", prefix_weight=prefix_weight)


def KDRL(
    *,
    task_weight: float = 500.0,
    kl_penalty_coef: float = 0.002,
    reward_filter: str | None = None,
    prefix_weight: float | None = 0.001,
) -> TokenRule:
    """KDRL (arXiv 2506.02208): the policy gradient of kl_penalty_coef * (R + task_weight * A), with
    the call's `task_advantages` A, such as GRPO's. The paper's A + beta R has `task_weight` 1/beta
    and `kl_penalty_coef` beta; the defaults are its fixed beta, 0.002. Its annealed one falls from
    0.005 to 0.001, by 5e-5 a step. Its k2 estimate has this gradient where rho is 1.
    reward_filter="negative" distils only where A < 0; the paper's masking, of wrong answers, also
    distils in a group without a right one, where GRPO's A is 0.

    Examples:
        >>> from tropd_kernels import KDRL
        >>> KDRL()
        TokenRule(policy_gradient=0.002, prefix_weight=0.001, task_weight=500.0)
    """
    number("kl_penalty_coef", kl_penalty_coef)
    return TokenRule(
        policy_gradient=kl_penalty_coef,
        task_weight=task_weight,
        reward_filter=reward_filter,
        prefix_weight=prefix_weight,
    )


def OPDVR(*, reward_filter: str | None = "agree", prefix_weight: float | None = 0.001) -> TokenRule:
    """OPDVR, OPD with verifiable reward (arXiv 2608.24696): a token's reward R counts where it has
    the sign of the call's `task_advantages`, which themselves do not enter: 1 on every token of a
    right answer, -1 on those of a wrong one. So a right answer is never made less likely, nor a
    wrong one more likely. Its GRPD, with GRPO's advantages, also multiplies what is kept by their
    size: reward_filter="agree_scaled". RA-OPD (2608.27960) decides by whole answers:
    `credit.reward_aligned_mask`.

    Examples:
        >>> from tropd_kernels import OPDVR
        >>> OPDVR()
        TokenRule(prefix_weight=0.001, reward_filter='agree')
    """
    return TokenRule(reward_filter=reward_filter, prefix_weight=prefix_weight)


def ExOPD(
    *,
    extrapolation: float = 1.25,
    kl_penalty_coef: float = 1.0,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    prefix_weight: float | None = 0.001,
) -> TokenRule:
    """OPD beyond the teacher (ExOPD, arXiv 2602.12125): the teacher's log-ratio to the call's
    `reference_teacher` r, a model before the teacher's training, counts `extrapolation` times
    (lambda; above 1 extrapolates, below 1 interpolates; 1.25 is the authors', RUCBM/G-OPD). That is
    OPD to the target q^lambda r^(1 - lambda). The sampled reward is that of the renormalised
    target: it differs from the paper's by a constant of each position, which changes no expected
    gradient. OPD^2 (2607.15161) takes the teacher's log-ratio to r alone, as advantages:
    `credit.delta_advantages`.

    Examples:
        >>> from tropd_kernels import ExOPD
        >>> ExOPD()
        TokenRule(prefix_weight=0.001, teacher_power=1.25, reference_power=-0.25)
    """
    number("extrapolation", extrapolation, low=0.0)
    if extrapolation in (0, 1):
        raise ValueError(
            f"extrapolation={extrapolation!r} is OPD to "
            f"{'the teacher' if extrapolation else 'the reference teacher'} alone: use OPD(), with "
            "that model as the teacher"
        )
    rule = OPD(
        kl_penalty_coef=kl_penalty_coef,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        prefix_weight=prefix_weight,
    )
    return replace(rule, teacher_power=extrapolation, reference_power=1 - extrapolation)
