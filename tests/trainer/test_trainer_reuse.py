"""Several optimiser steps on one generation batch: ratio, drift gates, resume."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import transformers
from training import RATE, by_hand, make, resume_and_compare

from tropd_kernels.trainer import trainer as trainer_module

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CREDIT = dict(drift_tau=3.0, drift_block_size=4, importance_gamma=0.5, kl_discount_factor=0.5)
CASES = {
    "tropd": {},
    "opd, credit": dict(objective="opd", **CREDIT),
    "eopd, clipped": dict(objective="eopd", objective_kwargs={"clip_ratio": 0.05}),
    "tropd, prefix, drift": dict(
        drift_tau=3.0, drift_block_size=4, prefix_schedule="constant", prefix_length=3,
        prefix_weight=0.5,
    ),
    # The first step does not make the log-probs of what it leaves out; drift is of all tokens.
    "by the teacher's entropy": dict(
        objective="opd", select_by="teacher_entropy", select_fraction=0.5, drift_tau=3.0,
        drift_block_size=4,
    ),
    "by returns": dict(objective="opd", select_by="reward", select_fraction=0.5, **CREDIT),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_second_step_on_a_batch(tmp_path, case):
    """Against the loop by hand, with the log-probs of the policy that wrote the batch: losses and
    gradients of the second step, which the first has moved away from."""
    settings = dict(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_iterations=2,
        **CASES[case],
    )
    teacher = tiny.model(1, hidden_size=48)
    first = make(tmp_path, teacher=teacher, **settings)
    first.train()
    trainer = make(tmp_path, teacher=teacher, max_steps=2, **settings)
    trainer.train()
    assert trainer.losses[:4] == first.losses
    for one, other in zip(trainer.batches[:4], trainer.batches[4:]):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
    twin = copy.deepcopy(first.model).double()
    loss = by_hand(
        trainer, twin, copy.deepcopy(teacher).double(), step=1, sampler=tiny.model(0).double()
    )
    assert sum(trainer.losses[4:]) == pytest.approx(loss.item(), rel=1e-4)
    old, new = (torch.cat([p.detach().flatten() for p in m.parameters()])
                for m in (first.model, trainer.model))  # fmt: skip
    gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
    error = ((old - new).double() / RATE - gradient).norm()
    assert error <= 1e-4 * gradient.norm() + 2e-7 * old.norm() / RATE


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        (dict(select_by="reward", select_fraction=0.5), [1, 1]),
        (dict(select_by="teacher_entropy", select_fraction=0.5), [2, 1]),
        (dict(select_by="reward", select_fraction=0.5, kl_discount_factor=0.5), [2, 2]),
        (dict(select_by="teacher_entropy", select_fraction=0.5, importance_gamma=0.5), [2, 2]),
        # The entropy is the target's, which is made of both models.
        (dict(select_by="teacher_entropy", select_fraction=0.5, objective="veto",
              objective_kwargs={"student_power": 0.5}), [1, 1]),
    ],
)  # fmt: skip
def test_passes_over_the_heads(tmp_path, monkeypatch, settings, calls):
    """The pass that makes the rewards has every token's log-probs: none makes them once more."""
    counted: list[int] = []
    loss = trainer_module.linear_distillation_loss

    def counting(*arguments, **keywords):
        counted.append(run.state.global_step)
        return loss(*arguments, **keywords)

    monkeypatch.setattr(trainer_module, "linear_distillation_loss", counting)
    run = make(tmp_path, num_iterations=2, max_steps=2, **({"objective": "opd"} | settings))
    run.train()
    assert [counted.count(step) for step in (0, 1)] == calls
    batch = run.batches[1]
    twin = copy.deepcopy(tiny.model(0)).double()
    for i, old in enumerate(batch["old_log_probs"]):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        labels = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, labels])[None]
        with torch.no_grad():
            log_p = twin(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(
            old[: len(labels)].double(),
            log_p.gather(1, labels[:, None])[:, 0],
            rtol=1e-4,
            atol=1e-5,
        )


def test_each_batch_is_used_so_often(tmp_path):
    """Three steps a batch, with rows of the data set that come once an epoch."""
    trainer = make(tmp_path, num_iterations=3, max_steps=6, per_device_train_batch_size=4)
    trainer.train()
    batches = [b["completion_ids"] for b in trainer.batches]
    for start in (0, 3):
        assert all(torch.equal(batches[start], b) for b in batches[start : start + 3])
    prompts = [
        {tuple(p[p != 0].tolist()) for p in trainer.batches[i]["prompt_ids"]} for i in (0, 3)
    ]
    assert not prompts[0] & prompts[1]


def test_evaluation_between_leaves_the_batch(tmp_path):
    plain = make(tmp_path, num_iterations=2, max_steps=2)
    plain.train()
    evaluated = make(
        tmp_path, num_iterations=2, max_steps=2, evaluate=tiny.prompts(4),
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    evaluated.train()
    training = [loss for loss, (_, on) in zip(evaluated.losses, evaluated.seen) if on]
    assert training == plain.losses


@pytest.mark.parametrize("stop", [2, 3])  # in the middle of a batch's steps, and after them
def test_resume_goes_on_with_the_batch(tmp_path, stop):
    resume_and_compare(tmp_path, stop, max_steps=6, num_iterations=3, drift_tau=2.0)


@pytest.mark.parametrize(("rows", "parts"), [(4, 1), (1, 4)])
def test_resume_with_another_split(tmp_path, rows, parts):
    """Counted anew, the saved micro-batches would be trained on in part. Between batches any split
    will do, and so it will with the file away."""
    settings = dict(num_iterations=2, save_strategy="steps", save_steps=1)
    saved = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    make(tmp_path, max_steps=2, **settings, **saved).train()
    other = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=parts)

    def resumed(step):
        trainer = make(tmp_path, max_steps=3, num_iterations=2, **other)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        return trainer

    with pytest.raises(ValueError, match=f"per_device_train_batch_size 2 and 2; now {parts} a"):
        resumed(1)
    assert len(resumed(2).batches) == parts
    (tmp_path / "checkpoint-1" / "generation_batch_0.pt").unlink()
    assert sum(len(batch["prompt_ids"]) for batch in resumed(1).batches) == 8


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        (dict(temperature=1.0), dict(temperature=2.0), "temperature 1.0; now 2.0"),
        (dict(several="ab"), dict(several="ba"), r"teacher_models \['a', 'b'\]; now \['b', 'a'\]"),
        (dict(several="cab"), dict(several="ab"), r"teacher_models \['c', 'a', 'b'\]; now \['a'"),
        (dict(several="ab"), dict(several="abc"), r"teacher_models \['a', 'b'\]; now .*'c'\]"),
        ({}, dict(several="ab"), "teacher_models unknown; now"),
    ],
    ids=str,
)  # fmt: skip
def test_a_batch_of_other_settings(tmp_path, saved, now, words):
    """A batch says of each row at which place its teacher is, and how likely the tokens were."""
    teachers = {name: tiny.model(seed) for seed, name in enumerate("abc", 1)}
    data = tiny.prompts(8, teacher_id=["a", "b"] * 4)

    def made(steps, given):
        given = dict(given)
        if (names := given.pop("several", None)) is not None:
            given["several"] = {name: teachers[name] for name in names}
        return make(tmp_path, data=data, max_steps=steps, num_iterations=2,
                    save_strategy="steps", save_steps=1, **given)  # fmt: skip

    made(2, saved).train()
    with pytest.raises(ValueError, match=words):
        made(3, now).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    made(3, now).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-1" / "generation_batch_0.pt").unlink()
    made(3, now).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_batch_of_an_earlier_revision(tmp_path):
    """... which does not say its settings."""
    settings = dict(num_iterations=2, save_strategy="steps", save_steps=1)
    make(tmp_path, **settings).train()
    file = tmp_path / "checkpoint-1" / "generation_batch_0.pt"
    torch.save(torch.load(file)["batch"], file)
    with pytest.raises(ValueError, match="temperature .*unknown; now .*delete generation_batch_"):
        make(tmp_path, **settings).train(resume_from_checkpoint=str(file.parent))


