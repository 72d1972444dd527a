"""An exception that the caller catches leaves nothing changed: it can go on with the model."""

from __future__ import annotations

import datasets
import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import Spy, make
from transformers import LlamaForCausalLM, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GUIDED = dict(prefix_schedule="constant", prefix_length=3)


class Breaks(LlamaForCausalLM):
    """Raises in its forward where it is told to, once."""

    breaks = None

    def forward(self, *arguments, **keywords):
        if self.breaks is not None:
            error, self.breaks = self.breaks, None
            raise error
        return super().forward(*arguments, **keywords)


def state(model):
    """What a call might leave behind: modes, configs, hooks, and what hides a method."""
    return {
        name: (
            part.training, vars(part).get("gradient_checkpointing"),
            vars(part).get("_gradient_checkpointing_func"), len(part._forward_hooks),
            len(part._forward_pre_hooks), id(getattr(part, "generation_config", None)),
            "forward" in vars(part),
        )
        for name, part in model.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("no room")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_generation_that_is_interrupted(tmp_path, side, error):
    models = tiny.model(0, kind=Breaks), tiny.model(1, kind=Breaks)
    for model in models:
        model.gradient_checkpointing_enable()
    trainer = make(tmp_path, *models, gradient_checkpointing=True, **GUIDED)
    trainer.model.train()
    before = [state(model) for model in models]
    limit = trainer.generation_config.max_new_tokens
    models[side == "teacher"].breaks = error
    with pytest.raises(type(error)):
        trainer._generate_and_score_completions(tiny.prompts(2).to_list())
    assert [state(model) for model in models] == before
    assert models[0].is_gradient_checkpointing and models[0].training
    assert trainer.generation_config.max_new_tokens == limit
    assert trainer.generation_config.eos_token_id == trainer.eos_token_ids == [2, 3]
    assert trainer.model_wrapped is models[0]
    trainer.train()


def test_checkpointing_keeps_its_options_over_a_generation(tmp_path):
    """TRL would checkpoint every layer from then on, and fail on the option."""
    if not hasattr(TrainingArguments, "activation_checkpointing_kwargs"):
        pytest.skip("this transformers checkpoints every layer")
    options = dict(activation_checkpointing_kwargs={"every_n_layers": 2})
    trainer = make(tmp_path, gradient_checkpointing=True, max_steps=2, **options)
    trainer.train()
    layers = trainer.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_loss_that_is_interrupted(tmp_path, side):
    """Before the wrapper calls the forward that TRL redirects to the loss."""
    models = tiny.model(0), tiny.model(1)
    trainer = make(tmp_path, *models)
    ids = torch.tensor([[5, 6, 7]])
    expected = models[side == "teacher"](ids).logits.detach()

    def fail(module, arguments):
        if not torch.is_tensor(arguments[0] if arguments else None) and arguments:
            raise KeyboardInterrupt

    hook = models[side == "teacher"].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hook.remove()
    assert torch.equal(models[side == "teacher"].eval()(ids).logits, expected)
    assert not any("forward" in vars(model) for model in models)


def test_training_that_is_interrupted(tmp_path):
    """NEFTune's noise is not added a second time by the next run, and no error after it is taken
    for one of training."""
    student = tiny.model(0, kind=Breaks)
    trainer = make(tmp_path, student, neftune_noise_alpha=5.0)
    student.breaks = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.is_in_train
    assert not student.get_input_embeddings()._forward_hooks
    trainer.train()
    again = make(tmp_path, tiny.model(0, kind=Breaks))
    again.train()
    assert not again.is_in_train


def test_an_error_names_the_checkpoint(tmp_path):
    """Also where its own words do not: one of a row that is read late."""
    rows = tiny.prompts(8)
    long = rows.select([7]).map(lambda row: {"prompt": " ".join(["w1"] * 200)})
    data = datasets.concatenate_datasets([rows.select(range(7)), long])
    settings = dict(per_device_train_batch_size=1, max_steps=8, shuffle_dataset=False)
    trainer = make(tmp_path, data=data, save_strategy="steps", save_steps=3, **settings)
    with pytest.raises(ValueError, match="exceed") as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert note.startswith(f"The run can go on from {tmp_path / 'checkpoint-6'} by resume_from_che")
    early = data.select([7, *range(7)])  # before another run has saved anything in that folder
    for folder in (tmp_path, tmp_path / "other"):
        with pytest.raises(ValueError, match="exceed") as caught:
            make(folder, data=early, **settings).train()
        assert not hasattr(caught.value, "__notes__")


class FailsInTheSecond(Spy):
    """Raises behind the loss of the second micro-batch, once."""

    fails = True

    def after_loss(self, loss, stats, inputs):
        super().after_loss(loss, stats, inputs)
        if self.fails and len(self.seen) == 2:
            self.fails = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("train", [True, False])
def test_logs_after_an_interruption(tmp_path, train):
    """What the interrupted loop counted is no part of the next log."""
    logs = []
    for fails in (True, False):
        trainer = make(
            tmp_path, evaluate=tiny.prompts(8), kind=FailsInTheSecond, learning_rate=0.0,
            per_device_train_batch_size=2, per_device_eval_batch_size=2,
            gradient_accumulation_steps=4, generation_kwargs={"do_sample": False}, objective="gkd",
        )  # fmt: skip
        trainer.fails = fails
        call = trainer.train if train else trainer.evaluate
        if fails:
            with pytest.raises(KeyboardInterrupt):
                call()
        call()
        logs.append(next(log for log in trainer.state.log_history if "loss" in log or not train))
    timed = ("time", "second", "runtime", "memory", "num_tokens")
    assert len(logs[0]) > 10
    for name, value in logs[0].items():
        if not any(word in name for word in timed):
            assert value == pytest.approx(logs[1][name], rel=1e-6), name
