"""Published objectives: constructors that each fill in a `TokenRule` (sources: `rule`).

A default is the publication's. Where it states none, the docstring says what the default rests on,
or the argument has none. `prefix_weight`, 0.001 everywhere, is TrOPD's: no other publication has
teacher-written prefixes, and without them it does nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .checks import number, one_of
from .divergences import DIVERGENCES, check_parameter
from .rewards import check_reward_parameter
from .rule import TokenRule
from .rule_fields import STATIC_THRESHOLD

# --- on-policy distillation and its relatives --------------------------------------------------


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
        """As the authors' code is reported to compute it, at second hand: their repository
        (Xingrun-Xing2/TrOPD) holds no training code. On an outlier, minus the forward KL is a
        detached reward of the sampled token, of a teacher renormalised on its top-k."""
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
    where the teacher's entropy exceeds `entropy_threshold` nats. 0.8 nats and k 16 are the paper's.
    It states no clip: 0.2 is the default of verl, on which the authors' code rests. That code
    (WLS04/EOPD) is reported not to renormalise the teacher: top_k_tail="raw".

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
    where it is not. top_k 64 is TrOPD's; no published value was found.

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


# --- OPD with another reward -------------------------------------------------------------------


def PowerOPD(*, alpha: float = 5.0, prefix_weight: float | None = 0.001) -> TokenRule:
    """PowerOPD (arXiv 2606.17199): OPD with the bounded reward q(y)^alpha - p(y)^alpha. `alpha` 5
    is that of the authors' code (EIT-NLP/PowerOPD); the paper reports 0.1 to 500 and names no one.
    For a small `alpha` it is about alpha times K1, so the gradient shrinks, too.

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
    `TokenRule(clip_reward_low=..., clip_reward_high=...)`, for whose bounds no published value was
    found.

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
    caller's: with D the mean of max(1 - q(y)/p(y), 0) in an exponential average (0.95), step by
    step sqrt(D / D of the first step), within [0.1, 1].

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


def OPDVR(*, prefix_weight: float | None = 0.001) -> TokenRule:
    """OPDVR, OPD with verifiable reward (arXiv 2608.24696): a token's reward R counts where it has
    the sign of the call's `task_advantages`, which themselves do not enter: 1 on every token of a
    right answer, -1 on those of a wrong one (in its GRPD, GRPO's). So a right answer is never made
    less likely, nor a wrong one more likely. RA-OPD (2608.27960) decides by whole answers:
    `credit.reward_aligned_mask`.

    Examples:
        >>> from tropd_kernels import OPDVR
        >>> OPDVR()
        TokenRule(prefix_weight=0.001, reward_filter='agree')
    """
    return TokenRule(reward_filter="agree", prefix_weight=prefix_weight)


def SFT(*, label_smoothing: float = 0.0, z_loss: float = 0.0) -> TokenRule:
    """Cross-entropy on the labels, through the same kernels. `label_smoothing` is PyTorch's, as
    Liger has it, and `z_loss`, a weight on lse^2, Liger's `lse_square_scale`.

    Examples:
        >>> from tropd_kernels import SFT
        >>> SFT(label_smoothing=0.1)
        TokenRule(policy_gradient=0.0, nll_weight=1.0, label_smoothing=0.1)
    """
    return TokenRule(
        policy_gradient=0.0, nll_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss
    )


# --- divergences -------------------------------------------------------------------------------


def Divergence(
    name: str,
    *,
    beta: float | None = None,
    alpha: float | None = None,
    head_mass: float | None = None,
    top_k: int | None = None,
    top_k_tail: str = "raw",
    top_k_ids: str = "teacher",
) -> TokenRule:
    """An exact divergence between student p and teacher q on every token, with u = p/q:

    "forward_kl"       KL(q || p); with `top_k`, or ids that are given, on the ids of `top_k_ids`
    "reverse_kl"       KL(p || q); on such ids likewise, then "topk_reverse_kl" in the rule
    "jeffreys"         KL(q || p) + KL(p || q)
    "mixed"            w KL(q || p) + (1 - w) KL(p || q), each token's w from the call's `mixing`
    "jsd"              beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p, with
                       `beta` 0.5; 0 means forward KL and 1 reverse KL, as in TRL and Liger
    "skew_forward"     KL(q || alpha q + (1 - alpha) p), `alpha` 0.1 (DistiLLM)
    "skew_reverse"     KL(p || (1 - alpha) p + alpha q), `alpha` 0.1 (DistiLLM)
    "alpha"            sum q (u^alpha - alpha u - 1 + alpha) / (alpha (alpha - 1)); 0 means forward
                       KL, 1 reverse KL, `alpha` 0.5 is four times the squared Hellinger distance
    "chi2"             sum (p - q)^2 / q
    "total_variation"  sum abs(p - q) / 2
    "todi"             per id, forward and reverse KL blended by q/(p + q), detached (ToDi)
    "akl"              per token, forward and reverse KL blended by the detached gaps abs(p - q) on
                       the teacher's head and tail; the head holds `head_mass` 0.5 of q (AKL)

    Examples:
        >>> from tropd_kernels import Divergence
        >>> Divergence("skew_reverse")
        TokenRule(policy_gradient=0.0, divergence='skew_reverse', divergence_parameter=0.1)
        >>> Divergence("forward_kl", top_k=64)
        TokenRule(policy_gradient=0.0, top_k=64, divergence='forward_kl')
    """
    one_of("name", name, [d for d, spec in DIVERGENCES.items() if spec.ids != "top_k"])
    spec = DIVERGENCES[name]
    given = {"beta": beta, "alpha": alpha, "head_mass": head_mass}
    for argument, value in given.items():
        if value is not None and argument != spec.parameter:
            raise ValueError(f"Divergence({name!r}) takes no {argument}; got {argument}={value!r}")
    on_k = top_k is not None or top_k_ids != "teacher"
    if on_k and not spec.takes_top_k:
        given_k = "top_k" if top_k is not None else "top_k_ids"
        raise ValueError(
            f"Divergence({name!r}) covers the whole vocabulary; {given_k} goes with 'forward_kl' "
            "and 'reverse_kl' (see TopKJSD for a Jensen-Shannon divergence on K, and MOPD)"
        )
    value = spec.default
    if spec.parameter is not None:
        chosen = given[spec.parameter]
        value = spec.default if chosen is None else chosen
        check_parameter(name, value, spec.parameter, take_limits=True)
        for limit, instead in spec.limits:
            if value == limit and instead is not None:
                name, value = instead, DIVERGENCES[instead].default
    if on_k:
        name = DIVERGENCES[name].on_k or name
    return TokenRule(
        policy_gradient=0.0,
        divergence=name,
        divergence_parameter=value,
        top_k=top_k,
        top_k_tail=top_k_tail,
        top_k_ids=top_k_ids,
    )


