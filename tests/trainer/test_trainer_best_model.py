"""The checkpoint that is loaded at the end is the best one by the metric, not the worst."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

from tropd_kernels.trainer import TrOPDConfig, best_model, metrics

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
BEST = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            load_best_model_at_end=True)  # fmt: skip
GREEDY = dict(generation_kwargs={"do_sample": False})


def config(folder, **settings):
    defaults = dict(bf16=False, use_cpu=True, report_to="none", eval_strategy="steps", eval_steps=1)
    return TrOPDConfig(str(folder), **defaults | settings)


@pytest.mark.filterwarnings("ignore:.*top_k")
def test_every_metric_of_an_evaluation_has_its_direction(tmp_path):
    """Those of the table, and what runs of several kinds log: of one that is not known here the
    greater value would be the better one."""
    table = re.findall(r"^\| (\w+)(, _min)? ", metrics.__doc__, re.MULTILINE)
    named = {metrics.PREFIX + name for name, _ in table if name != "metric"}
    assert named <= best_model.GREATER_IS_BETTER.keys() and len(named) > 15
    data = tiny.prompts(4, teacher_completion=[" w1 w2"] * 4)
    runs = (
        dict(lmbda=0.0, objective="sft"),
        dict(prefix_schedule="constant", prefix_length=2),
        dict(objective="reverse_kl", select_by="reverse_kl", select_fraction=0.5),
        dict(objective="forward_kl", objective_kwargs={"top_k": 4}),
        dict(top_k=5),
    )
    logged = set()
    for settings in runs:
        trainer = make(tmp_path, evaluate=data, **settings)
        logged |= {name.removeprefix("eval_") for name in trainer.evaluate()}
    ours = {name for name in logged if name.startswith(metrics.PREFIX)}
    assert ours <= best_model.GREATER_IS_BETTER.keys() and len(ours) > 10


@pytest.mark.parametrize("before", ["", "eval_", "eval_far_b_", "far_b_"])
@pytest.mark.parametrize(
    ("name", "greater"),
    [
        ("tropd/reverse_kl", False), ("tropd/forward_kl", False), ("tropd/forward_kl_topk", False),
        ("tropd/prefix_nll", False), ("tropd/outlier_ratio", False), ("tropd/trust_ratio", True),
        ("tropd/reward_mean", True), ("tropd/reward_min", True), ("rewards/judge/mean", True),
        ("loss", False),
    ],
)  # fmt: skip
def test_directions(tmp_path, before, name, greater):
    made = config(tmp_path, metric_for_best_model=before + name)
    assert made.greater_is_better is greater
    assert TrOPDConfig(**made.to_dict()).greater_is_better is greater
    given = config(tmp_path, metric_for_best_model=before + name, greater_is_better=not greater)
    assert given.greater_is_better is not greater


def test_a_direction_that_has_to_be_given(tmp_path):
    for metric in (
        "tropd/teacher_entropy", "eval_tropd/teacher_entropy_topk", "eval_b_tropd/prefix_length",
        "entropy", "eval_completions/mean_length", "reward_std", "rewards/judge/std",
        "math_entropy", "eval_math_num_tokens", "math_reward_std", "math_frac_reward_zero_std",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^metric_for_best_model: .*'{metric}'.*set greater_"):
            config(tmp_path, metric_for_best_model=metric)
        assert config(tmp_path, metric_for_best_model=metric, greater_is_better=False)
    with pytest.raises(ValueError, match="did you mean 'tropd/reverse_kl'"):
        config(tmp_path, metric_for_best_model="tropd/reverse_kll")
    # A metric of the user's own is transformers' matter.
    assert config(tmp_path, metric_for_best_model="accuracy").greater_is_better is True
    assert config(tmp_path, metric_for_best_model="crossentropy").greater_is_better is True


@pytest.mark.parametrize(
    ("metric", "best"), [("tropd/reverse_kl", min), ("eval_tropd/reward_mean", max)]
)
def test_the_best_checkpoint_is_loaded(tmp_path, metric, best):
    """Of three different ones."""
    settings = dict(max_steps=3, learning_rate=0.3, objective="reverse_kl")
    trainer = make(
        tmp_path, evaluate=tiny.prompts(4), metric_for_best_model=metric, **settings, **BEST,
        **GREEDY,
    )  # fmt: skip
    trainer.train()
    name = "eval_" + metric.removeprefix("eval_")
    values = [log[name] for log in trainer.state.log_history if name in log]
    assert len(set(values)) == 3
    assert trainer.state.best_metric == best(values)
    assert trainer.evaluate()[name] == best(values)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric(tmp_path, schedule):
    """They would wait for a lower value of any of them."""
    for settings, mode in (
        ({"metric_for_best_model": "tropd/reward_mean"}, "max"),
        ({"metric_for_best_model": "tropd/reverse_kl"}, "min"),
        ({"metric_for_best_model": "accuracy"}, "max"),
        ({"objective": "reverse_kl"}, "min"),
    ):
        settings = dict(lr_scheduler_type=schedule, lr_scheduler_kwargs={"patience": 3}) | settings
        trainer = make(
            tmp_path, evaluate=tiny.prompts(4), eval_strategy="steps", eval_steps=1, **settings
        )
        trainer.create_optimizer_and_scheduler(3)
        assert trainer.lr_scheduler.mode == mode
        assert trainer.lr_scheduler.patience == 3
    with pytest.raises(ValueError, match="^lr_scheduler_kwargs: mode 'min', but greater_is_better"):
        config(
            tmp_path, metric_for_best_model="tropd/reward_mean", lr_scheduler_type=schedule,
            lr_scheduler_kwargs={"mode": "min"},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"metric_for_best_model": "eval_loss"}, "tropd/reverse_kl, which should fall"),
        ({"load_best_model_at_end": True}, "tropd/reverse_kl, which should fall"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "tropd/reverse_kl, which should fall"),
        ({"metric_for_best_model": "eval_far_b_loss"}, "tropd/reverse_kl, which should fall"),
        ({"metric_for_best_model": "loss", "objective": "reverse_kl"}, None),
        ({"metric_for_best_model": "tropd/reverse_kl"}, None),
        ({"metric_for_best_model": "aux_loss"}, None),
        ({}, None),
    ],
)
def test_a_surrogate_that_would_choose(tmp_path, recwarn, settings, instead):
    """... the checkpoint or the learning rate is warned of."""
    make(tmp_path, evaluate=tiny.prompts(4), **EVERY_STEP | settings)
    said = [str(one.message) for one in recwarn if "for_best_model" in str(one.message)]
    assert len(said) == (instead is not None)
    assert all(words.endswith(f"is a surrogate: choose {instead}") for words in said)


def test_what_is_named_instead_is_what_a_served_teacher_gives(tmp_path):
    args = config(
        tmp_path, metric_for_best_model="loss", objective="opd",
        teacher_model_server_url="http://127.0.0.1:1",
    )  # fmt: skip
    assert "choose tropd/reward_mean" in best_model.surrogate_warning(args)
