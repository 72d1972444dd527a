"""What an evaluation measures: the same whatever its batches and whatever was run before it."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import Spy, make

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


def test_metrics_of_several_data_sets(tmp_path):
    """Each by its name, as the loss is, in what is returned and in what is logged; then a run may
    choose its best model by one of them."""
    parts = {"a": tiny.prompts(4), "far_b": tiny.prompts(16).select(range(8, 16))}
    alone = {
        name: make(tmp_path, evaluate=rows, **GREEDY).evaluate() for name, rows in parts.items()
    }
    trainer = make(
        tmp_path, evaluate=parts, max_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_far_b_tropd/reverse_kl", greater_is_better=False, **GREEDY,
    )  # fmt: skip
    found = trainer.evaluate()
    names = ("tropd/reverse_kl", "tropd/reward_min", "loss", "entropy", "completions/mean_length")
    for part, metrics in alone.items():
        for name in names:
            assert found[f"eval_{part}_{name}"] == metrics[f"eval_{name}"]
            assert any(f"eval_{part}_{name}" in log for log in trainer.state.log_history)
    assert "eval_tropd/reverse_kl" not in found
    trainer.train()
    logged = [log.get("eval_far_b_tropd/reverse_kl") for log in trainer.state.log_history]
    assert trainer.state.best_metric == min(value for value in logged if value is not None)


def of_several_lengths(folder, size, **settings):
    """A trainer whose evaluation is in batches of this size; some completions end, some do not."""
    return make(
        folder, tiny.model(0, spread=0.5), tiny.model(1, spread=0.5), max_completion_length=24,
        per_device_eval_batch_size=size, **settings, **GREEDY,
    )  # fmt: skip


ROWS = tiny.prompts(16).select(range(3, 8))


def test_means_are_over_tokens(tmp_path):
    """Not over the means of batches, of which the last one may have a single row: the loss, its
    twin among the metrics, and TRL's own. Extremes are the extreme batch's."""
    whole, *parts = (
        of_several_lengths(tmp_path, size, objective="reverse_kl", evaluate=ROWS).evaluate()
        for size in (5, 2, 1)
    )
    assert whole["eval_tropd/reverse_kl"] == pytest.approx(whole["eval_loss"], rel=1e-5)
    assert whole["eval_completions/min_length"] < whole["eval_completions/max_length"]
    assert 0 < whole["eval_completions/clipped_ratio"] < 1
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    for part in parts:
        assert part.keys() == whole.keys()
        for name in whole.keys() - {*timed, "eval_num_tokens"}:
            assert part[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_a_mean_over_kept_tokens(tmp_path):
    """reopold's loss is divided by those."""
    settings = dict(objective="reopold", objective_kwargs={"stage": 1, "mixing": 0.4})
    losses = [
        of_several_lengths(tmp_path, size, evaluate=ROWS, **settings).evaluate()["eval_loss"]
        for size in (5, 2)
    ]
    assert losses[0] != 0 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_prediction_s_loss_is_over_tokens(tmp_path):
    found = [
        of_several_lengths(tmp_path, size, objective="gkd").predict(ROWS).metrics["test_loss"]
        for size in (5, 2)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_sums_are_no_matter_of_the_default_dtype(tmp_path):
    """In bfloat16 a count of tokens grows no more at 256 times a batch's."""

    def judge(completions, log_metric, **columns):
        log_metric("length", sum(map(len, completions)) / 7)
        return [0.0] * len(completions)

    models, found = (tiny.model(0), tiny.model(1, hidden_size=48)), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            trainer = make(
                tmp_path, *models, evaluate=tiny.prompts(8), per_device_eval_batch_size=2,
                objective="opd", top_p=0.8, task_weight=1.0, num_generations=2,
                kind=partial(Spy, reward_funcs=[judge]),
            )  # fmt: skip
            found.append(trainer.evaluate())
        finally:
            torch.set_default_dtype(torch.float32)
    for name in ("eval_loss", "eval_tropd/sampling_mass", "eval_length"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name


def test_an_evaluation_of_nothing(tmp_path):
    words = "^eval_on_start: it would have no effect: there is no eval_dataset: give one to TrOPDTr"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, eval_on_start=True)


@pytest.mark.parametrize(
    "settings",
    [
        dict(eval_strategy="steps", eval_steps=1, max_steps=3),
        dict(eval_strategy="epoch", max_steps=-1, num_train_epochs=3),
    ],
)
def test_a_delay_beyond_the_run(tmp_path, settings):
    words = "^eval_strategy: it would have no effect: the run ends before eval_delay, 4: lower that"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, eval_delay=4, **settings)
    assert make(tmp_path, evaluate=tiny.prompts(4), eval_delay=3, **settings)


@pytest.mark.parametrize("delay", [1, 4])
def test_a_delay_of_unknown_length(tmp_path, delay):
    """How many epochs max_steps are is known only by the data: here 2."""
    trainer = make(
        tmp_path, max_steps=4, data=tiny.prompts(8), evaluate=tiny.prompts(4),
        eval_strategy="epoch", eval_delay=delay,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    words = f"eval_delay: nothing was evaluated, for the run ended before {delay} epochs: lower it"
    assert any(str(one.message) == words for one in caught) == (delay == 4)
