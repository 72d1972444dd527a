"""Cross-entropy and divergences on every token: constructors that each fill in a `TokenRule`, with
the defaults of their sources, as in `named`."""

from __future__ import annotations

from dataclasses import replace

from .checks import number, one_of
from .divergences import DIVERGENCES, check_parameter
from .rule import TokenRule


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
    "skew_reverse"     KL(p || alpha p + (1 - alpha) q), `alpha` 0.1 (DistiLLM)
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
    who passes it as `mixing`: CADENCE's falls from 1 to 0 by a cosine, sooner where the student
    covers the teacher's top 20, SEAD's from 0.8 to 0 by a cosine. The KLs here are exact, where
    CADENCE estimates them from the sampled token; tokens that SEAD skips have `token_weight` 0.

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
    code, 0.3 for summaries, each falling to 0 linearly, by a schedule of the caller's. The call's
    `blending` lowers it token by token.

    Examples:
        >>> from tropd_kernels import Veto
        >>> Veto(student_power=0.3)
        TokenRule(policy_gradient=0.0, divergence='forward_kl', student_power=0.3)
    """
    number("student_power", student_power, low=0.0)
    return replace(Divergence(divergence), student_power=student_power)


def DemoPSD(*, student_power: float = 0.15) -> TokenRule:
    """DemoPSD (arXiv 2607.02502): the reverse KL to q^(1 - a) sg(p)^a, renormalised, where a grows
    with the distance of p and q at the token. student_power is the largest a, the paper's
    alpha_max; the call's `blending` is each token's share of it, which the paper sets to
    2 sigmoid(beta d) - 1. There d is the Jensen-Shannon divergence of p and q, the token's loss
    under `GKD()` (at least 0 but for rounding), and beta lies between 25 and 100 by task. Without
    `blending` every token has the largest a.

    The paper's p in the target and in d is a moving average of the student: pass it as
    `reference_teacher`, and move the power from student_power to reference_power. Its sums are over
    the student's top 100 with a bucket, with a floor of 1e-8 under probabilities; these are exact,
    over the vocabulary. Its importance ratio, of at most 2, is a `token_weight`.

    Examples:
        >>> from tropd_kernels import DemoPSD
        >>> DemoPSD()
        TokenRule(policy_gradient=0.0, divergence='reverse_kl', teacher_power=0.85,
        student_power=0.15)
    """
    number("student_power", student_power, 0.0, 1.0)
    if student_power in (0, 1):
        raise ValueError(
            f"student_power={student_power!r} leaves nothing of the "
            f"{'teacher' if student_power else 'student'} in the target: give a number between 0 "
            "and 1"
        )
    rule = Divergence("reverse_kl")
    return replace(rule, teacher_power=1 - student_power, student_power=student_power)


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
    negative and needs no renormalising (the survey's mass-corrected form, arXiv 2606.22793). Not
    multi-teacher OPD, which others call MOPD: `OPD()`, with each sequence's own teacher.

    A student who is sure of an id of the top k that the teacher excludes is driven off the top k:
    mass elsewhere costs 1 nat at most, and hardly a gradient leads back. Students in
    docs/evidence.md collapsed so.

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
