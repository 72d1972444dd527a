"""Credit over time where the teacher gives a token probability 0."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

from tropd_kernels import SampledTeacher, TokenRule, TopKTeacher, distillation_loss
from tropd_kernels.credit import importance_weights, return_to_go
from tropd_kernels.draws import bernoulli_uniforms
from tropd_kernels.trainer import rewards

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CREDIT = dict(kl_discount_factor=0.9, importance_gamma=0.5)
PROMPT, COMPLETION = [6, 7], [8, 9, 10, 11]
IDS, LOG_PROBS = [[20, 21]] * 4, [[-3.5, -4.5]] * 4  # beside what COMPLETION has


def run(folder, label_log_probs, **settings):
    """One step on one row."""
    row = dict(
        prompt="w1 w2", completion_ids=COMPLETION, teacher_label_log_probs=label_log_probs,
        teacher_ids=IDS, teacher_log_probs=LOG_PROBS,
    )  # fmt: skip
    trainer = make(
        folder, data=tiny.Dataset.from_list([row]), precomputed_teacher=True,
        per_device_train_batch_size=1, **settings,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("credit", [CREDIT, {"kl_discount_factor": 0.9}, {"importance_gamma": 0.5}])
@pytest.mark.parametrize("objective", ["clip_outlier", "mask_outlier", "aopd", "tropd", "reopold"])
def test_excluded_token_stays_local(tmp_path, objective, credit):
    """... and keeps its place outside the gate, though the tokens behind it are well rewarded:
    against the loss by hand. To leave credit out for the micro-batch would be the plain loss."""
    theirs = [-1.0, -math.inf, -0.1, -0.1]
    top_k = dict(objective_kwargs={"top_k": 2}) if objective in ("aopd", "tropd") else {}
    settings = dict(objective=objective, **top_k)
    trainer = run(tmp_path, theirs, **settings, **credit)
    rule = trainer.args.rule()

    with torch.no_grad():
        logits = tiny.model(0)(torch.tensor([PROMPT + COMPLETION])).logits[:, 1:-1].double()
    labels, lq = torch.tensor([COMPLETION]), torch.tensor([theirs]).double()
    reward = lq - logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
    options = {}
    if "importance_gamma" in credit:
        options["token_weight"] = importance_weights(reward, gamma=0.5)
    if "kl_discount_factor" in credit:
        floored = reward.clone()
        floored[0, 1] = rule.threshold
        options["advantages"] = return_to_go(floored, discount=0.9)
        options["advantages"][0, 1] = rule.threshold
    teacher = SampledTeacher(lq)
    if top_k:
        teacher = TopKTeacher(torch.tensor([IDS]), torch.tensor([LOG_PROBS]).double(), lq)
    zero, places = torch.zeros(1, 1).long(), torch.arange(4)[None]
    draws = bernoulli_uniforms(trainer.args.seed, 0, zero, places)
    true = distillation_loss(
        logits, labels, teacher, rule, uniforms=draws, backend="reference", **options
    ).loss
    assert trainer.losses[0] == pytest.approx(true.item(), rel=1e-5)
    plain = run(tmp_path, theirs, **settings)
    assert plain.losses[0] != pytest.approx(true.item(), rel=1e-2)


def test_a_bounded_reward_is_discounted_as_the_objective_has_it(tmp_path):
    """PowerOPD's returns are of q^5 - p^5, of which an excluded token's is finite; the discrepancy
    that importance weights count is the log-ratio all the same."""
    theirs = [-0.1, -math.inf, -0.2, -0.05]
    trainer = run(tmp_path, theirs, objective="power_opd", **CREDIT)
    with torch.no_grad():
        logits = tiny.model(0)(torch.tensor([PROMPT + COMPLETION])).logits[:, 1:-1].double()
    labels, lq = torch.tensor([COMPLETION]), torch.tensor([theirs]).double()
    lp = logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
    returns = return_to_go((5 * lq).exp() - (5 * lp).exp(), discount=0.9)
    assert returns.isfinite().all()
    true = -(returns * importance_weights(lq - lp, gamma=0.5)).mean()
    assert trainer.losses[0] == pytest.approx(true.item(), rel=1e-5)


def test_a_bounded_reward_stays_outside_a_static_gate():
    """... where its token is excluded, however well the later ones are rewarded; the earlier ones
    answer for it as the transform has it."""
    theirs = torch.tensor([[-1.0, -math.inf, -0.1, -0.1]])
    rule = TokenRule(reward="tanh", gate="threshold", outlier="mask", threshold=-0.5)
    logits, labels = torch.randn(1, 4, 9), torch.zeros(1, 4, dtype=torch.long)
    stats = distillation_loss(
        logits, labels, SampledTeacher(theirs), rewards.reward_rule(rule)
    ).stats
    args = SimpleNamespace(kl_discount_factor=0.9, importance_gamma=None, drift_tau=None)
    own = torch.ones(1, 4, dtype=torch.bool)
    made = rewards.token_credit(args, rule, stats, own, None)["advantages"]
    returns = return_to_go((theirs - stats.log_probs).tanh(), discount=0.9)
    assert returns[0, 1] > rule.threshold
    returns[0, 1] = rule.threshold
    torch.testing.assert_close(made, returns)


@pytest.mark.parametrize("objective", ["opd", "entropy_opd"])
def test_unbounded_loss_stops(tmp_path, objective):
    """entropy_opd may leave the token itself out, but not the earlier ones that answer for it."""
    settings = dict(objective=objective, kl_discount_factor=0.9)
    if objective == "entropy_opd":
        settings["objective_kwargs"] = {"top_fraction": 0.3}
    for place in range(1, 4):
        theirs = [-1.0] * 4
        theirs[place] = -math.inf
        with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
            run(tmp_path, theirs, **settings)
