"""Reward functions: their forms, what they are called with, and what is refused by name."""

from __future__ import annotations

import math
import re
import statistics
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import transformers
import trl
from test_trainer_cli import run_file  # noqa: F401 - a fixture
from test_trainer_verifier import HERE, distinct, judged, log_of, long, reward_model, rows_of
from training import unloadable

from tropd_kernels import KDRL, cli
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer, metrics
from tropd_kernels.trainer.verifier_checks import find_functions

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_what_a_function_gets(tmp_path):
    """Its completions in the form of the prompts, ids, columns, and the trainer's state."""
    seen = []

    def judge(prompts, completions, completion_ids, answer, trainer_state, log_metric, **others):
        seen.append((prompts, completions, completion_ids, answer))
        assert trainer_state.global_step == 0 and set(others) == {"log_extra"}
        log_metric("solved", 0.25)
        return [None, *range(1, len(answer))]

    data = tiny.prompts(answer=[f"a{i}" for i in range(8)])
    trainer = judged(tmp_path, judge, data=data)
    trainer.train()
    ((prompts, texts, ids, answers),) = seen
    by_prompt = dict(zip(data["prompt"], data["answer"]))
    assert answers == [by_prompt[prompt] for prompt in prompts]
    for row, own, text in zip(rows_of(trainer), ids, texts):
        assert row["completion_ids"][row["completion_mask"].bool()].tolist() == own
        assert text == tiny.tokenizer().decode(own, skip_special_tokens=True)
    log = log_of(trainer)
    assert log["solved"] == 0.25 and log["rewards/judge/mean"] == log["reward"] == 4.0
    assert rows_of(trainer)[0]["task_advantages"] == 0  # not judged

    seen.clear()
    chats = [[{"role": "user", "content": text}] for text in data["prompt"]]
    trainer = judged(tmp_path, judge, data=tiny.prompts(answer=data["answer"]).remove_columns(
        "prompt").add_column("prompt", chats))  # fmt: skip
    trainer.train()
    ((prompts, messages, ids, _),) = seen
    assert prompts[0] in chats
    assert messages == [
        [{"role": "assistant", "content": tiny.tokenizer().decode(own, skip_special_tokens=True)}]
        for own in ids
    ]


def test_an_async_function_is_like_another(tmp_path):
    async def later(completions, **columns):
        return distinct(completions)

    logs: list = []
    for functions in ([distinct, long], [later, long]):
        trainer = judged(tmp_path, functions, reward_weights=[1.0, 2.0])
        trainer.train()
        logs.append((log_of(trainer)["reward"], trainer.losses))
    assert logs[0] == logs[1]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- Completions rewarded, as in GRPO, by `later`, `long`." in card
    assert "`task_weight=0.7`, `reward_weights=[1.0, 2.0]`" in card


def test_a_reward_model(tmp_path):
    """By its folder: its logit for prompt and completion."""
    model = reward_model()
    model.save_pretrained(tmp_path / "judge")
    tiny.tokenizer().save_pretrained(tmp_path / "judge")
    trainer = judged(tmp_path / "run", [str(tmp_path / "judge"), distinct])
    trainer.train()
    expected = []
    for row in rows_of(trainer):
        words = [
            row[f"{part}_ids"][row[f"{part}_mask"].bool()] for part in ("prompt", "completion")
        ]
        text = "".join(tiny.tokenizer().decode(w, skip_special_tokens=True) for w in words)
        with torch.no_grad():
            ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
            expected.append(model(ids).logits.item())
    log = log_of(trainer)
    assert log["rewards/judge/mean"] == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert log["reward"] == pytest.approx(
        log["rewards/judge/mean"] + log["rewards/distinct/mean"], rel=1e-6
    )


