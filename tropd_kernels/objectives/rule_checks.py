"""What a `TokenRule` refuses when it is made: values out of range, fields without effect, and sets
of ids that no pass serves. Each check raises ValueError or TypeError naming the argument.
"""

from __future__ import annotations

from dataclasses import fields

from .checks import number, one_of
from .divergences import DIVERGENCES, check_parameter
from .rewards import REWARD_FILTERS, REWARD_POLICIES, REWARDS, check_reward_parameter
from .rule_fields import STATIC_THRESHOLD, RuleFields

GATES = ("always", "bernoulli", "expected", "threshold")
OUTLIERS = ("mask", "clip", "forward_kl", "forward_kl_reward")
TOP_K_IDS = ("teacher", "student", "given")
TAILS = ("raw", "bucket", "renormalize_teacher", "renormalize_both")
NORMALIZE = ("tokens", "kept")
SCORES = ("entropy", "teacher_entropy", "reverse_kl", "disagreement", "reward", "scores")

#: Fields that shape the policy gradient, as its reward and its ratio do.
_REWARD_FIELDS = (
    "reward", "reward_policy", "clip_reward_low", "clip_reward_high", "task_weight",
    "reward_filter", "clip_ratio_low", "clip_ratio_high",
)  # fmt: skip


def check_rule(rule: RuleFields) -> None:
    """Everything that a rule is checked for."""
    one_of("gate", rule.gate, GATES)
    one_of("outlier", rule.outlier, OUTLIERS)
    one_of("top_k_tail", rule.top_k_tail, TAILS)
    one_of("normalize", rule.normalize, NORMALIZE)
    if rule.divergence is not None:
        one_of("divergence", rule.divergence, DIVERGENCES)
    number("threshold", rule.threshold, high=0.0)
    for name in ("policy_gradient", "nll_weight", "entropy_coef", "divergence_parameter"):
        number(name, getattr(rule, name))
    number("z_loss", rule.z_loss, low=0.0)
    number("label_smoothing", rule.label_smoothing, 0.0, 1.0)
    if rule.label_smoothing and not rule.nll_weight:
        raise ValueError(
            f"label_smoothing={rule.label_smoothing} smooths the labels of the NLL, and this "
            "rule has none: give an nll_weight, or leave label_smoothing at 0"
        )
    for name in ("teacher_power", "student_power", "reference_power"):
        number(name, getattr(rule, name))
    if rule.teacher_power <= 0:
        raise ValueError(
            f"teacher_power must be above 0, got {rule.teacher_power}: the target is the "
            "teacher's, moved by the other powers"
        )
    for name in ("prefix_weight", "clip_ratio_low", "clip_ratio_high", "forward_kl_entropy"):
        number(name, getattr(rule, name), low=0.0, optional=True)
    if rule.clip_ratio_low is not None and rule.clip_ratio_low > 1:
        raise ValueError(f"clip_ratio_low must lie in [0, 1], got {rule.clip_ratio_low}")
    _check_selection(rule)
    if rule.top_k is not None:
        if isinstance(rule.top_k, bool) or not isinstance(rule.top_k, int):
            raise TypeError(f"top_k must be an int or None, got {rule.top_k!r}")
        if rule.top_k < 1:
            raise ValueError(
                f"top_k must be at least 1, or None for the whole vocabulary; got {rule.top_k}"
            )
    _check_ids(rule)
    has_k = rule.top_k is not None or rule.top_k_ids == "given"
    if not has_k and rule.top_k_tail != "raw":
        raise ValueError(
            f"top_k_tail={rule.top_k_tail!r} needs a top_k: without one there is no tail"
        )
    if rule.divergence_spec.ids == "top_k" and not has_k:
        raise ValueError(f"divergence={rule.divergence!r} lives on the top-k ids: give a top_k")
    _check_sets(rule)
    _check_reward(rule)
    if not rule.has_a_term:
        raise ValueError(
            "this rule has no term, so that every loss would be 0: give a policy_gradient, a "
            "divergence, an nll_weight, or outlier='forward_kl' with a gate that rejects tokens"
        )
    _check_gate(rule)
    if rule.top_k is not None and not rule.uses_top_k:
        raise ValueError(
            f"top_k={rule.top_k} has no effect, as no term is a sum over K: leave it None, or give "
            "a divergence on K, or an outlier='forward_kl' with a gate that rejects tokens"
        )
    if rule.reshapes_target and not rule.uses_teacher:
        raise ValueError(
            "teacher_power, student_power and reference_power change the teacher's "
            f"distribution, and no term of this rule reads it; got {rule.teacher_power}, "
            f"{rule.student_power} and {rule.reference_power}: leave them at 1, 0 and 0"
        )
    if rule.divergence is not None:
        check_parameter(rule.divergence, rule.divergence_parameter)


def _check_selection(rule: RuleFields) -> None:
    for name in ("select_fraction", "entropy_top_fraction"):
        number(name, getattr(rule, name), 0.0, 1.0, optional=True)
        if getattr(rule, name) == 0:
            raise ValueError(f"{name} must be above 0: no token would count")
    number("select_threshold", rule.select_threshold, optional=True)
    given = rule.select_fraction, rule.select_threshold
    if rule.entropy_top_fraction is not None and (rule.select_by, *given) != (None,) * 3:
        raise ValueError(
            "entropy_top_fraction selects tokens by their entropy: leave select_by, "
            "select_fraction and select_threshold None beside it"
        )
    if rule.select_by is None:
        if given != (None, None):
            raise ValueError(
                "select_fraction and select_threshold need a score: give select_by, one of "
                f"{', '.join(map(repr, SCORES))}"
            )
        return
    one_of("select_by", rule.select_by, SCORES)
    if (rule.select_fraction is None) == (rule.select_threshold is None):
        raise ValueError(
            f"select_by={rule.select_by!r} needs either a select_fraction or a "
            f"select_threshold, got {rule.select_fraction} and {rule.select_threshold}: leave one "
            "of them None"
        )


