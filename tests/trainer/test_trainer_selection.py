"""Training on the tokens that `select_by` selects, against the loop by hand."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make, resume_and_compare, step_and_compare

from tropd_kernels import OPD, TokenRule
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HERE = dict(use_cpu=True, bf16=False, report_to="none")
HALF = dict(select_fraction=0.5)
GUIDED = dict(prefix_schedule="constant", prefix_length=3)
CASES = {
    "tropd, beside a prefix": dict(select_by="reverse_kl", **HALF, **GUIDED, prefix_weight=0.5),
    "opd": dict(objective="opd", select_by="reward", select_fraction=0.3),
    "opd, by its return": dict(
        objective="opd", select_by="reward", **HALF, kl_discount_factor=0.5
    ),
    "tropd, credit": dict(
        objective_kwargs={"gate": "expected"}, select_by="disagreement", select_fraction=0.7,
        kl_discount_factor=0.5, importance_gamma=0.5,
    ),
    "gkd, with its prefix": dict(objective="gkd", select_by="teacher_entropy", **HALF, **GUIDED),
    "sft, by a teacher": dict(objective="sft", select_by="disagreement", **HALF),
    "reopold's first stage": dict(
        objective="reopold", objective_kwargs={"stage": 1}, select_by="reward", **HALF,
        gradient_accumulation_steps=1,  # the mean over kept tokens is a micro-batch's
    ),
    # What a threshold selects is the same in any micro-batch.
    "a threshold": dict(
        select_by="entropy", select_threshold=2.0, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    ),
}  # fmt: skip


def logged(trainer) -> dict:
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    return log


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_selected_tokens(tmp_path, case):
    """The loop by hand goes over single completions, and so ranks within each."""
    alone = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    teacher = tiny.model(1, hidden_size=48)
    trainer = make(tmp_path, teacher=teacher, **(alone | CASES[case]))
    step_and_compare(trainer, teacher)
    assert 0.1 < logged(trainer)["tropd/selected_share"] < 0.9


def test_a_resumed_run_selects_the_same(tmp_path):
    resume_and_compare(
        tmp_path, 3, max_steps=6, num_iterations=2, select_by="teacher_entropy", **HALF
    )


def test_old_log_probs_are_over_the_shared_ids(tmp_path):
    """... also of tokens that were not selected: the student's head is taller than the teacher's,
    and ids beyond the teacher's are never sampled."""
    trainer = make(
        tmp_path, tiny.model(0, vocab_size=104), tiny.model(1, vocab_size=98), objective="opd",
        select_by="teacher_entropy", max_steps=2, num_iterations=2, learning_rate=0.0, **HALF,
    )  # fmt: skip
    trainer.train()
    batch, writer = trainer.batches[1], tiny.model(0, vocab_size=104)
    for i in range(4):
        prompt, labels = (batch[f"{part}_ids"][i][batch[f"{part}_mask"][i].bool()]
                          for part in ("prompt", "completion"))  # fmt: skip
        with torch.no_grad():
            logits = writer(torch.cat([prompt, labels])[None]).logits[0, len(prompt) - 1 : -1, :98]
        true = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(batch["old_log_probs"][i][: len(labels)], true)