def test_a_reward_model_whose_template_reads_parts(tmp_path):
    """It would judge a conversation without a word, for completions are text."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{% for p in m['content'] %}"
    tokenizer.chat_template += "{{ p['text'] }}{% endfor %}<|end|>{% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in tiny.prompts()["prompt"]]
    data = tiny.Dataset.from_dict({"prompt": chats})
    words = "^reward_funcs: .*chat template: it does not read a content that is text"
    for tokens in (tiny.tokenizer(), tokenizer):
        trainer = judged(tmp_path, reward_model(), data=data, reward_processing_classes=tokens)
        if tokens is not tokenizer:
            trainer.train()
            continue
        with pytest.raises(ValueError, match=words):
            trainer.train()


def test_an_evaluation_logs_rewards(tmp_path):
    """Of one completion a prompt, which has no group, and of each row once."""
    trainer = judged(tmp_path, evaluate=tiny.prompts(7), per_device_eval_batch_size=3)
    found = trainer.evaluate()
    batches = [batch for batch, training in trainer.seen if not training]
    ids = [row for batch in batches for row in batch["completion_ids"]]
    texts = tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
    assert found["eval_reward"] == pytest.approx(sum(distinct(texts)) / 7)
    assert found["eval_rewards/distinct/mean"] == found["eval_reward"]
    assert "eval_frac_reward_zero_std" not in found
    assert not any(batch["task_advantages"].any() for batch in batches)


def test_the_spread_of_an_evaluation_s_rewards(tmp_path):
    """Over all completions that a function judges, not a mean over batches: one of a single row
    has none."""

    def judge(completions, **columns):
        return [None if len(text.split()) == 4 else len(text.split()) for text in completions]

    rows = tiny.prompts(16).select(range(3, 8))
    spreads = []
    for size in (5, 2, 1):
        trainer = judged(
            tmp_path, [distinct, judge], evaluate=rows, per_device_eval_batch_size=size
        )
        trainer._sample_completions = lambda prompts, *_: [
            [5 + sum(ids) % 80] * (1 + sum(ids) % 5) + [2] for ids in prompts
        ]
        for _ in range(2):  # the second has nothing of the first
            trainer.seen = []
            found = trainer.evaluate()
            ids = [row for batch, _ in trainer.seen for row in batch["completion_ids"]]
            texts = tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
            judged_by = zip(distinct(texts), judge(texts))
            exact = {
                "rewards/distinct/std": distinct(texts),
                "rewards/judge/std": [reward for reward in judge(texts) if reward is not None],
                "reward_std": [own + (other or 0) for own, other in judged_by],
            }
            for name, rewards in exact.items():
                assert found[f"eval_{name}"] == pytest.approx(statistics.stdev(rewards)), name
            spreads.append(found["eval_reward_std"])
    assert spreads == pytest.approx([spreads[0]] * 6)
    assert spreads[0] > 0 and 1 < len(exact["rewards/judge/std"]) < 5


def test_the_spread_of_several_steps_rewards(tmp_path):
    """In training GRPO's: the mean of the generation batches' spreads."""
    rewards = []

    def judge(completions, **columns):
        rewards.append([len(rewards) + number for number in distinct(completions)])
        return rewards[-1]

    trainer = judged(tmp_path, judge, max_steps=2, logging_steps=2)
    trainer.train()
    assert len(rewards) == 2
    expected = sum(map(statistics.stdev, rewards)) / 2
    assert log_of(trainer)["reward_std"] == pytest.approx(expected)


def test_functions_by_name_on_the_command_line(tmp_path, monkeypatch):
    """Of trl.rewards, by a dotted path from the working directory, or a model's; errors by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_rewards.py").write_text("def short(completions, **columns):\n    return []\n")
    found = find_functions(["think_format_reward", "my_rewards.short", "org/judge"])
    assert found[0] is trl.rewards.think_format_reward and found[2] == "org/judge"
    assert found[1].__module__ == "my_rewards" and find_functions(None) is None
    # In YAML one name needs no list.
    assert find_functions("think_format_reward") == [trl.rewards.think_format_reward]
    (tmp_path / "broken.py").write_text("def short(:\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    for name, kind in (("broken.short", "SyntaxError"), ("failing.short", "ZeroDivisionError")):
        with pytest.raises(ValueError, match=f"^reward_funcs: {name}: {kind}: .*expected a fun"):
            find_functions([name])
    for name in ("think", "my_rewards.tall", "absent.short", ".short"):
        with pytest.raises(ValueError, match=f"^reward_funcs: {re.escape(name)}: .*expected a fun"):
            find_functions([name])
    arguments = [
        "--model",
        "m",
        "--teacher_model",
        "t",
        "--dataset",
        "d.jsonl",
        "--use_cpu",
        "true",
    ]
    arguments += ["--output_dir", "out", "--bf16", "false", "--task_weight", "0.5", "--objective"]
    arguments += ["opd", "--num_generations", "4", "--reward_weights", "1", "0.5"]
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n')
    run, config = cli.parse_run([*arguments, "--reward_funcs", "my_rewards.short", "org/judge"])
    assert run.reward_funcs == ["my_rewards.short", "org/judge"]
    assert config.reward_weights == [1.0, 0.5]


def test_one_name_in_the_file_of_a_run(run_file, capsys):  # noqa: F811
    """It is no list of letters."""
    text = run_file.read_text().replace("objective_kwargs: {top_k: 8}\n", "objective: opd\n")
    text += "reward_funcs: absent_reward\ntask_weight: 1\nnum_generations: 4\n"
    run_file.write_text(text)
    assert cli.main(["train", "--config", str(run_file)]) == 2
    assert "reward_funcs: absent_reward: " in capsys.readouterr().err


# --- refused ------------------------------------------------------------------------------------


def answer_of(value):
    def judge(completions, **columns):
        return value(len(completions)) if callable(value) else value

    return judge


BAD_ANSWERS = {
    "a number": (0.5, "TypeError: it returned 0.5: expected a list of 8 numbers"),
    "nothing": (None, "TypeError: it returned None"),
    "text": ("12345678", "TypeError: it returned '12345678'"),
    "too few": (lambda n: [1.0] * (n - 1), "ValueError: it returned 7 rewards for 8 completions"),
    "NaN": (lambda n: [0.0] * (n - 1) + [math.nan], "its reward of completion 7 is nan"),
    "infinity": (lambda n: torch.full((n,), math.inf), "its reward of completion 0 is inf"),
    "words": (lambda n: ["good"] * n, "its reward of completion 0 is 'good': expected a finite"),
    "a coroutine": (lambda n: (x for x in [[1.0]] * n), "its reward of completion 0 is [1.0]"),
    "an error": (lambda n: 1 / 0, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_wrong_answer_stops_the_run_by_name(tmp_path, case):
    """... and says how to go on; nothing has moved."""
    value, error = BAD_ANSWERS[case]
    trainer = judged(tmp_path, [distinct, answer_of(value)])
    with pytest.raises(ValueError, match=f"^reward_funcs: judge: .*{re.escape(error)}") as found:
        trainer.train()
    assert "then begin anew: no checkpoint" in str(found.value)
    for old, new in zip(tiny.model(0).parameters(), trainer.model.parameters()):
        assert torch.equal(old, new)


@pytest.mark.parametrize("value", [math.inf, math.nan, None], ids=str)
def test_a_model_s_wrong_answer_stops_the_run_by_name(tmp_path, value):
    model = reward_model()

    def changed(module, inputs, out):
        out.logits[1] = float(value)

    model.register_forward_hook(changed)
    trainer = judged(
        tmp_path, [distinct, model], reward_processing_classes=[None, tiny.tokenizer()]
    )
    text = "TypeError: float" if value is None else f"its reward of completion 1 .* is {value} in"
    with pytest.raises(ValueError, match=f"^reward_funcs: judge: {text}.*then begin anew"):
        trainer.train()


def test_a_metric_that_is_no_number(tmp_path):
    def judge(completions, log_metric, **columns):
        log_metric("solved", None)
        return distinct(completions)

    error = "reward_funcs: judge: TypeError: log_metric: 'solved': expected a number, got None"
    with pytest.raises(ValueError, match=f"^{error}"):
        judged(tmp_path, judge).train()


@pytest.mark.parametrize(
    "name", ["loss", "reward", "entropy", "tropd/trust_ratio", "rewards/judge/mean"]
)
def test_a_metric_with_a_name_of_the_trainer_s(tmp_path, name):
    """It would overwrite the trainer's value."""

    def judge(completions, log_metric, **columns):
        log_metric(name, 1.0)
        return distinct(completions)

    error = f"reward_funcs: judge: ValueError: log_metric: '{name}' is logged by the trainer itself"
    with pytest.raises(ValueError, match=f"^{error}: give the metric another name"):
        judged(tmp_path, judge).train()


def test_the_trainer_s_names_are_all_known(tmp_path):
    """Of a run with an evaluation all that is logged, but what the function itself logs."""

    def judge(completions, log_metric, **columns):
        log_metric("solved", 1.0)
        return distinct(completions)

    trainer = judged(tmp_path, judge)
    trainer.train()
    trainer.evaluate(tiny.prompts(4))
    logged = {key.removeprefix("eval_") for log in trainer.state.log_history for key in log}
    known = trainer._verifier._own_metrics
    assert {key for key in logged if not metrics.is_own(key)} - known == {"solved", "step"}


def fixed(completions):
    return [0.0] * len(completions)


def wants(completions, solution, **columns):
    return [0.0] * len(completions)


LABELS = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
REFUSED = {
    "no function": ([distinct, 3], {}, TypeError, "reward_funcs: number 1 is 3: expected a func"),
    "columns": (fixed, {}, TypeError, "reward_funcs: fixed: got an unexpected keyword argument"),
    "an absent column": (wants, {}, TypeError, "reward_funcs: wants: missing a required argument"),
    "twice": ([distinct, distinct], {}, ValueError, "reward_funcs: two have the name 'distinct'"),
    "no model": ("nowhere/at/all", {}, OSError, "reward_funcs: there is no folder nowhere/at/all"),
    "weights": (distinct, {"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights: 2 for 1"),
    "no weight": (distinct, {"task_weight": None}, ValueError, "reward_funcs: they would have no"),
    "columns are dropped": (
        distinct, {"remove_unused_columns": True}, ValueError, "remove_unused_columns: reward_f",
    ),
    "no functions": (None, {}, ValueError, "reward_funcs: the objective has a task_weight or a"),
    "nor for a rule": (
        [], {"objective": KDRL(task_weight=1.0), "task_weight": None}, ValueError,
        "reward_funcs: the objective has a task_weight or a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_model_is_loaded(tmp_path, case):
    functions, settings, kind, error = REFUSED[case]
    settings = {"num_generations": 4, "task_weight": 1.0, "objective": "opd"} | HERE | settings
    (tmp_path / "model").mkdir()
    model = unloadable(tmp_path / "model")
    with pytest.raises(kind, match=f"^{error}"):
        TrOPDTrainer(
            model, model, TrOPDConfig(str(tmp_path), **settings), tiny.prompts(),
            reward_funcs=functions,
        )  # fmt: skip


def test_refused_beside_tools_columns_and_labels(tmp_path):
    settings = dict(num_generations=4, task_weight=1.0, objective="opd", **HERE)
    make = partial(TrOPDTrainer, tiny.model(0), tiny.model(1), TrOPDConfig("unused", **settings))
    with pytest.raises(NotImplementedError, match="^reward_funcs: TRL's distillation keeps no"):
        make(tiny.prompts(), tools=[lambda: 1], reward_funcs=distinct)
    data = tiny.prompts(completions=["a"] * 8)
    with pytest.raises(ValueError, match="^train_dataset: the column 'completions' has the name"):
        make(data, reward_funcs=distinct)
    data = {"held": tiny.prompts(log_metric=["a"] * 8)}
    with pytest.raises(ValueError, match=r"^eval_dataset\['held'\]: the column 'log_metric'"):
        make(tiny.prompts(), data, reward_funcs=distinct)
    two = transformers.LlamaConfig(vocab_size=9, num_labels=2, name_or_path="judge", **LABELS)
    with pytest.raises(ValueError, match="^reward_funcs: the model judge has 2 labels"):
        make(tiny.prompts(), reward_funcs=transformers.LlamaForSequenceClassification(two))
    with pytest.raises(ValueError, match="^reward_processing_classes: 2 for 1 reward_funcs"):
        make(tiny.prompts(), reward_funcs=distinct, reward_processing_classes=[None, None])
    plain = TrOPDConfig("unused", **HERE)
    with pytest.raises(ValueError, match="^reward_processing_classes: there are no reward_funcs"):
        TrOPDTrainer(tiny.model(0), tiny.model(1), plain, tiny.prompts(),
                     reward_processing_classes=tiny.tokenizer())  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"task_weight": 1.0}, "num_generations: a verifier's advantages are relative to the oth"),
        ({"objective": {"reward_filter": "negative"}}, "num_generations: a verifier's advantages"),
        ({"task_weight": 1.0, "objective": "gkd"}, "task_weight: .* 'gkd' .*take one of tropd"),
        ({"task_weight": math.nan}, "task_weight: tropd: task_weight must be finite"),
        ({"task_weight": 1.0, "objective": {}}, "task_weight: .* the rule has a task_weight"),
        ({"reward_weights": [1.0]}, "reward_weights: it would have no effect: no term of the obj"),
        ({"scale_rewards": "batch"}, "scale_rewards: it would have no effect"),
        ({"scale_rewards": "both"}, "scale_rewards: must be one of group, batch, none; got 'both'"),
        ({"reward_weights": 1.0}, "reward_weights: expected a list of numbers, got 1.0"),
        ({"reward_weights": [1.0, "2"]}, "reward_weights: expected a number, got '2'"),
        ({"reward_weights": [math.inf]}, "reward_weights: must be in"),
        ({"task_weight": 1.0, "precomputed_teacher": True, "num_generations": 2},
         "task_weight: .* with precomputed_teacher nothing is gen.*: leave one of the two out"),
        ({"task_weight": 1.0, "precomputed_teacher": True}, "task_weight: .* with precomputed_te"),
        ({"task_weight": 1.0, "generation_kwargs": {"do_sample": False}},
         "task_weight: .* with do_sample False in generation_kwargs these are all the same"),
        ({"task_weight": 1.0, "top_k": 1}, "task_weight: .* with top_k 1 these are all the same"),
        ({"task_weight": 1.0, "generation_kwargs": {"top_p": 0.0}},
         "task_weight: .* with top_p 0.0 these are all the same"),
        ({"task_weight": 1.0, "min_p": 1.0}, "task_weight: .* with min_p 1.0 these are all"),
        ({"task_weight": 1.0, "objective": "opd", "lmbda": 0.0, "num_generations": 4},
         "task_weight: .* no effect: with lmbda 0 .* prefix_weight .*, or leave task_weight out"),
        ({"objective": {"reward_filter": "negative", "prefix_weight": 0.5}, "lmbda": 0.0},
         "objective: .* no effect: with lmbda 0 .* or take another objective"),
        ({"objective": "kdrl"}, "objective: 'kdrl' reads task_advantages= .* or set task_weight"),
    ],
    ids=lambda given: "" if isinstance(given, str) else next(iter(given)),
)  # fmt: skip
def test_settings_that_no_rewards_could_use(settings, error):
    with pytest.raises(ValueError, match=f"^{error}"):
        TrOPDConfig("unused", **(HERE | settings))


def test_columns_that_log_extra_cannot_keep_are_warned_of(tmp_path):
    def judge(completions, log_extra, **columns):
        log_extra("note", ["x"] * len(completions))
        return distinct(completions)

    trainer = judged(tmp_path, judge)
    with pytest.warns(UserWarning, match="^reward_funcs: log_extra: the column 'note' is not kept"):
        trainer.train()
