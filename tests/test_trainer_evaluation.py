"""What an evaluation measures: the same whatever its batches and whatever was run before it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GREEDY = {"generation_kwargs": {"do_sample": False}}


def test_every_row_has_draws_of_its_own(tmp_path):
    """One row a batch would otherwise be gated by the same draws as all the others."""
    models = dict(student=tiny.model(0, spread=0.7), teacher=tiny.model(1, spread=0.7))
    found = []
    for size in (1, 4, 16):
        trainer = make(
            tmp_path, evaluate=tiny.prompts(16), per_device_eval_batch_size=size, **models, **GREEDY
        )
        for _ in range(2):  # ... and the same ones again in the next evaluation
            trainer.seen = []
            trainer.evaluate()
            rows = [
                (*row[mask.bool()].tolist(), draw.item())
                for batch, _ in trainer.seen
                for row, mask, draw in zip(
                    batch["completion_ids"], batch["completion_mask"], batch["sequence_ids"]
                )
            ]
            found.append(rows)
    assert found == [found[0]] * 6
    assert [draw for *_, draw in found[0]] == list(range(16))


def test_a_run_on_the_teacher_s_text_is_measured_on_it(tmp_path):
    """Without a step on-policy, that is; by hand: the mean NLL of the column and the end."""
    answers = [f" w{i} w{i + 1}" for i in range(8)]
    data = tiny.prompts(8, teacher_completion=answers)
    settings = dict(data=data, evaluate=data, objective="sft", per_device_eval_batch_size=8)
    trainer = make(tmp_path, lmbda=0.0, **settings)
    total = tokens = 0
    for row in data:
        prompt, answer = (
            trainer.processing_class(row[name])["input_ids"]
            for name in ("prompt", "teacher_completion")
        )
        answer.append(2)
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
        tokens += len(answer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    partly = make(tmp_path, lmbda=0.5, **settings)
    partly.evaluate()
    assert all((batch["prefix_lengths"] == 0).all() for batch, _ in partly.seen)


def test_a_prediction_does_not_enter_the_next_evaluation(tmp_path):
    trainer = make(tmp_path, evaluate=tiny.prompts(4), **GREEDY)
    before = trainer.evaluate()
    trainer.predict(tiny.prompts(16).select(range(8, 16)))
    after = trainer.evaluate()
    assert after["eval_tropd/reverse_kl"] == before["eval_tropd/reverse_kl"]
