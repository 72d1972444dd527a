"""Reward functions beside the teacher: advantages, what the functions get, logs, and failures."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import transformers
from engines import saved_together
from training import RATE, Spy, by_hand, make, resume_and_compare, split, step_and_compare
from trl import GRPOConfig, GRPOTrainer

from tropd_kernels import KDRL, TokenRule
from tropd_kernels.trainer.verifier import group_advantages

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HERE = dict(use_cpu=True, bf16=False, report_to="none")
FOUR = dict(num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
NAN = math.nan


def distinct(completions, **columns):
    return [len(set(text.split())) for text in completions]


def long(completion_ids, **columns):
    return [float(len(ids) > 6) for ids in completion_ids]


def judged(folder, functions=distinct, reward_processing_classes=None, **settings):
    """A trainer whose completions these functions judge."""
    kind = partial(Spy, reward_funcs=functions, reward_processing_classes=reward_processing_classes)
    settings = {"objective": "opd", "task_weight": 0.7} | FOUR | settings
    if not isinstance(settings["objective"], str):
        settings["task_weight"] = None
    return make(folder, kind=kind, **settings)


def reward_model(**settings):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_labels=1, initializer_range=0.5,
        name_or_path="judge", **settings,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config).eval()


def log_of(trainer) -> dict:
    return next(log for log in trainer.state.log_history if "loss" in log)


def rows_of(trainer) -> list[dict]:
    """The rows of all micro-batches, in the order in which they were written."""
    return sorted(split(trainer.batches), key=lambda row: int(row["sequence_ids"]))


def advantages_by_hand(rewards: list[float], size: int) -> list[float]:
    found = []
    for first in range(0, len(rewards), size):
        group = rewards[first : first + size]
        mean = sum(group) / size
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1))
        found += [(r - mean) / (std + 1e-4) for r in group]
    return found


# --- advantages ---------------------------------------------------------------------------------


def test_advantages_by_hand():
    """(r - mean) / (std + 1e-4) of GRPO (arXiv 2402.03300), with TRL's epsilon."""
    rewards = torch.tensor([[1.0], [2.0], [3.0], [4.0], [4.0], [10.0]])
    found, total, equal = group_advantages(rewards, torch.ones(1), 3, "group")
    std = math.sqrt(12.0)  # of 4, 4, 10, whose mean is 6
    expected = [
        -1 / 1.0001,
        0.0,
        1 / 1.0001,
        -2 / (std + 1e-4),
        -2 / (std + 1e-4),
        4 / (std + 1e-4),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert total.tolist() == rewards[:, 0].tolist() and not equal.any()
    found, *_ = group_advantages(rewards, torch.ones(1), 3, "none")
    assert found.tolist() == [-1.0, 0.0, 1.0, -2.0, -2.0, 4.0]
    found, *_ = group_advantages(rewards, torch.ones(1), 3, "batch")
    std = math.sqrt(50.0 / 5)  # of 1, 2, 3, 4, 4, 10, whose mean is 4
    expected = [a / (std + 1e-4) for a in (-1.0, 0.0, 1.0, -2.0, -2.0, 4.0)]
    assert found.tolist() == pytest.approx(expected, rel=1e-7)  # TRL's n / (n - 1) is in float32


def test_completions_that_are_not_judged():
    """By some functions: the rest of the sum counts. By none: no advantage, no part in others'."""
    rewards = torch.tensor([[1.0, NAN], [2.0, 1.0], [NAN, NAN], [NAN, 8.0]])
    found, total, equal = group_advantages(rewards, torch.tensor([1.0, 0.5]), 4, "none")
    assert total[[0, 1, 3]].tolist() == [1.0, 2.5, 4.0] and total[2].isnan()
    assert found.tolist() == [-1.5, 0.0, 0.0, 1.5] and not equal.any()
    one = torch.tensor([[5.0], [NAN], [NAN], [NAN]])
    found, _, equal = group_advantages(one, torch.ones(1), 2, "group")
    assert found.tolist() == [0.0] * 4 and equal.all()


def test_equal_rewards_have_advantage_0_to_the_bit():
    """The mean of seven times 0.1 is another number, and its sign would pass a filter."""
    equal_rewards, weights = torch.ones(21, 1), torch.tensor([0.1], dtype=torch.float64)
    for scale in ("group", "batch", "none"):
        found, total, equal = group_advantages(equal_rewards, weights, 7, scale)
        assert total.tolist() == [0.1] * 21 and total[:7].nanmean() != 0.1
        assert found.tolist() == [0.0] * 21 and equal.all()
        # Of large sums the mean's rounding is more than any fixed bound.
        found, _, equal = group_advantages(equal_rewards * 675763776.0, 7 * weights, 7, scale)
        assert found.tolist() == [0.0] * 21 and equal.all()
    # The same sum, rounded differently: w + 5 w and 3 w + 3 w.
    terms, weights = torch.tensor([[1.0, 5.0], [3.0, 3.0]]), weights.expand(2) * 1e10 / 3
    found, total, equal = group_advantages(terms, weights, 2, "none")
    assert total[0] != total[1] and found.tolist() == [0.0, 0.0] and equal.all()
    found, _, equal = group_advantages(torch.tensor([[1e8], [1e8 + 8]]), torch.ones(1), 2, "none")
    assert found.tolist() == [-4.0, 4.0] and not equal.any()


# --- a step -------------------------------------------------------------------------------------

CASES = {
    "opd": {},
    "tropd, beside a prefix": dict(
        objective="tropd", prefix_schedule="constant", prefix_length=3, prefix_weight=0.5
    ),
    "kdrl, filtered": dict(objective=KDRL(task_weight=2.0, reward_filter="negative")),
    "a rule that filters": dict(objective=TokenRule(reward_filter="positive")),
    "grpd, from a config": dict(objective={"reward_filter": "agree_scaled"}, scale_rewards="none"),
    "with returns": dict(kl_discount_factor=0.5, scale_rewards="none"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_both_rewards(tmp_path, case):
    """Against the loop by hand, with advantages made of the decoded completions."""
    teacher = tiny.model(1, hidden_size=48)
    trainer = judged(tmp_path, teacher=teacher, **CASES[case])
    step_and_compare(trainer, teacher)
    rows = rows_of(trainer)
    assert [int(row["sequence_ids"]) for row in rows] == list(range(8))
    prompts = [row["prompt_ids"][row["prompt_mask"].bool()].tolist() for row in rows]
    assert prompts[0] == prompts[3] != prompts[4] == prompts[7]
    texts = [
        tiny.tokenizer().decode(row["completion_ids"], skip_special_tokens=True) for row in rows
    ]
    rewards = distinct(texts)
    if trainer.args.scale_rewards == "none":
        means = [sum(rewards[:4]) / 4] * 4 + [sum(rewards[4:]) / 4] * 4
        expected = [r - m for r, m in zip(rewards, means)]
    else:
        expected = advantages_by_hand(rewards, 4)
    found = [row["task_advantages"].item() for row in rows]
    assert found == pytest.approx(expected, rel=1e-6) and max(found) > 0.5
    log = log_of(trainer)
    assert log["reward"] == log["rewards/distinct/mean"] == pytest.approx(sum(rewards) / 8)


def test_logs_and_rewards_are_grpo_s(tmp_path):
    """TRL's own GRPO on the same data, seeds and model writes the same completions: the same
    values by the same names."""
    functions, weights = [distinct, long], [1.0, 0.5]
    common = dict(
        max_steps=1, max_completion_length=10, logging_steps=1, seed=5, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, reward_weights=weights, **FOUR, **HERE,
    )  # fmt: skip
    ours = judged(tmp_path / "ours", functions, reward_weights=weights)
    ours.train()
    theirs = GRPOTrainer(
        tiny.model(0), functions, GRPOConfig(str(tmp_path / "theirs"), **common),
        train_dataset=tiny.prompts(), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    theirs.train()
    (log,), own = [log for log in theirs.state.log_history if "loss" in log], log_of(ours)
    names = [n for n in log if n.startswith("reward") or n == "frac_reward_zero_std"]
    assert len(names) == 7
    for name in names:
        assert own[name] == pytest.approx(log[name], rel=1e-5), name


def test_an_evaluation_has_no_filter(tmp_path):
    """Its advantages are 0, which no filter passes: the loss would be 0 or of nothing."""
    losses = []
    for which in (None, "negative", "positive", "agree", "agree_scaled"):
        rule = KDRL(task_weight=1.0, reward_filter=which)
        trainer = judged(tmp_path, objective=rule, evaluate=tiny.prompts(4))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] != 0 and losses == [losses[0]] * 5


def test_a_run_resumed_with_new_reward_functions(tmp_path):
    """The saved batch was not judged."""
    settings = dict(num_iterations=2, save_strategy="steps", save_steps=1)
    make(tmp_path, objective="opd", max_steps=1, **FOUR, **settings).train()
    trainer = judged(tmp_path, max_steps=2, **settings)
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="^resume_from_checkpoint: .* saved without reward_funcs"):
        trainer.train(resume_from_checkpoint=str(folder))
    (folder / "generation_batch_0.pt").unlink()
    trainer = judged(tmp_path, max_steps=2, **settings)
    trainer.train(resume_from_checkpoint=str(folder))
    assert all("task_advantages" in batch for batch in trainer.batches)


def test_a_resumed_run_has_the_same_rewards(tmp_path):
    """... to the bit, between two steps on one generation batch."""
    settings = dict(kind=partial(Spy, reward_funcs=[distinct]), task_weight=0.7, num_generations=2)
    resume_and_compare(tmp_path, 3, max_steps=6, num_iterations=2, **settings)


ONE_STEP = """
import sys, torch, pytest, tiny
from engines import use, whole_parameters
settings = use(sys.argv[2])
from test_trainer_verifier import distinct, judged, reward_model
trainer = judged(
    sys.argv[1], per_device_train_batch_size=1, gradient_accumulation_steps=2,
    per_device_eval_batch_size=2, **settings
)
trainer.train()
rank = trainer.accelerator.process_index
parameters, log = whole_parameters(trainer.model), trainer.state.log_history[0]
def of_prompt(prompts, **given):
    return [len(prompt) for prompt in prompts]
trainer._verifier.reward_funcs = [trainer._verifier._guarded("distinct", of_prompt)]
held = trainer.evaluate(tiny.prompts(3))["eval_reward"]
def fails(**given):
    raise KeyError("answer")
if rank == 1:
    trainer._verifier.reward_funcs = [trainer._verifier._guarded("distinct", fails)]
with pytest.raises(ValueError) as error:
    trainer._verifier.rewards([{"prompt": "w1"}], ["w2"], [[7]])
errors = [str(error.value)]
def overflows(**given):
    return [1e39 if rank == 1 else 1.0]
def infinite(model, inputs, out):
    out.logits[:] = float("inf") if rank == 1 else 1.0
def raises(model, inputs):
    if rank == 1:
        raise KeyError("logits")
for place, kind in enumerate((overflows, infinite, raises)):
    if kind is overflows:
        trainer._verifier.reward_funcs = [trainer._verifier._guarded("distinct", kind)]
    else:
        judge = reward_model()
        hook = judge.register_forward_pre_hook if kind is raises else judge.register_forward_hook
        hook(kind)
        trainer._verifier.reward_processing_classes = [tiny.tokenizer()]
        trainer._verifier._prepare_model(0, "judge", judge)
    with pytest.raises(ValueError) as error:
        trainer._verifier.rewards([{"prompt": "w1"}], ["w2"], [[7]])
    errors.append(str(error.value))
def unreadable(text, **options):
    if rank == 1:
        raise KeyError("text")
    return tiny.tokenizer()(text, **options)
trainer._verifier.reward_processing_classes = [unreadable]
trainer._verifier.reward_funcs[0].model = reward_model()
with pytest.raises(ValueError) as error:
    trainer._verifier.rewards([{"prompt": "w1"}], ["w2"], [[7]])
errors.append(str(error.value))
saved = trainer.batches, parameters, log, errors, held
torch.save(saved, f"{sys.argv[1]}/{rank}.pt")
"""


def test_two_processes_are_the_large_batch(tmp_path, tmp_path_factory):
    """A group lies over both, and three rows of an evaluation count once, though accelerate
    repeats one. A function, model or tokenizer that fails on one process stops both, and so does a
    reward that is infinite in float32."""
    saved = saved_together("test_trainer_verifier", tmp_path_factory)
    trainer = make(tmp_path, objective="opd", task_weight=0.7, kind=partial(
        Spy, reward_funcs=distinct), num_generations=4, per_device_train_batch_size=1,
        gradient_accumulation_steps=4)  # fmt: skip
    trainer.seen = [(batch, True) for batches, *_ in saved for batch in batches]
    rows = rows_of(trainer)
    texts = [tiny.tokenizer().decode(r["completion_ids"], skip_special_tokens=True) for r in rows]
    rewards = distinct(texts)
    found = [row["task_advantages"].item() for row in rows]
    assert found == pytest.approx(advantages_by_hand(rewards, 4), rel=1e-6) and any(found)
    twin = tiny.model(0).double()
    by_hand(trainer, twin, tiny.model(1, hidden_size=48).double())
    for new, other, old, true in zip(
        saved[0][1], saved[1][1], tiny.model(0).parameters(), twin.parameters(), strict=True
    ):
        assert torch.equal(new, other)
        torch.testing.assert_close(
            (old.detach() - new).double() / RATE, true.grad, rtol=1e-3, atol=2e-4
        )
    assert saved[0][2]["reward"] == pytest.approx(sum(rewards) / 4)
    prompts = tiny.prompts(3)["prompt"]
    assert saved[0][4] == saved[1][4] == pytest.approx(sum(map(len, prompts)) / 3)
    (on_first, infinite, of_model, *rest), (on_second, *others, failed, unread) = (
        saved[0][3], saved[1][3]
    )  # fmt: skip
    assert {on_first, *rest} == {"reward_funcs: one on another process failed"} and len(rest) == 2
    assert unread.startswith("reward_funcs: in a reward model's tokenizer or a row's columns: KeyE")
    assert on_second == "reward_funcs: distinct: KeyError: 'answer'"
    assert failed == "reward_funcs: judge: KeyError: 'logits'"
    assert [infinite, of_model] == others
    assert infinite.startswith("reward_funcs: distinct: its reward of completion 1 of all process")
    assert of_model == infinite
