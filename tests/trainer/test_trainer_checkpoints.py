"""A checkpoint's weights come back, under whatever names transformers has saved them."""

import warnings

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import Spy, Weights, make

from tropd_kernels.trainer.progress import last_checkpoint
from tropd_kernels.trainer.stops import how_to_resume

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MOE = dict(
    kind=transformers.Qwen3MoeForCausalLM, config=transformers.Qwen3MoeConfig, num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, decoder_sparse_step=1,
)  # fmt: skip
IMAGES = ("qwen2_vl", "gemma3")


def trainer_of(folder, kind, seed, **settings):
    settings = dict(
        objective="gkd", max_steps=3, save_strategy="steps", save_steps=1, learning_rate=0.1,
        generation_kwargs={"do_sample": False},
    ) | settings  # fmt: skip
    if kind in IMAGES:
        pytest.importorskip("PIL", reason="images need pillow")
        import vision

        data, student, teacher = vision.prompts(8), vision.model(kind, seed), vision.model(kind, 1)
        processor = vision.processor(kind)
        make_one = lambda *arguments, **more: Spy(
            *arguments, **more | {"processing_class": processor}
        )
    else:
        data, student, teacher = tiny.prompts(), tiny.model(seed, **MOE), tiny.model(1, **MOE)
        make_one = Spy
    evaluate = data.select(range(4)) if "eval_strategy" in settings else None
    trainer = make(folder, student, teacher, data, evaluate, kind=make_one, **settings)
    trainer.weights = Weights()
    trainer.add_callback(trainer.weights)
    return trainer


def equal(found, expected):
    ours, theirs = found.state_dict(), expected.state_dict()
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", ["qwen3_moe", *IMAGES])
def test_a_resumed_run_has_the_checkpoint_s_weights(tmp_path, kind):
    whole = trainer_of(tmp_path, kind, 0)
    whole.train()
    resumed = trainer_of(tmp_path, kind, 9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(resumed.weights.models[0], whole.weights.models[2])
    assert equal(resumed.model, whole.model)


@pytest.mark.parametrize("named", [None, "false", "checkpoint-1"])
def test_a_checkpoint_that_only_the_config_names(tmp_path, recwarn, named):
    """transformers leaves the field to scripts; the run would begin anew without a word."""
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, resume_from_checkpoint=named)
    trainer.train()
    said = [one for one in recwarn if str(one.message).startswith("resume_from_checkpoint: the")]
    assert len(said) == (named == "checkpoint-1")
    assert not said or said[0].filename == __file__
    recwarn.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not [one for one in recwarn if "begins anew" in str(one.message)]


def test_a_checkpoint_in_several_files(tmp_path):
    """As larger models are saved."""
    whole = trainer_of(tmp_path, "qwen3_moe", 0)
    whole.train()
    folder = tmp_path / "checkpoint-2"
    (folder / "model.safetensors").unlink()
    whole.weights.models[2].save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    resumed = trainer_of(tmp_path, "qwen3_moe", 9)
    resumed.train(resume_from_checkpoint=str(folder))
    assert equal(resumed.weights.models[0], whole.weights.models[2])


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_vl"])
def test_the_best_checkpoint_is_loaded(tmp_path, kind):
    trainer = trainer_of(
        tmp_path, kind, 0, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, save_total_limit=5,
    )  # fmt: skip
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert best < 3  # so that it is not what the run ends with
    assert equal(trainer.model, trainer.weights.models[best])


@pytest.mark.parametrize("eval_steps", [1, 2])
def test_the_best_evaluation_was_not_saved(tmp_path, eval_steps):
    """Students get worse at such a rate. transformers keeps the last weights without a word."""
    trainer = make(
        tmp_path, max_steps=4, learning_rate=3.0, evaluate=tiny.prompts(8),
        eval_strategy="steps", eval_steps=eval_steps, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="tropd/reverse_kl",
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert (trainer.state.best_global_step == 1) == (eval_steps == 1)
    words = "load_best_model_at_end: step 1 was the best of those evaluated, and it was not saved"
    assert any(str(one.message).startswith(words) for one in caught) == (eval_steps == 1)


@pytest.mark.parametrize("save_only_model", [True, False])
def test_a_checkpoint_of_the_weights_alone(tmp_path, save_only_model):
    """The schedule begins anew, which transformers does without a word."""
    settings = dict(
        max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="linear",
        save_only_model=save_only_model,
    )  # fmt: skip
    make(tmp_path, **settings).train()
    resumed = make(tmp_path, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    words = "has no scheduler.pt, as where save_only_model is set: the optimizer and the schedule"
    assert any(words in str(one.message) for one in caught) == save_only_model
    rates = [log["learning_rate"] for log in resumed.state.log_history if "learning_rate" in log]
    assert (rates[2] == rates[0]) == save_only_model


def test_a_save_that_was_cut_off(tmp_path):
    """Its folder is passed over: by an error's advice, and by a resume from the last one."""
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2)
    make(tmp_path, **settings).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert how_to_resume(str(tmp_path)).startswith(f"go on from {tmp_path / 'checkpoint-2'} by")
    assert last_checkpoint(tmp_path / "checkpoint-2") is None
    resumed = make(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.batches) == 2 and resumed.state.global_step == 4
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match="^resume_from_checkpoint: there is no whole checkpoint in"
    ):
        make(tmp_path, **settings).train(resume_from_checkpoint=True)
