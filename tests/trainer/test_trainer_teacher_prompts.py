"""A teacher with a prompt of its own, in the column `teacher_prompt`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from datasets import Dataset
from served import serve
from training import make, resume_and_compare, share_written_by, step_and_compare, unloadable

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer
from tropd_kernels.trainer.teacher_prompts import batch_tensors, teachers_view

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SPLIT = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
TALK = [[{"role": "user", "content": text}] for text in tiny.prompts()["prompt"]]


def privileged(rows: int = 8, **columns) -> Dataset:
    """The teacher's prompts are longer than the student's by up to 6 words, or shorter."""
    texts = [f"w{90 - i} " * (1 + (5 * i) % 8) + f"w{i}" for i in range(rows)]
    return tiny.prompts(rows, teacher_prompt=texts, **columns)


def teacher():
    return tiny.model(1, hidden_size=48)


@pytest.mark.parametrize(
    "settings",
    [
        dict(SPLIT),
        dict(objective="reverse_kl", pad_to_multiple_of=8),
        dict(SPLIT, prefix_schedule="constant", prefix_length=3),
        dict(objective="opd", lmbda=0.0),
        dict(objective="clip_outlier", kl_discount_factor=0.5, importance_gamma=0.5),
    ],
    ids=["micro-batches", "whole vocabulary", "prefix", "teacher's answers", "credit"],
)
def test_step_is_the_loop_by_hand(tmp_path, settings):
    """Each row alone, without padding: the teacher after its own prompt. One read after the
    student's prompt, or a hidden state off by one, gives another gradient."""
    trainer = make(tmp_path, data=privileged(), **settings)
    step_and_compare(trainer, teacher())
    longer = [(b["teacher_prompt_mask"].sum(1) - b["prompt_mask"].sum(1)) for b in trainer.batches]
    assert torch.cat(longer).unique().numel() > 1