def test_one_teacher_after_several(tmp_path):
    """It reads the rows of all."""
    data = tiny.prompts(8, teacher_id=["a", "b"] * 4)
    settings = dict(data=data, num_iterations=2, save_strategy="steps", save_steps=1)
    make(tmp_path, several={"a": tiny.model(1), "b": tiny.model(2)}, **settings).train()
    trainer = make(tmp_path, max_steps=2, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(trainer.batches) == 1


def test_resume_on_fewer_processes(tmp_path):
    """One process has only its share of the rows, and their loss is over the tokens of all."""
    settings = dict(num_iterations=2, save_strategy="steps", save_steps=1)
    make(tmp_path, max_steps=1, **settings).train()
    folder = tmp_path / "checkpoint-1"
    part = torch.load(folder / "generation_batch_0.pt")
    torch.save(part, folder / "generation_batch_1.pt")
    trainer = make(tmp_path, max_steps=2, **settings)
    trainer.train(resume_from_checkpoint=str(folder))
    (batch,) = trainer.batches
    assert not torch.equal(batch["completion_ids"], part["batch"][0]["completion_ids"])


def test_streams_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_iterations: .* load the data set whole"):
        make(tmp_path, data=tiny.prompts().to_iterable_dataset(), num_iterations=2)


def test_a_run_after_one_that_was_interrupted(tmp_path):
    """Amid a step: the next run would take half of each from the batch of the step before."""

    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **keywords):
            if state.global_step == 1:
                raise KeyboardInterrupt

    trainer = make(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.seen = []
    trainer.train()
    ids = [sorted(batch["sequence_ids"].tolist()) for batch in trainer.batches]
    assert [sorted(a + b) for a, b in zip(ids[::2], ids[1::2])] == [[0, 1, 2, 3]] * 3
    windows = [batch["num_items_in_batch"].item() for batch in trainer.batches]
    assert windows[::2] == windows[1::2]
