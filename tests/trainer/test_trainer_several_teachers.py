"""`teacher_models` and the column `teacher_id`: each row goes to its own teacher."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from engines import saved_together
from training import (
    by_hand,
    is_the_large_batch,
    make,
    resume_and_compare,
    share_written_by,
    step_and_compare,
    unloadable,
)

from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SPLIT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
IDS = ["code", "math", "math", "code", "math", "math", "math", "code"]
SETTINGS = {
    "micro-batches": SPLIT,
    "whole vocabulary": dict(objective="reverse_kl"),
    "kept tokens": dict(objective={"gate": "threshold", "outlier": "mask", "normalize": "kept"}),
    "prefix": dict(SPLIT, prefix_schedule="constant", prefix_length=3),
    "teacher's answers": dict(objective="reverse_kl", lmbda=0.0),
    "credit": dict(objective="clip_outlier", kl_discount_factor=0.5, importance_gamma=0.5),
    "threshold": dict(select_by="entropy", select_threshold=0.5),
    "one teacher a row": dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
}


def routed(rows: int = 8, **columns):
    return tiny.prompts(rows, teacher_id=IDS[:rows], **columns)


def teachers() -> list:
    """Of different widths, and one with a soft cap."""
    import transformers

    capped = dict(kind=transformers.Gemma2ForCausalLM, config=transformers.Gemma2Config,
                  head_dim=8, final_logit_softcapping=5.0, tie_word_embeddings=False)  # fmt: skip
    return [tiny.model(1, hidden_size=48), tiny.model(2, **capped)]


def several(folder, student=None, data=None, ids=("math", "code"), **settings):
    mapping = dict(zip(ids, teachers()))
    return make(folder, student, data=routed() if data is None else data, several=mapping,
                **settings)  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_step_is_the_loop_by_hand(tmp_path, name):
    """Each row alone, after its own teacher; one sum over all tokens, and one division."""
    settings = SETTINGS[name]
    trainer = several(tmp_path, **settings)
    step_and_compare(trainer, teachers())
    seen = torch.cat([batch["teacher_index"] for batch in trainer.batches])
    assert set(seen.tolist()) == {0, 1}


def test_rows_have_the_teacher_of_their_id(tmp_path):
    """... through shuffling and splitting."""
    trainer = several(tmp_path, max_steps=2, **SPLIT)
    trainer.train()
    words = tiny.tokenizer()
    own = dict(zip(routed()["prompt"], IDS))
    for batch in trainer.batches:
        for prompt, index in zip(batch["prompt_ids"], batch["teacher_index"]):
            text = words.decode(prompt[prompt != 0])
            assert ("math", "code")[int(index)] == own[text]


def test_one_teacher_twice_is_that_teacher(tmp_path):
    """The same completions; the losses but for the order of sums."""
    one = make(tmp_path, max_steps=2, **SPLIT)
    one.train()
    same = {"math": tiny.model(1, hidden_size=48), "code": tiny.model(1, hidden_size=48)}
    two = make(tmp_path, data=routed(), several=same, max_steps=2, **SPLIT)
    two.train()
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    log, other = two.state.log_history[0], one.state.log_history[0]
    for name in ("tropd/reverse_kl", "tropd/trust_ratio", "tropd/reward_min", "entropy"):
        assert log[name] == pytest.approx(other[name], rel=1e-4)


def test_with_prompts_of_their_own(tmp_path):
    told = [f"w{90 - i} " * (1 + (5 * i) % 8) + f"w{i}" for i in range(8)]
    trainer = several(tmp_path, data=routed(teacher_prompt=told), **SPLIT)
    step_and_compare(trainer, teachers())


def test_each_teacher_writes_its_rows(tmp_path):
    sure = {"math": tiny.model(1, spread=300.0), "code": tiny.model(2, spread=300.0)}
    trainer = make(tmp_path, data=routed(), several=sure, objective="opd", lmbda=0.0)
    trainer.train()
    (batch,) = trainer.batches
    assert "teacher_index" in batch
    assert share_written_by(list(sure.values()), batch) > 0.8


def test_evaluation_is_a_mean_over_tokens(tmp_path):
    settings = dict(objective="reverse_kl", generation_kwargs={"do_sample": False})
    trainer = several(tmp_path, evaluate=routed(6), per_device_eval_batch_size=3, **settings)
    together = trainer.evaluate()["eval_loss"]
    alone = several(tmp_path, evaluate=routed(6), per_device_eval_batch_size=1, **settings)
    assert together == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, dict(num_iterations=2, drift_tau=1.0)])
def test_resume(tmp_path, settings):
    mapping = dict(zip(("math", "code"), teachers()))
    resume_and_compare(tmp_path, 3, max_steps=4, data=routed(), several=mapping, **settings)


ONE_STEP = """
import sys, torch
from engines import use, whole_parameters
settings = use(sys.argv[2])
from test_trainer_several_teachers import several
trainer = several(
    sys.argv[1], per_device_train_batch_size=1, gradient_accumulation_steps=2,
    prefix_schedule="constant", prefix_length=2, **settings,
)
trainer.train()
rank = trainer.accelerator.process_index
torch.save((trainer.batches, whole_parameters(trainer.model), trainer.losses),
           f"{sys.argv[1]}/{rank}.pt")
