"""Credit over time where the teacher gives a token probability 0."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

from tropd_kernels import SampledTeacher, TopKTeacher, distillation_loss
from tropd_kernels.credit import importance_weights, return_to_go
from tropd_kernels.draws import bernoulli_uniforms

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