def _check_ids(rule: RuleFields) -> None:
    """Refuses a choice of ids that has no effect, or that a term beside those on K forbids."""
    one_of("top_k_ids", rule.top_k_ids, TOP_K_IDS)
    if rule.top_k_ids == "teacher":
        return
    choice = f"top_k_ids={rule.top_k_ids!r}"
    if rule.top_k_ids == "given" and rule.top_k is not None:
        raise ValueError(
            f"{choice} takes all of the call's ids: leave top_k None, got {rule.top_k}"
        )
    if rule.top_k_ids == "student" and rule.top_k is None:
        raise ValueError(f"{choice} needs a top_k: how many of the student's likeliest ids K holds")
    if not rule.uses_top_k:
        raise ValueError(
            f"{choice} has no effect, as no term is a sum over K: give a divergence on K, such "
            "as 'topk_reverse_kl', or an outlier='forward_kl' with a gate that rejects tokens"
        )
    if rule.uses_reverse_kl or (rule.generator and rule.divergence_spec.ids == "vocabulary"):
        raise ValueError(
            f"divergence={rule.divergence!r} is over the whole vocabulary, and the forward KL "
            f"beside it over the ids of {choice}: leave top_k_ids 'teacher', or choose a "
            "divergence on K"
        )


def _check_sets(rule: RuleFields) -> None:
    """Refuses rules that need sums over two sets of ids, or with two weights: one pass makes
    one."""
    spec = rule.divergence_spec
    whole = spec.generator and spec.ids == "vocabulary"
    if spec.by_gaps and rule.top_k is not None:
        raise ValueError(
            f"divergence={rule.divergence!r} weighs the head of the teacher's distribution, "
            f"whose mass is divergence_parameter: leave top_k None, got {rule.top_k}"
        )
    if spec.by_mixing and rule.top_k is not None:
        raise ValueError(
            f"divergence={rule.divergence!r} mixes forward and reverse KL over the whole "
            f"vocabulary: leave top_k None, got {rule.top_k}"
        )
    if spec.by_gaps and rule.chooses_forward_kl:
        raise ValueError(
            f"divergence={rule.divergence!r} weighs the forward KL of every token: leave "
            "forward_kl_entropy None and the gate 'always', or choose an outlier other than "
            f"'forward_kl' and 'forward_kl_reward'; got gate={rule.gate!r}, "
            f"outlier={rule.outlier!r}, forward_kl_entropy={rule.forward_kl_entropy}"
        )
    if whole and rule.chooses_forward_kl and rule.top_k is not None:
        raise ValueError(
            f"divergence={rule.divergence!r} is over the whole vocabulary, and the forward KL "
            f"beside it over the top_k={rule.top_k} ids: leave top_k None, so that both are "
            "over the whole"
        )


def _check_gate(rule: RuleFields) -> None:
    """Refuses a gate that decides nothing, and what says how it decides or what comes of it."""
    if rule.gate == "always" and rule.outlier != "mask":
        raise ValueError(
            f"outlier={rule.outlier!r} has no effect with gate='always', which rejects no token: "
            "leave it 'mask', or choose another gate"
        )
    # Behind any other gate it is the floor of the rewards that a trainer sums to returns.
    if rule.gate == "always" and rule.threshold != STATIC_THRESHOLD:
        raise ValueError(
            f"threshold={rule.threshold!r} has no effect with gate='always', which rejects no "
            "token: leave it out, or choose another gate"
        )
    keeps = rule.outlier == "mask" and rule.normalize == "kept"
    decides = rule.policy_gradient or rule.outlier == "forward_kl" or keeps
    if rule.gate != "always" and not decides:
        raise ValueError(
            f"gate={rule.gate!r} has no effect with policy_gradient=0 and outlier="
            f"{rule.outlier!r}: a gate splits the tokens of the policy gradient and of the forward "
            "KL on outliers, and no other term; leave it 'always', or give a policy_gradient"
        )


def _check_reward(rule: RuleFields) -> None:
    """Refuses rewards that have no value, and fields that shape a reward that no term reads."""
    one_of("reward", rule.reward, REWARDS)
    one_of("reward_policy", rule.reward_policy, REWARD_POLICIES)
    if rule.reward_filter is not None:
        one_of("reward_filter", rule.reward_filter, REWARD_FILTERS)
    check_reward_parameter(rule.reward, rule.reward_parameter)
    number("task_weight", rule.task_weight)
    low, high = rule.clip_reward_low, rule.clip_reward_high
    number("clip_reward_low", low, optional=True)
    number("clip_reward_high", high, optional=True)
    if low is not None and high is not None and low > high:
        raise ValueError(f"clip_reward_low={low!r} must not exceed clip_reward_high={high!r}")
    if rule.divergence_spec.mixes_reward and rule.reward != "log_ratio":
        raise ValueError(
            f"divergence={rule.divergence!r} has a reward of its own, the log-ratio of its "
            f"mixture and the student: leave reward 'log_ratio', got {rule.reward!r}"
        )
    if rule.policy_gradient:
        return
    idle = set(_REWARD_FIELDS)
    if rule.gate == "threshold":  # which reads R0
        idle.remove("reward_policy")
    for f in fields(rule):
        if f.name in idle and getattr(rule, f.name) != f.default:
            raise ValueError(
                f"{f.name}={getattr(rule, f.name)!r} has no effect with policy_gradient=0: it "
                f"shapes the policy gradient; leave it {f.default!r}, or give a policy_gradient"
            )