def GKD(beta: float = 0.5) -> TokenRule:
    """Generalised knowledge distillation (arXiv 2306.13649): the Jensen-Shannon divergence with
    weight beta; 0 is the forward KL(q || p), 1 the reverse KL(p || q).

    Examples:
        >>> from tropd_kernels import GKD
        >>> GKD(0.5)
        TokenRule(policy_gradient=0.0, divergence='jsd')
        >>> GKD(1.0)
        TokenRule(policy_gradient=0.0, divergence='reverse_kl')
    """
    return Divergence("jsd", beta=beta)


def CADENCE() -> TokenRule:
    """Forward and reverse KL with a weight for each token, as CADENCE (arXiv 2607.16955) and SEAD
    (2606.28562) mix them: `Divergence("mixed")`. Their schedules of the weight are the caller's,
    who passes it as `mixing`: CADENCE's follows the student's coverage of the teacher's top-k,
    SEAD's falls from 0.8 to 0 by a cosine. The KLs here are exact, where CADENCE estimates them
    from the sampled token; tokens that SEAD skips have `token_weight` 0.

    Examples:
        >>> from tropd_kernels import CADENCE
        >>> CADENCE()
        TokenRule(policy_gradient=0.0, divergence='mixed')
    """
    return Divergence("mixed")


def Veto(*, student_power: float, divergence: str = "forward_kl") -> TokenRule:
    """Veto (arXiv 2601.07155): a divergence of `Divergence` to a target between both models,
    q sg(p)^student_power, renormalised; at 0 the target is the teacher. student_power is the
    paper's beta, which has no default, as the paper searches it by task: 0.8 for reasoning, 1 for
    code, 0.3 for summaries, each falling to 0 linearly, by a schedule of the caller's. DemoPSD
    (2607.02502) gives each token powers of its own, which no rule can say.

    Examples:
        >>> from tropd_kernels import Veto
        >>> Veto(student_power=0.3)
        TokenRule(policy_gradient=0.0, divergence='forward_kl', student_power=0.3)
    """
    number("student_power", student_power, low=0.0)
    return replace(Divergence(divergence), student_power=student_power)


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


def LSM(*, top_k: int = 32) -> TokenRule:
    """Teacher top-K local support matching (arXiv 2603.25562): the reverse KL on the teacher's
    top-k, both sides renormalised there, without which training collapses. top_k 32 is the paper's
    and that of the authors' code (hhh675597/revisiting_opd). The paper samples with top-p 0.9 and
    masks special tokens, both of which are the caller's; the code's scripts also train on each
    answer's fifth of highest entropy (`credit.entropy_quantile_mask`, row by row).

    Examples:
        >>> from tropd_kernels import LSM
        >>> LSM()
        TokenRule(policy_gradient=0.0, top_k=32, top_k_tail='renormalize_both',
        divergence='topk_reverse_kl')
    """
    return Divergence("reverse_kl", top_k=top_k, top_k_tail="renormalize_both")


def MOPD(*, top_k: int = 64) -> TokenRule:
    """sum over K of p (log p - log q) - p + q: a reverse KL on the teacher's top-k that is never
    negative and needs no renormalising (the survey's mass-corrected form, arXiv 2606.22793).

    Examples:
        >>> from tropd_kernels import MOPD
        >>> MOPD()
        TokenRule(policy_gradient=0.0, top_k=64, divergence='mopd')
    """
    return TokenRule(policy_gradient=0.0, divergence="mopd", top_k=top_k)


def TopKJSD(*, top_k: int = 64, beta: float = 0.5) -> TokenRule:
    """Jensen-Shannon divergence with its teacher half on the top-k ids and its student half as a K1
    policy gradient: beta sum_K q log(q/M) + (1 - beta) [K1 of log(p/M) on y] (TrOPD's baseline).

    Examples:
        >>> from tropd_kernels import TopKJSD
        >>> TopKJSD()
        TokenRule(policy_gradient=0.5, top_k=64, divergence='topk_jsd')
    """
    check_parameter("topk_jsd", beta, "beta")
    return TokenRule(
        policy_gradient=1.0 - beta, divergence="topk_jsd", divergence_parameter=beta, top_k=top_k
    )