def test_positions_by_hand():
    """Three and one ids: on the left padding, on the right the prompt."""
    made = batch_tensors([[5, 6, 7], [8]], 0, 4, "cpu")
    assert made["teacher_prompt_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert made["teacher_prompt_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    batch = made | {"prompt_ids": "the student's", "completion_ids": "both read it"}
    seen = teachers_view(batch)
    assert seen["prompt_ids"] is made["teacher_prompt_ids"]
    assert seen["prompt_mask"] is made["teacher_prompt_mask"]
    assert seen["completion_ids"] == "both read it" and batch["prompt_ids"] == "the student's"


def test_the_student_s_own_prompt_changes_nothing(tmp_path):
    """The column with the student's prompt: to the bit the run without it."""
    prompts = tiny.prompts()
    runs = []
    for data in (prompts, prompts.add_column("teacher_prompt", prompts["prompt"])):
        runs.append(make(tmp_path, data=data, max_steps=2, **SPLIT))
        runs[-1].train()
    assert runs[0].losses == runs[1].losses
    assert "teacher_prompt_ids" in runs[1].batches[0]
    for ours, theirs in zip(*(run.model.parameters() for run in runs)):
        assert torch.equal(ours, theirs)


def test_messages(tmp_path):
    """They go through the chat template like the student's; the two may be of different kinds."""
    data = tiny.prompts(8, teacher_prompt=TALK)
    trainer = make(tmp_path, data=data)
    step_and_compare(trainer, teacher())
    batch = trainer.batches[0]
    ends = batch["teacher_prompt_ids"][:, -2:]
    assert ends.tolist() == [[3, 1]] * 4  # the turn's end, and the beginning of the answer


@pytest.mark.parametrize("settings", [dict(lmbda=0.0), dict(prefix_schedule="constant",
                                                            prefix_length=4)])  # fmt: skip
def test_the_teacher_writes_after_its_own_prompt(tmp_path, settings):
    writer = tiny.model(1, spread=300.0)  # writes without doubt
    trainer = make(tmp_path, teacher=writer, data=privileged(), objective="opd", **settings)
    trainer.train()
    (batch,) = trainer.batches
    assert "teacher_prompt_ids" in batch
    assert share_written_by(writer, batch) > 0.8


@pytest.mark.parametrize("settings", [{}, dict(prefix_schedule="constant", prefix_length=3)])
def test_served_teacher(tmp_path, settings):
    settings = dict(objective_kwargs={"top_k": 4}, **settings)
    with serve(teacher(), tiny.tokenizer()) as running:
        trainer = make(
            tmp_path, data=privileged(), teacher_model_server_url=running.url, **settings
        )
        running.requests.clear()
        step_and_compare(trainer, teacher())
    (batch,) = trainer.batches
    asked = [r["prompt"] for r in running.requests if "prompt" in r]
    for ids, mask in zip(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"]):
        read = ids[mask.bool()].tolist()
        assert sum(request[: len(read)] == read for request in asked) == 1 + bool(len(settings) > 1)


def test_evaluation_reads_it(tmp_path):
    """... as training does, so that the two measure one quantity."""
    settings = dict(generation_kwargs={"do_sample": False}, objective="reverse_kl")
    own = tiny.prompts(4)
    losses = [
        make(tmp_path, data=privileged(), evaluate=data, **settings).evaluate()["eval_loss"]
        for data in (privileged(4), own.add_column("teacher_prompt", own["prompt"]))
    ]
    plain = make(tmp_path, evaluate=own, **settings).evaluate()["eval_loss"]
    assert losses[1] == plain != losses[0]


def test_resume_between_the_steps_on_a_batch(tmp_path):
    resume_and_compare(tmp_path, 3, max_steps=4, num_iterations=2, data=privileged())


@pytest.mark.parametrize("bad", [None, 3, [], [{"content": "w1"}]])
def test_rows_that_are_no_prompts(tmp_path, bad):
    """A stream may not know its columns: refused at the batch, by the column's name."""
    rows = [{"prompt": "w1 w2", "teacher_prompt": bad}] * 8
    trainer = make(tmp_path, data=tiny.prompts(4))
    with pytest.raises(ValueError, match="^teacher_prompt: expected text or messages"):
        trainer._generate_and_score_completions(rows)


def test_only_some_rows_have_it(tmp_path):
    trainer = make(tmp_path, data=tiny.prompts(4))
    rows = [{"prompt": "w1", "teacher_prompt": "w2"}, {"prompt": "w1"}]
    with pytest.raises(ValueError, match="^teacher_prompt: some rows of the data set have it"):
        trainer._generate_and_score_completions(rows)
    rows = [{"prompt": "w1", "teacher_prompt": "w2"}, {"prompt": "w1", "teacher_prompt": TALK[0]}]
    with pytest.raises(ValueError, match="^teacher_prompt: text and messages in one batch"):
        trainer._generate_and_score_completions(rows)
    rows = [{"prompt": "w1", "teacher_prompt": ""}] * 2
    with pytest.raises(ValueError, match="^teacher_prompt: no token in ''"):
        trainer._generate_and_score_completions(rows)


def test_teacher_prompt_beyond_the_teacher_s_context(tmp_path):
    """... though not beyond the student's, which does not read it."""
    data = tiny.prompts(8, teacher_prompt=["w1 " * 30] * 8)
    short = tiny.model(1, max_position_embeddings=32)
    with pytest.raises(ValueError, match="prompt of 30 tokens .* exceed the teacher's context"):
        make(tmp_path, teacher=short, data=data).train()
    short = tiny.model(0, max_position_embeddings=32)
    make(tmp_path, short, data=data).train()


def test_evaluation_without_it_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="^eval_dataset: no column 'teacher_prompt'"):
        make(tmp_path, unloadable(tmp_path / "model"), data=privileged(), evaluate=tiny.prompts(4))


def test_evaluation_without_it_where_no_teacher_reads_it(tmp_path):
    answers = dict(teacher_completion=[" w3 w4"] * 4)
    data = tiny.prompts(4, teacher_prompt=["w1"] * 4, **answers)
    args = TrOPDConfig(str(tmp_path), objective="sft", lmbda=0.0, bf16=False, use_cpu=True,
                       per_device_train_batch_size=4, gradient_accumulation_steps=1)  # fmt: skip
    TrOPDTrainer(
        tiny.model(0), None, args, data, tiny.prompts(4, **answers),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip


def test_columns_of_log_probs_do_not_need_it(tmp_path):
    """They were made after whatever the teacher read."""
    data = privileged(completion_ids=[[5, 6]] * 8, teacher_label_log_probs=[[-1.0, -2.0]] * 8)
    trainer = make(tmp_path, data=data, precomputed_teacher=True, objective="opd",
                   evaluate=data.remove_columns("teacher_prompt"))  # fmt: skip
    trainer.train()
    assert "teacher_prompt_ids" not in trainer.batches[0]