def known_by_hand(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and teacher's entropies of a micro-batch's tokens, at the first step."""
    teacher, student = tiny.model(1, hidden_size=48).double(), tiny.model(0).double()
    rewards, entropies = [], []
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        labels = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, labels])[None]
        with torch.no_grad():
            log_p, log_q = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                            for m in (student, teacher))  # fmt: skip
        rewards.append((log_q - log_p).gather(1, labels[:, None])[:, 0])
        entropies.append(-(log_q.exp() * log_q).sum(1))
    return torch.cat(rewards), torch.cat(entropies)


def test_metrics_are_over_the_tokens_at_which_they_are_known(tmp_path):
    """... those selected, where the score is the teacher's alone, and all where it is the
    discrepancy. A fraction is of the whole micro-batch."""
    trainer = make(
        tmp_path, objective="opd", select_by="teacher_entropy", **HALF, log_regions=True,
        evaluate=tiny.prompts(4),
    )  # fmt: skip
    trainer.train()
    reward, entropy = known_by_hand(trainer.batches[0])
    chosen = entropy >= entropy.quantile(0.5)
    assert chosen.sum() == math.ceil(len(chosen) / 2)
    log = logged(trainer)
    assert log["tropd/selected_share"] == pytest.approx(chosen.double().mean().item())
    assert log["tropd/reward_mean"] == pytest.approx(reward[chosen].mean().item(), rel=1e-4)
    assert log["tropd/reward_min"] == pytest.approx(reward[chosen].min().item(), rel=1e-4)
    assert log["tropd/teacher_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert log["tropd/select_threshold"] == pytest.approx(entropy[chosen].min().item(), rel=1e-4)
    held = entropy[chosen].sum() / entropy.sum()
    assert log["tropd/selected_score_share"] == pytest.approx(held.item(), rel=1e-4)
    assert math.isfinite(log["entropy"])
    (page,) = (tmp_path / "regions").glob("train_*.html")
    text = page.read_text()
    assert text.count('class="left_out"') - 1 == (~chosen).sum()  # 1: the legend
    assert text.count('class="outlier"') == 1
    found = trainer.evaluate()
    assert 0.45 < found["eval_tropd/selected_share"] < 0.6
    assert 0.5 < found["eval_tropd/selected_score_share"] < 0.8

    trainer = make(tmp_path, objective="opd", select_by="disagreement", **HALF)
    trainer.train()
    reward, _ = known_by_hand(trainer.batches[0])
    log = logged(trainer)
    assert log["tropd/reward_mean"] == pytest.approx(reward.mean().item(), rel=1e-4)
    assert log["tropd/reward_min"] == pytest.approx(reward.min().item(), rel=1e-4)

    for settings, names in (
        (dict(select_by="reward", **HALF), {"selected_share", "select_threshold"}),
        ({}, set()),
    ):
        trainer = make(tmp_path, objective="opd", **settings)
        trainer.train()
        assert {name[6:] for name in logged(trainer) if name.startswith("tropd/select")} == names


def test_the_share_is_of_the_tokens_that_are_ranked(tmp_path):
    """A prefix that is weighed is not; teacher-written tokens of an objective without such a term
    are."""
    for objective in ("opd", "gkd"):
        trainer = make(tmp_path, objective=objective, select_by="entropy", **HALF, **GUIDED)
        trainer.train()
        (batch,) = trainer.batches
        tokens = int(batch["completion_mask"].sum())
        ranked = tokens - (int(batch["prefix_lengths"].sum()) if objective == "opd" else 0)
        share = logged(trainer)["tropd/selected_share"]
        assert share == pytest.approx(math.ceil(ranked / 2) / ranked), objective


def test_a_step_without_a_selected_token(tmp_path):
    """... moves nothing, and what no token has is not logged."""
    before = tiny.model(0)
    trainer = make(tmp_path, objective="opd", select_by="teacher_entropy", select_threshold=1e9)
    trainer.train()
    log = logged(trainer)
    assert log["loss"] == log["tropd/selected_share"] == log["tropd/selected_score_share"] == 0
    unknown = {"entropy", "tropd/reward_min", "tropd/reward_mean", "tropd/select_threshold"}
    assert not unknown & log.keys()
    for old, new in zip(before.parameters(), trainer.model.parameters()):
        assert torch.equal(old, new)


def test_a_teacher_that_only_ranks_is_asked_too(tmp_path):
    """... for what the score needs, in columns of the data; and without one the setting is
    named."""
    label = [-1.0, -9.0, -0.5, -8.0]
    row = dict(prompt="w1 w2", completion_ids=[8, 9, 10, 11], teacher_label_log_probs=label)
    settings = dict(objective="sft", select_by="disagreement", **HALF)
    trainer = make(
        tmp_path, data=tiny.Dataset.from_list([row]), precomputed_teacher=True,
        per_device_train_batch_size=1, **settings,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        logits = tiny.model(0)(torch.tensor([[6, 7, *row["completion_ids"]]])).logits[0, 1:-1]
    lp = logits.log_softmax(-1).gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]
    most = (torch.tensor(label) - lp).abs().topk(2).indices
    assert trainer.losses[0] == pytest.approx(-lp[most].sum().item() / 4, rel=1e-5)

    del row["teacher_label_log_probs"]
    with pytest.raises(ValueError, match="teacher_label_log_probs"):
        make(tmp_path, data=tiny.Dataset.from_list([row]), precomputed_teacher=True, **settings)
    with pytest.raises(ValueError, match="objective 'sft' with select_by 'disagreement' needs a t"):
        TrOPDTrainer(
            tiny.model(0), None, config(output_dir=str(tmp_path), **settings), tiny.prompts(),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip


def config(output_dir="unused", **settings) -> TrOPDConfig:
    return TrOPDConfig(output_dir, **(HERE | settings))


def test_the_settings_join_the_objective_s_rule():
    rule = config(objective="opd", select_by="entropy", select_threshold=1.0).rule()
    assert rule == TokenRule(prefix_weight=0.001, select_by="entropy", select_threshold=1.0)
    assert config(objective="opd", prefix_weight=0.001).rule() == OPD()


ENTROPY = dict(select_by="entropy", **HALF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select_by": "scores", **HALF}, "select_by: 'scores' reads scores= in every call"),
        ({"select_by": "entropie", **HALF}, "select_by: "),
        ({"select_by": "entropy"}, "select_by: select_by='entropy' needs either"),
        (HALF, "select_fraction: select_fraction and select_threshold need a score"),
        ({"select_threshold": 1.0}, "select_threshold: select_fraction and select_threshold need"),
        ({"select_threshold": math.nan}, "select_threshold: "),
        ({"select_by": "entropy", "select_fraction": 0}, "select_fraction: "),
        ({"select_by": "entropy", "select_fraction": 1.5}, "select_fraction: "),
        ({"select_by": "entropy", "select_threshold": math.nan}, "select_threshold: "),
        ({"select_by": "entropy", "select_fraction": "half"}, "select_fraction: expected a number"),
        ({"lmbda": 0.0, **ENTROPY}, "select_by: it would have no effect: with lmbda 0 every token"),
        ({"objective": "entropy_opd", **ENTROPY}, "select_by: objective 'entropy_opd' selects"),
        ({"objective": "reopold", **ENTROPY}, "select_by: objective 'reopold' selects tokens"),
        ({"select_by": "reverse_kl", **HALF, "precomputed_teacher": True},
         "select_by: with precomputed_teacher: "),
        ({"select_by": "teacher_entropy", **HALF, "objective": "opd",
          "teacher_model_server_url": "http://127.0.0.1:1"},
         "select_by: with teacher_model_server_url: "),
    ],
)  # fmt: skip
def test_what_cannot_be_selected_is_refused(settings, message):
    with pytest.raises(ValueError) as caught:
        config(**settings)
    assert str(caught.value).startswith(message)


def test_what_a_served_teacher_s_scores_are_of_is_taken():
    for more in ({"select_by": "teacher_entropy"}, {"select_by": "reward"}):
        config(**more, **HALF, precomputed_teacher=True)
    config(objective="opd", select_by="disagreement", **HALF, precomputed_teacher=True)
    config(prefix_weight=None, lmbda=0.0, **ENTROPY)
