"""The rules of published objectives, written out from their sources, with the sources' defaults."""

import math

import pytest
import torch

import tropd_kernels
from tropd_kernels import (
    AOPD,
    CADENCE,
    EOPD,
    GKD,
    KDRL,
    LSM,
    OPDVR,
    REOPOLD,
    TOPD,
    TVOPD,
    DemoPSD,
    ExOPD,
    Log1pOPD,
    LogitsTeacher,
    PowerOPD,
    TokenRule,
    TrOPD,
    TrOPD_AOPD,
    Veto,
    distillation_loss,
)

#: TrOPD's weight of the forward KL on a teacher-written prefix: its beta.
BETA = 0.001

#: Each preset, and its rule as the source has it.
RULES = {
    "TrOPD, arXiv 2606.01249: k 64, beta 0.001, the forward KL summed over the top-k": (
        TrOPD.paper(),
        TokenRule(gate="bernoulli", outlier="forward_kl", top_k=64, prefix_weight=BETA),
    ),
    "TrOPD, the authors' code as reported": (
        TrOPD.official_code(),
        TokenRule(
            gate="bernoulli", outlier="forward_kl_reward", top_k=64,
            top_k_tail="renormalize_teacher", prefix_weight=BETA,
        ),
    ),
    "TrOPD + AOPD, arXiv 2606.01249": (
        TrOPD_AOPD(),
        TokenRule(
            gate="threshold", threshold=0.0, outlier="forward_kl", top_k=64, prefix_weight=BETA
        ),
    ),
    "EOPD, arXiv 2603.07079": (
        EOPD(),
        TokenRule(
            forward_kl_entropy=0.8, top_k=16, top_k_tail="renormalize_teacher", clip_ratio_low=0.2,
            clip_ratio_high=0.2, prefix_weight=BETA,
        ),
    ),
    "PowerOPD, arXiv 2606.17199: scripts/run_poweropd.sh, POWER_REWARD_ALPHA 5": (
        PowerOPD(), TokenRule(reward="power", reward_parameter=5.0, prefix_weight=BETA),
    ),
    "TOP-D, arXiv 2607.04751: rho in [0.8, 1.2]; prime-rl#2966, NeMo-RL#4011: alpha 0.2": (
        TOPD(),
        TokenRule(
            reward="proximal", reward_parameter=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2,
            prefix_weight=BETA,
        ),
    ),
    "Demystifying OPD, arXiv 2607.13399": (
        Log1pOPD(), TokenRule(reward="log1p", prefix_weight=BETA),
    ),
    "TV-OPD, arXiv 2609.08341: Sign-TV, c 1": (
        TVOPD(), TokenRule(policy_gradient=1.0, reward="sign", prefix_weight=BETA),
    ),
    "KDRL, arXiv 2506.02208: A + beta R, beta 0.002": (
        KDRL(), TokenRule(policy_gradient=0.002, task_weight=1 / 0.002, prefix_weight=BETA),
    ),
    "OPDVR, arXiv 2608.24696": (
        OPDVR(), TokenRule(reward_filter="agree", prefix_weight=BETA),
    ),
    "GKD, arXiv 2306.13649: TRL's default beta": (
        GKD(), TokenRule(policy_gradient=0.0, divergence="jsd", divergence_parameter=0.5),
    ),
    "AOPD, arXiv 2605.06387: tau 0": (
        AOPD(),
        TokenRule(
            gate="threshold", threshold=0.0, outlier="forward_kl", top_k=64, prefix_weight=BETA
        ),
    ),
    "REOPOLD, arXiv 2603.11137: stage 1, lambda 0.2": (
        REOPOLD(),
        TokenRule(
            gate="threshold", threshold=math.log(0.2 / 0.8), outlier="mask", normalize="kept",
            prefix_weight=BETA,
        ),
    ),
    "LSM, arXiv 2603.25562: kl_topk_tokens 32, kl_topk_source ref, norm_to_one_for_kl": (
        LSM(),
        TokenRule(
            policy_gradient=0.0, divergence="topk_reverse_kl", top_k=32,
            top_k_tail="renormalize_both",
        ),
    ),
    "CADENCE, arXiv 2607.16955": (CADENCE(), TokenRule(policy_gradient=0.0, divergence="mixed")),
    "Veto, arXiv 2601.07155: beta 0.8 for reasoning, forward KL": (
        Veto(student_power=0.8),
        TokenRule(policy_gradient=0.0, divergence="forward_kl", student_power=0.8),
    ),
    "DemoPSD, arXiv 2607.02502: alpha_max 0.15, reverse KL": (
        DemoPSD(),
        TokenRule(
            policy_gradient=0.0, divergence="reverse_kl", teacher_power=0.85, student_power=0.15
        ),
    ),
    "ExOPD, arXiv 2602.12125: lambda_vals 1.25": (
        ExOPD(), TokenRule(teacher_power=1.25, reference_power=-0.25, prefix_weight=BETA),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_rule_of_a_preset(name):
    preset, rule = RULES[name]
    assert preset == rule


def test_a_preset_without_arguments_is_here():
    """... so that no default changes without its source beside it. The others are older; Veto's
    power has no default."""
    elsewhere = {"OPD", "ClipOutlier", "MaskOutlier", "EntropyOPD", "MOPD", "TopKJSD", "SFT"}
    here = [preset for preset, _ in RULES.values()]
    names = tropd_kernels.__all__
    for name in names[names.index("TrOPD") : names.index("SFT") + 1]:
        if name not in elsewhere | {"Divergence", "Veto"}:
            assert getattr(tropd_kernels, name)() in here, name


def test_a_reward_that_aopd_keeps_is_one_that_tropd_accepts():
    """So both gates together, with the forward KL outside of either, are AOPD's alone: what
    `TrOPD_AOPD` says."""
    torch.manual_seed(0)
    z, t = torch.randn(64, 40), torch.randn(64, 40)
    labels, draws = torch.randint(40, (64,)), torch.rand(64)
    stats = [
        distillation_loss(z, labels, LogitsTeacher(t), rule, uniforms=draws).stats
        for rule in (TrOPD(top_k=5), AOPD(top_k=5))
    ]
    kept = stats[1].trust == 1
    assert kept.any() and not kept.all()
    assert (stats[0].trust[kept] == 1).all()
    assert (stats[0].trust[~kept] == 1).any()  # TrOPD accepts some that AOPD does not
    assert TrOPD_AOPD(top_k=5) == AOPD(top_k=5)


def test_kdrl_by_hand():
    """GRPO's A and beta R (2506.02208): p(y) = 1/2, q(y) = 1/4, A = 1 on one token. The gradient of
    -(A + 0.002 log(1/2)) rho is that times p - 1[y], and that of GRPO less 0.002 k2, (1/2) R^2."""
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[1 / 4, 3 / 4]], dtype=torch.float64).log()
    label, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    distillation_loss(z, label, LogitsTeacher(t), KDRL(), task_advantages=one).loss.backward()
    assert z.grad[0].tolist() == pytest.approx([-0.4993068528, 0.4993068528], abs=1e-10)
    twin = z.detach().requires_grad_()
    log_p = twin.log_softmax(-1)[0, 0]
    k2 = (math.log(1 / 4) - log_p).square() / 2
    (0.002 * k2 - (log_p - log_p.detach()).exp()).backward()
    torch.testing.assert_close(z.grad, twin.grad)
