"""An optimizer and a scheduler that are given: what they decide, the config's settings do not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import Spy

from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def given(folder, optimizers, student=None, peft=None, evaluate=None, **settings):
    """A trainer with these optimizers, or with those that a function makes of the student."""
    student = tiny.model(0) if student is None else student
    args = TrOPDConfig(
        str(folder), max_steps=2, per_device_train_batch_size=4, max_completion_length=6,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    if callable(optimizers):
        optimizers = optimizers(student)
    return Spy(
        student, tiny.model(1), args, tiny.prompts(), processing_class=tiny.tokenizer(),
        optimizers=optimizers, peft_config=peft, eval_dataset=evaluate,
    )  # fmt: skip


def sgd(student):
    return torch.optim.SGD(student.parameters(), lr=0.05)


def optimizer_alone(student):
    return sgd(student), None


def both(student):
    optimizer = sgd(student)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.5), ("weight_decay", 0.3), ("optim", "adafactor"),
        ("adam_beta1", 0.5), ("adam_beta2", 0.5), ("adam_epsilon", 1e-3),
    ],
)  # fmt: skip
def test_settings_of_an_optimizer_beside_one(tmp_path, key, value):
    words = f"^{key}: it would have no effect: the optimizer given to the trainer, a SGD, decides"
    with pytest.raises(ValueError, match=words):
        given(tmp_path, optimizer_alone, **{key: value})
    given(tmp_path, (None, None), **{key: value})


def test_optimizers_with_arguments_beside_one(tmp_path):
    """`optim_args` and `optim_target_modules` come with another optim, which is refused."""
    for settings in (
        dict(optim="rmsprop", optim_args="momentum=0.9"),
        dict(optim="galore_adamw", optim_target_modules=["attn"]),
    ):
        with pytest.raises(ValueError, match="^optim: .* the optimizer given to the trainer, a SG"):
            given(tmp_path, optimizer_alone, **settings)
        del settings["optim"]
        (key,) = settings
        with pytest.raises(ValueError, match=f"^{key}: it would have no effect"):
            given(tmp_path, optimizer_alone, **settings)
    # What transformers' loop asks LOMO's optimizers for goes by this name, whoever made them.
    given(tmp_path, optimizer_alone, optim="lomo")


@pytest.mark.parametrize(
    "settings",
    [
        dict(lr_scheduler_type="cosine"), dict(warmup_steps=2), dict(warmup_steps=0.5),
        dict(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_scheduler_beside_one(tmp_path, settings):
    key = next(iter(settings))
    with pytest.raises(
        ValueError, match=f"^{key}: .* the scheduler given to the trainer, a ConstantLR, decides"
    ):
        given(tmp_path, both, **settings)
    given(tmp_path, optimizer_alone, **settings)  # of which transformers makes the scheduler


def test_schedulers_of_another_optimizer(tmp_path):
    """Nothing would step by them."""
    with pytest.raises(ValueError, match="^optimizers: the ConstantLR would .* none is given"):
        given(tmp_path, lambda student: (None, both(student)[1]))
    with pytest.raises(ValueError, match="^optimizers: the ConstantLR would .* another one is gi"):
        given(tmp_path, lambda student: (sgd(student), both(student)[1]))


def test_optimizers_of_other_parameters(tmp_path):
    """A run would leave the student as it was."""
    words = "^optimizers: the SGD has none of the student's parameters that require a gradient"
    with pytest.raises(ValueError, match=words):
        given(tmp_path, (sgd(tiny.model(0)), None))
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=words):
        given(tmp_path, optimizer_alone, peft=adapter)  # made before the adapter
    adapted = peft.get_peft_model(tiny.model(0), adapter)
    given(tmp_path, optimizer_alone, adapted)


def test_what_is_given_trains(tmp_path):
    trainer = given(tmp_path, both)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.SGD)
    assert not torch.equal(trainer.model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (
            "linear",
            {"num_cycles": 2},
            "it would have no effect: lr_scheduler_type 'linear' takes no",
        ),
        (
            "cosine",
            {"num_cycle": 2},
            "'num_cycle' is no argument .* num_cycles .did you mean 'num_c",
        ),
        ("polynomial", {"num_cycles": 2}, "'num_cycles' is no argument .* takes lr_end, power"),
        ("inverse_sqrt", {"last_epoch": 3}, "'last_epoch' is no argument .* takes timescale"),
        ("reduce_lr_on_plateau", {"patient": 2}, "'patient' is no argument .*mean 'patience'"),
        ("greedy", {"patient": 2}, "'patient' is no argument .*mean 'patience'"),
        ("cosine_with_min_lr", None, "{} make no schedule .*One of min_lr or min_lr_rate"),
        ("warmup_stable_decay", None, "{} make no schedule .*missing 1 .* 'num_decay_steps'"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 5, "decay_type": "exp"},
            "{.*} make no schedule",
        ),
        ("inverse_sqrt", {"timescale": 0}, "{.*} make no schedule .*division"),
        ("cosine", {"num_cycles": "a"}, "{.*} make no schedule"),
        (
            "cosine_with_min_lr",
            {"min_lr": 1e-5},
            "with min_lr 1e-05 .* would never lower the learn",
        ),
        ("reduce_lr_on_plateau", {"min_lr": "a"}, "{.*} make no schedule .*'>' not supported"),
        ("reduce_lr_on_plateau", {"min_lr": (1e-8, 1e-2)}, "with min_lr 0.01 .* never lower"),
        ("cosine_with_min_lr", {"min_lr": [1e-8]}, "{.*} make no schedule "),
        ("reduce_lr_on_plateau", {"min_lr": [1e-8]}, "{.*} make no schedule .*expected 2 min_lrs"),
        ("reduce_lr_on_plateau", {"min_lr": [1e-8, 1e-2]}, "with min_lr 0.01 .* would never lower"),
        (
            "greedy",
            None,
            "with its default min_lr 0.001 .*'greedy' would never lower the learning_rate, 1e-06",
        ),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_made(tmp_path, kind, given, words):
    """transformers would say so when training starts, without the key."""
    with pytest.raises(ValueError, match=f"^lr_scheduler_kwargs: {words}"):
        TrOPDConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", eval_strategy="epoch",
            lr_scheduler_type=kind, lr_scheduler_kwargs=given,
        )  # fmt: skip


def test_a_lowest_rate_for_each_group(tmp_path):
    """transformers has two, with weight decay and without."""
    trainer = given(
        tmp_path, (None, None), learning_rate=0.01, eval_strategy="epoch",
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"min_lr": [1e-8, 0.0]},
        evaluate=tiny.prompts(),
    )  # fmt: skip
    trainer.train()
    assert trainer.lr_scheduler.min_lrs == [1e-8, 0.0]


@pytest.mark.parametrize(
    ("kind", "arguments", "first"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.5, "num_cycles": 0.5}, 0.01),
        ("warmup_stable_decay", {"num_decay_steps": 1, "min_lr_ratio": 0.5}, 0.01),
        ("polynomial", {"power": 2.0}, 0.01),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.5}, 0.0075),  # a step ahead
    ],
)
def test_schedules_that_are_made(tmp_path, kind, arguments, first):
    settings = dict(lr_scheduler_type=kind, lr_scheduler_kwargs=arguments, logging_steps=1)
    trainer = given(tmp_path, (None, None), learning_rate=0.01, **settings)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates[0] == pytest.approx(first) and 0 < rates[1] <= 0.01


def test_a_decay_that_is_longer_than_the_run(tmp_path):
    """The rate would begin in the middle of it, without a word."""
    settings = dict(use_cpu=True, bf16=False, report_to="none", max_steps=100)
    for decay, warmup, refused in ((500, 0, True), (95, 10, True), (90, 10, False), (20, 0, False)):
        settings |= dict(
            lr_scheduler_type="warmup_stable_decay", warmup_steps=warmup,
            lr_scheduler_kwargs={"num_decay_steps": decay},
        )  # fmt: skip
        if refused:
            words = "^lr_scheduler_kwargs: .* would have at most .* of learning_rate within max_st"
            with pytest.raises(ValueError, match=words):
                TrOPDConfig(str(tmp_path), **settings)
        else:
            TrOPDConfig(str(tmp_path), **settings)
