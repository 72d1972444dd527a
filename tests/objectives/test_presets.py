"""The rules of published objectives, written out from their sources."""

import pytest
import torch

from tropd_kernels import AOPD, EOPD, LogitsTeacher, TokenRule, TrOPD, distillation_loss

#: Each preset, and its rule as the source has it.
RULES = {
    "TrOPD, arXiv 2606.01249": (
        TrOPD.paper(),
        TokenRule(gate="bernoulli", outlier="forward_kl", top_k=64, prefix_weight=0.001),
    ),
    "TrOPD, the authors' code as reported": (
        TrOPD.official_code(),
        TokenRule(
            gate="bernoulli", outlier="forward_kl_reward", top_k=64,
            top_k_tail="renormalize_teacher", prefix_weight=0.001,
        ),
    ),
    "EOPD, arXiv 2603.07079": (
        EOPD(),
        TokenRule(
            forward_kl_entropy=0.8, top_k=16, top_k_tail="renormalize_teacher", clip_ratio_low=0.2,
            clip_ratio_high=0.2, prefix_weight=0.001,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_rule_of_a_preset(name):
    preset, rule = RULES[name]
    assert preset == rule


def test_a_reward_that_aopd_keeps_is_one_that_tropd_accepts():
    """So both gates together, with the forward KL outside of either, are AOPD's alone."""
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