"""


def test_two_processes_are_the_large_batch(tmp_path, tmp_path_factory):
    """Neither waits for the other where it has no row of a teacher."""
    saved = saved_together("test_trainer_several_teachers", tmp_path_factory)
    trainer = several(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.seen = [(batch, True) for batches, *_ in saved for batch in batches]
    twin = tiny.model(0).double()
    loss = by_hand(trainer, twin, [one.double() for one in teachers()])
    is_the_large_batch(saved, tiny.model(0), twin, loss.item())


def saved(folder, model, words=tiny.WORDS) -> str:
    model.save_pretrained(folder)
    tiny.tokenizer(words).save_pretrained(folder)
    return str(folder)


def test_by_names_in_the_config(tmp_path):
    names = {name: saved(tmp_path / name, one) for name, one in zip(("math", "code"), teachers())}
    trainer = make(tmp_path, data=routed(), teacher_models=names)
    step_and_compare(trainer, teachers())
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "the teacher of each prompt" in card and "(math)" in card and "(code)" in card


def test_each_tokenizer_is_checked(tmp_path):
    other = ("w1", "w0", *tiny.WORDS[2:])
    names = {"math": saved(tmp_path / "a", teachers()[0]),
             "code": saved(tmp_path / "b", tiny.model(2), other)}  # fmt: skip
    with pytest.raises(ValueError, match=r"^teacher_models\['code'\]: its tokenizer is not"):
        make(tmp_path, data=routed(), several=names)


def test_errors_of_other_arguments_keep_the_teacher_s_id(tmp_path):
    """JSONDecodeError, for one, is not made of a message alone."""
    names = {"math": saved(tmp_path / "a", teachers()[0]),
             "code": saved(tmp_path / "b", tiny.model(2))}  # fmt: skip
    (tmp_path / "b" / "model.safetensors").unlink()
    (tmp_path / "b" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"^teacher_models\['code'\]: Expecting property name"):
        make(tmp_path, data=routed(), several=names)


def test_batch_in_trl_s_form(tmp_path):
    """It does not say which teacher reads a row."""
    trainer, ids = several(tmp_path), torch.full((2, 4), 7)
    batch = {f"{part}_ids": ids for part in ("prompt", "completion")}
    batch |= {f"{part}_mask": torch.ones_like(ids) for part in ("prompt", "completion")}
    with pytest.raises(ValueError, match="^teacher_index: the batch lacks it, .* 'math', 'code'"):
        trainer.compute_loss(trainer.model, batch)


def test_vocabularies_of_different_heights(tmp_path):
    """Only ids that all have are compared, and written."""
    both = [tiny.model(1, vocab_size=98), tiny.model(2, vocab_size=112)]
    trainer = make(tmp_path, tiny.model(0, vocab_size=104), data=routed(), objective="opd",
                   several=dict(zip(("math", "code"), both)))  # fmt: skip
    low = copy.deepcopy(both[1])
    low.resize_token_embeddings(98)
    step_and_compare(trainer, [both[0], low])
    assert trainer._shared_vocab_size == 98
    assert set(range(98, 112)) <= set(trainer.generation_config.suppress_tokens)
    assert all(int(b["completion_ids"].max()) < 98 for b in trainer.batches)


def test_a_row_longer_than_the_context_of_another_s_teacher(tmp_path):
    """... trains, also behind prefixes; one longer than its own teacher's is refused."""
    both = {"math": tiny.model(1, max_position_embeddings=32), "code": tiny.model(2)}
    texts = ["w1 " * 40 if name == "code" else "w1 w2" for name in IDS]
    data = tiny.Dataset.from_dict({"prompt": texts, "teacher_id": IDS})
    for settings in ({}, dict(prefix_schedule="constant", prefix_length=3)):
        make(tmp_path, data=data, several=both, max_steps=2, **settings).train()
    with pytest.raises(ValueError, match="a prompt of 40 .* the teacher 'code''s context of 32"):
        make(tmp_path, data=data, several=dict(zip(both, reversed(both.values())))).train()


