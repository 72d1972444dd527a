"""What is an error: teachers and objectives, and the two beside each other."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from calls import (
    INF,
    NAN,
    SHAPE,
    G,
    K,
    V,
    head_loss,
    hidden_teacher,
    labels,
    of,
    refused,
    sampled_teacher,
    top_k_teacher,
)
from problems import OBJECTIVES

from tropd_kernels import (
    AOPD,
    EOPD,
    GKD,
    KDRL,
    MOPD,
    OPD,
    REOPOLD,
    SFT,
    TOPD,
    TVOPD,
    ClipOutlier,
    Divergence,
    EntropyOPD,
    LogitsTeacher,
    MaskOutlier,
    PowerOPD,
    SampledTeacher,
    TokenRule,
    TopKJSD,
    TrOPD,
)
from tropd_kernels.objectives import decode_rule

TEACHERS = {
    "hidden is no tensor": (lambda: hidden_teacher(hidden=None), TypeError, "teacher hidden"),
    "weight is no tensor": (lambda: hidden_teacher(weight=[1.0]), TypeError, "teacher weight"),
    "hidden of another width": (
        lambda: hidden_teacher(hidden=of(*SHAPE, G + 1)), ValueError, "teacher hidden", "(*, 5)",
    ),
    "an empty head": (
        lambda: hidden_teacher(weight=of(0, G)), ValueError, "teacher weight", "0 rows", "gather",
    ),
    "weight of three dimensions": (
        lambda: hidden_teacher(weight=of(1, V, G)), ValueError, "teacher weight", "(V, H)",
    ),
    "bias of another height": (
        lambda: hidden_teacher(bias=of(V - 1)), ValueError, "teacher bias", "(7,)", "(6,)",
    ),
    "scale 0": (lambda: hidden_teacher(logit_scale=0), ValueError, "teacher logit_scale", "not 0"),
    "cap 0": (lambda: hidden_teacher(softcap=0), ValueError, "teacher softcap", "positive"),
    "hidden requires grad": (
        lambda: hidden_teacher(hidden=of(*SHAPE, G, requires_grad=True)),
        ValueError, "teacher hidden requires grad", "no_grad", "detach",
    ),
    "weight requires grad": (
        lambda: hidden_teacher(weight=of(V, G, requires_grad=True)),
        ValueError, "teacher weight requires grad", "no_grad", "detach",
    ),
    "bias requires grad": (
        lambda: hidden_teacher(bias=of(V, requires_grad=True)),
        ValueError, "teacher bias requires grad", "no_grad", "detach",
    ),
    "no logits": (lambda: LogitsTeacher(None), TypeError, "teacher logits"),
    "logits of integers": (lambda: LogitsTeacher(labels()), TypeError, "teacher logits", "float"),
    "logits of no ids": (lambda: LogitsTeacher(of(2, 0)), ValueError, "teacher logits", "(*, V)"),
    "logits require grad": (
        lambda: LogitsTeacher(of(2, V, requires_grad=True)),
        ValueError, "teacher logits requires grad", "no_grad", "detach",
    ),
    "ids are no tensor": (lambda: top_k_teacher(ids=[[0]]), TypeError, "teacher ids"),
    "ids of floats": (
        lambda: top_k_teacher(ids=of(*SHAPE, K)), ValueError, "teacher ids", "int64", "float32",
    ),
    "ids without log-probs": (
        lambda: top_k_teacher(log_probs=of(*SHAPE, K + 1)),
        ValueError, "teacher ids and log_probs", "(2, 3, 3)", "(2, 3, 4)",
    ),
    "no ids": (
        lambda: top_k_teacher(ids=labels(*SHAPE, 0), log_probs=of(*SHAPE, 0)),
        ValueError, "teacher ids", "at least one",
    ),
    "no label log-probs": (
        lambda: top_k_teacher(label_log_probs=None), TypeError, "teacher label_log_probs",
    ),
    "label log-probs of other tokens": (
        lambda: top_k_teacher(label_log_probs=of(6)),
        ValueError, "teacher label_log_probs", "(2, 3)", "(6,)",
    ),
    "entropy of other tokens": (
        lambda: top_k_teacher(entropy=of(*SHAPE, 1)), ValueError, "teacher entropy", "(2, 3)",
    ),
    "log-probs require grad": (
        lambda: top_k_teacher(log_probs=of(*SHAPE, K, requires_grad=True)),
        ValueError, "teacher log_probs requires grad", "detach",
    ),
    "nothing sampled": (lambda: SampledTeacher(None), TypeError, "teacher label_log_probs"),
    "sampled requires grad": (
        lambda: SampledTeacher(of(*SHAPE, requires_grad=True)),
        ValueError, "teacher label_log_probs requires grad", "detach",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers(case):
    make, error, *words = TEACHERS[case]
    refused(make, error, *words)


SAMPLED_NEEDS = [TrOPD(), TrOPD(outlier="forward_kl_reward"), AOPD(), EOPD(), MOPD(), TopKJSD(),
                 Divergence("forward_kl", top_k=2)]  # fmt: skip
DENSE_NEEDS = [
    TrOPD(top_k=None),
    *(Divergence(name) for name in ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_forward",
                                    "skew_reverse", "alpha", "chi2", "total_variation", "todi",
                                    "akl")),
]  # fmt: skip


@pytest.mark.parametrize("rule", SAMPLED_NEEDS, ids=repr)
def test_a_sampled_teacher_cannot_give_a_top_k(rule):
    refused(
        lambda: head_loss(teacher=sampled_teacher(), objective=rule, seed=0),
        ValueError, "TokenRule(", "top-k", "SampledTeacher", "use a TopKTeacher", "HiddenTeacher",
        "LogitsTeacher", "OPD",
    )  # fmt: skip


@pytest.mark.parametrize("rule", DENSE_NEEDS, ids=repr)
@pytest.mark.parametrize("teacher", [sampled_teacher, top_k_teacher])
def test_a_sparse_teacher_cannot_give_a_distribution(rule, teacher):
    form = "SampledTeacher" if teacher is sampled_teacher else "TopKTeacher"
    words = ["TokenRule(", "whole distribution", form, "use a HiddenTeacher or LogitsTeacher"]
    if rule.uses_forward_kl and not rule.uses_reverse_kl:
        words.append("set top_k")
    refused(lambda: head_loss(teacher=teacher(), objective=rule, seed=0), ValueError, *words)


def test_a_top_k_teacher_with_too_few_ids():
    refused(
        lambda: head_loss(teacher=top_k_teacher(), objective=TrOPD(top_k=K + 1), seed=0),
        ValueError, "top_k=4", "holds 3 ids", "ask the teacher for more", "set top_k=3",
    )  # fmt: skip
    assert head_loss(teacher=top_k_teacher(), objective=TrOPD(top_k=K), seed=0).loss.isfinite()


# --- objectives ---------------------------------------------------------------------------------

RULES = {
    "gate": (lambda: TrOPD(gate="coin"), ValueError, "gate", "'bernoulli'", "'coin'"),
    "outlier": (lambda: TrOPD(outlier="drop"), ValueError, "outlier", "'mask'", "'drop'"),
    "tail": (lambda: TrOPD(top_k_tail="lump"), ValueError, "top_k_tail", "'bucket'", "'lump'"),
    "divergence": (lambda: TokenRule(divergence="kl"), ValueError, "divergence", "'akl'", "'kl'"),
    "divergence by name": (lambda: Divergence("kl"), ValueError, "name", "'forward_kl'", "'kl'"),
    "normalize": (lambda: TokenRule(normalize="all"), ValueError, "normalize", "'kept'"),
    "no term": (
        lambda: TokenRule(policy_gradient=0.0, top_k=8), ValueError, "no term", "policy_gradient",
    ),
    "no term outside the gate": (
        lambda: TokenRule(policy_gradient=0.0, gate="bernoulli"), ValueError, "no term",
        "forward_kl",
    ),
    "top_k 0": (lambda: TrOPD(top_k=0), ValueError, "top_k", "at least 1", "None"),
    "top_k below 0": (lambda: MOPD(top_k=-64), ValueError, "top_k", "at least 1", "None"),
    "top_k of a fraction": (lambda: TrOPD(top_k=64.0), TypeError, "top_k", "int or None", "64.0"),
    "top_k of a bool": (lambda: TrOPD(top_k=True), TypeError, "top_k", "int or None", "True"),
    "tail of nothing": (
        lambda: TrOPD(top_k=None, top_k_tail="bucket"), ValueError, "top_k_tail", "needs a top_k",
    ),
    "top_k of no sum": (lambda: TokenRule(top_k=8), ValueError, "top_k=8 has no effect", "None"),
    "top_k beside a mask": (
        lambda: TrOPD(outlier="mask", top_k=8), ValueError, "top_k=8 has no effect",
    ),
    "outlier of no gate": (
        lambda: TokenRule(outlier="clip"), ValueError, "outlier='clip'", "gate='always'", "'mask'",
    ),
    "threshold of no gate": (
        lambda: TokenRule(threshold=-9), ValueError, "threshold=-9", "no effect", "gate='always'",
    ),
    "gate of a divergence": (
        lambda: dataclasses.replace(GKD(), gate="threshold"), ValueError, "gate='threshold'",
        "no effect", "policy_gradient",
    ),
    "outlier's reward of a divergence": (
        lambda: dataclasses.replace(GKD(), gate="expected", outlier="forward_kl_reward"),
        ValueError, "gate='expected' has no effect",
    ),
    "clip of no ratio": (
        lambda: dataclasses.replace(GKD(), clip_ratio_low=0.2), ValueError, "clip_ratio_low=0.2",
        "no effect", "policy_gradient",
    ),
    "akl with top_k": (
        lambda: TokenRule(divergence="akl", top_k=8), ValueError, "akl", "leave top_k None",
    ),
    "akl with outliers' forward KL": (
        lambda: TokenRule(divergence="akl", gate="bernoulli", outlier="forward_kl"), ValueError,
        "akl", "outlier='forward_kl'",
    ),
    "akl with the forward KL of unsure teachers": (
        lambda: TokenRule(divergence="akl", forward_kl_entropy=1.0), ValueError, "akl",
        "forward_kl_entropy",
    ),
    "jsd with outliers' top_k": (
        lambda: TokenRule(divergence="jsd", gate="threshold", outlier="forward_kl", top_k=8),
        ValueError, "jsd", "top_k=8", "leave top_k None",
    ),
    "mopd without top_k": (lambda: MOPD(top_k=None), ValueError, "give a top_k"),
    "jsd with top_k": (
        lambda: Divergence("jsd", top_k=8), ValueError, "top_k", "'forward_kl'", "TopKJSD", "MOPD",
    ),
    "clip floor": (lambda: ClipOutlier(threshold=0.1), ValueError, "threshold", "0]", "0.1"),
    "mask threshold": (lambda: MaskOutlier(threshold=1), ValueError, "threshold", "0]", "1"),
    "threshold NaN": (lambda: TrOPD(threshold=NAN), ValueError, "threshold", "nan"),
    "threshold None": (lambda: TrOPD(threshold=None), TypeError, "threshold", "number", "None"),
    "beta above 1": (lambda: GKD(1.1), ValueError, "beta", "[0, 1]", "1.1"),
    "beta below 0": (lambda: GKD(-0.1), ValueError, "beta", "[0, 1]", "-0.1"),
    "beta NaN": (lambda: GKD(NAN), ValueError, "beta", "[0, 1]", "nan"),
    "beta of text": (lambda: GKD("0.5"), TypeError, "beta", "number", "'0.5'"),
    "top-k beta 0": (lambda: TopKJSD(beta=0), ValueError, "beta", "strictly between"),
    "top-k beta above 1": (lambda: TopKJSD(beta=2.0), ValueError, "beta", "[0, 1]", "2.0"),
    "top-k beta of text": (lambda: TopKJSD(beta="x"), TypeError, "beta", "number", "'x'"),
    "alpha at a limit": (
        lambda: Divergence("skew_forward", alpha=0), ValueError, "alpha", "strictly between",
    ),
    "alpha NaN": (lambda: Divergence("alpha", alpha=NAN), ValueError, "alpha", "finite", "nan"),
    "alpha to a jsd": (lambda: Divergence("jsd", alpha=0.5), ValueError, "alpha", "takes no"),
    "head mass": (lambda: Divergence("akl", head_mass=2), ValueError, "head_mass", "[0, 1]"),
    "prefix weight": (lambda: TrOPD(prefix_weight=-1), ValueError, "prefix_weight", "-1"),
    "z loss": (lambda: SFT(z_loss=-1e-4), ValueError, "z_loss", "[0, inf]", "-0.0001"),
    "z loss no number": (lambda: SFT(z_loss="1e-4"), TypeError, "z_loss", "number"),
    "smoothing": (
        lambda: SFT(label_smoothing=1.5), ValueError, "label_smoothing", "[0, 1]", "1.5",
    ),
    "smoothing no number": (
        lambda: SFT(label_smoothing=None), TypeError, "label_smoothing", "number", "None",
    ),
    "smoothing of no labels": (
        lambda: TokenRule(label_smoothing=0.1), ValueError, "label_smoothing=0.1", "nll_weight",
    ),
    "clip low above 1": (
        lambda: TrOPD(clip_ratio_low=1.5), ValueError, "clip_ratio_low", "[0, 1]", "1.5",
    ),
    "clip high below 0": (lambda: TrOPD(clip_ratio_high=-1), ValueError, "clip_ratio_high", "-1"),
    "kl penalty": (lambda: OPD(kl_penalty_coef="1"), TypeError, "kl_penalty_coef", "number"),
    "entropy coef": (lambda: TrOPD(entropy_coef=NAN), ValueError, "entropy_coef", "finite"),
    "entropy threshold": (lambda: EOPD(entropy_threshold=-1), ValueError, "entropy_threshold"),
    "clip ratio": (lambda: EOPD(clip_ratio=-1), ValueError, "clip_ratio ", "-1"),
    "top fraction 0": (lambda: EntropyOPD(top_fraction=0), ValueError, "top_fraction", "above 0"),
    "top fraction": (lambda: EntropyOPD(top_fraction=1.5), ValueError, "top_fraction", "[0, 1]"),
    "reward": (lambda: TokenRule(reward="kl"), ValueError, "reward ", "'proximal'", "'kl'"),
    "reward without its parameter": (
        lambda: TokenRule(reward="power"), ValueError, "reward='power'", "reward_parameter",
        "above 0",
    ),
    "reward with another's parameter": (
        lambda: TokenRule(reward="sign", reward_parameter=2.0), ValueError, "reward='sign'",
        "takes no reward_parameter", "'power' or 'proximal' or 'tanh'",
    ),
    "tanh of 0": (
        lambda: TokenRule(reward="tanh", reward_parameter=0.0), ValueError, "reward='tanh'",
        "above 0", "0.0",
    ),
    "parameter of no transform": (
        lambda: TokenRule(reward_parameter=0.5), ValueError, "'log_ratio'", "reward_parameter",
    ),
    "power 0": (
        lambda: TokenRule(reward="power", reward_parameter=0), ValueError, "reward_parameter",
        "above 0", "0",
    ),
    "power NaN": (
        lambda: TokenRule(reward="power", reward_parameter=NAN), ValueError, "reward_parameter",
    ),
    "power of text": (
        lambda: TokenRule(reward="power", reward_parameter="5"), TypeError, "reward_parameter",
        "number",
    ),
    "proximal above 1": (
        lambda: TokenRule(reward="proximal", reward_parameter=1.5), ValueError,
        "reward_parameter", "1]", "1.5",
    ),
    "proximal 0": (
        lambda: TokenRule(reward="proximal", reward_parameter=0.0), ValueError,
        "reward_parameter", "(0, 1]",
    ),
    "reward of the top-k jsd": (
        lambda: TokenRule(divergence="topk_jsd", top_k=8, reward="sign"), ValueError, "topk_jsd",
        "a reward of its own", "'sign'",
    ),
    "reward policy": (
        lambda: TokenRule(reward_policy="new"), ValueError, "reward_policy", "'current'", "'new'",
    ),
    "reward filter": (
        lambda: TokenRule(reward_filter="correct"), ValueError, "reward_filter", "'positive'",
    ),
    "reward clip upside down": (
        lambda: TokenRule(clip_reward_low=1.0, clip_reward_high=0.5), ValueError,
        "clip_reward_low=1.0", "clip_reward_high=0.5",
    ),
    "reward clip NaN": (
        lambda: TokenRule(clip_reward_high=NAN), ValueError, "clip_reward_high", "finite",
    ),
    "alpha of PowerOPD": (lambda: PowerOPD(alpha=0), ValueError, "alpha", "above 0"),
    "alpha of TOP-D": (lambda: TOPD(alpha=2.0), ValueError, "alpha", "1]", "2.0"),
    "scale of TV-OPD": (lambda: TVOPD(scale="1"), TypeError, "scale", "number", "'1'"),
    "no distillation in KDRL": (
        lambda: KDRL(task_weight=1.0, kl_penalty_coef=0), ValueError, "task_weight", "no effect",
    ),
    "task weight": (lambda: TokenRule(task_weight=INF), ValueError, "task_weight", "finite"),
    **{
        f"{name} of no reward": (
            lambda more={name: value}: TokenRule(policy_gradient=0.0, nll_weight=1.0, **more),
            ValueError, f"{name}={value!r} has no effect with policy_gradient=0",
        )
        for name, value in (
            ("reward", "tanh"), ("reward_policy", "current"), ("clip_reward_low", -1.0),
            ("clip_reward_high", 1.0), ("task_weight", 1.0), ("reward_filter", "negative"),
        )
    },
    "stage": (lambda: REOPOLD(stage=3), ValueError, "stage", "1 or 2", "3"),
    "mixing 0": (lambda: REOPOLD(mixing=0), ValueError, "mixing", "above 0"),
    "mixing": (lambda: REOPOLD(mixing=0.6), ValueError, "mixing", "[0, 0.5]", "0.6"),
    "entropy quantile": (
        lambda: REOPOLD(stage=2, entropy_quantile=1), ValueError, "entropy_quantile", "below 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_objectives(case):
    make, error, *words = RULES[case]
    refused(make, error, *words)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rules_are_frozen_and_can_be_pasted_back(name):
    rule = OBJECTIVES[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.gate = "always"
    assert eval(repr(rule)) == rule
    assert TokenRule(**json.loads(json.dumps(dataclasses.asdict(rule)))) == rule
    assert decode_rule(rule.key) == rule
    assert hash(rule) == hash(decode_rule(rule.key))
    # The key is the whole rule: it is all that the op is told of it.
    other = dataclasses.replace(rule, entropy_coef=rule.entropy_coef + 0.25)
    assert other != rule and other.key != rule.key and decode_rule(other.key) == other


def test_a_static_gate_reads_the_rewards_policy():
    rule = TokenRule(
        policy_gradient=0.0, gate="threshold", outlier="forward_kl", reward_policy="current"
    )
    assert decode_rule(rule.key) == rule


def test_numbers_of_numpy_are_numbers():
    """np.float64 is a float, but is not written like one."""
    np = pytest.importorskip("numpy")
    rule = ClipOutlier(threshold=np.log(0.25))
    assert rule == ClipOutlier(threshold=math.log(0.25))
    assert decode_rule(rule.key) == rule == eval(repr(rule))