@pytest.mark.parametrize("name", ["math", "code"])
def test_scales_of_positions_are_of_a_teacher_s_own_rows(tmp_path, name):
    """A warning where its rows lie on both sides of the length at which they change."""
    scaled = tiny.model(1, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                        "rope_theta": 10000.0}, max_position_embeddings=32)  # fmt: skip
    texts = ["w1 " * 40 if own == "code" else "w1 w2" for own in IDS]
    data = tiny.Dataset.from_dict({"prompt": texts, "teacher_id": IDS})
    both = {"math": tiny.model(2), "code": tiny.model(2)} | {name: scaled}
    trainer = make(tmp_path, data=data, several=both, max_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in caught if "scales the positions" in str(one.message)]
    assert len(said) == (name == "code")
    assert all(one.startswith("the teacher 'code' scales") for one in said)


BAD = [
    ({}, "expected a mapping"),
    ("abc", "expected a mapping"),
    ({"math": 3}, "expected text as an id and a model or its name, got 'math' and a int"),
    ({3: "x"}, "expected text as an id"),
    ({"math": "self"}, "'math' is 'self'"),
]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_bad_mappings(tmp_path, given, words):
    with pytest.raises(ValueError, match=f"^teacher_models: {words}"):
        make(tmp_path, unloadable(tmp_path), data=routed(), several=given)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (dict(teacher_model_name_or_path="x"), ValueError, "teacher_model_name_or_path: "),
        (dict(teacher_model_revision="x"), ValueError, "teacher_model_revision: "),
        (dict(teacher_model_server_url="http://x", objective="opd"), ValueError,
         "teacher_model_server_url: teacher_models are the teachers"),
        (dict(precomputed_teacher=True, objective="opd"), ValueError, "precomputed_teacher: "),
        (dict(teacher=tiny.model(1)), ValueError, "teacher_model: "),
        (dict(teacher_update_rate=0.1), ValueError, "teacher_update_rate: "),
        (dict(objective="entropy_opd"), NotImplementedError, "teacher_models: .* ranks"),
        (dict(objective="reopold"), NotImplementedError, "teacher_models: .* ranks"),
        (dict(select_by="entropy", select_fraction=0.5), NotImplementedError, "teacher_models: "),
        (dict(gradient_sampling=0.5), NotImplementedError, "gradient_sampling: "),
        (dict(data=tiny.prompts()), ValueError, "train_dataset: .* column 'teacher_id'"),
        (dict(evaluate=tiny.prompts()), ValueError, "eval_dataset: .* column 'teacher_id'"),
        (dict(data=tiny.prompts(teacher_id=["math"] * 7 + ["maths"])), ValueError,
         "train_dataset: teacher_id 'maths' is none of the teachers: .* 'math', 'code'"),
        (dict(evaluate={"a": tiny.prompts(1, teacher_id=["x"])}), ValueError,
         r"eval_dataset\['a'\]: teacher_id 'x'"),
    ],
)  # fmt: skip
def test_refusals_before_a_model_is_loaded(tmp_path, settings, error, words):
    names = {"math": unloadable(tmp_path), "code": unloadable(tmp_path)}
    given = dict(data=routed()) | settings
    with pytest.raises(error, match=f"^{words}"):
        make(tmp_path, unloadable(tmp_path), several=names, **given)


def test_what_several_models_cannot_be(tmp_path):
    with pytest.raises(NotImplementedError, match="^teacher_models: 'code' is behind a server"):
        make(tmp_path, data=routed(), several={"math": "x", "code": "http://y"})
    with pytest.raises(ValueError, match="^teacher_model_init_kwargs: it would have no effect"):
        several(tmp_path, teacher_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(OSError, match=r"^teacher_models\['math'\]: there is no folder /nowhere"):
        make(tmp_path, data=routed(), several={"math": "/nowhere", "code": "/nowhere"})


def test_a_stream_s_row_without_teacher(tmp_path):
    trainer = several(tmp_path)
    for row, shown in ((dict(prompt="w1"), None), (dict(prompt="w1", teacher_id="x"), "'x'")):
        with pytest.raises(ValueError, match=f"^teacher_id {shown} is none of the teachers"):
            trainer._generate_and_score_completions([row])


def test_on_the_command_line(tmp_path):
    args = TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, teacher_models='{"a": "b/c"}')
    assert args.teacher_models == {"a": "b/c"}
