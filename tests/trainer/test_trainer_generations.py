"""Several completions of each prompt, and prefixes that are a share of each answer."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from engines import on_two_processes
from training import RATE, by_hand, make, resume_and_compare, step_and_compare, unloadable

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer
from tropd_kernels.trainer.prefix import scheduled_length

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HERE = dict(use_cpu=True, bf16=False, report_to="none")
RELATIVE = dict(prefix_schedule="cosine", prefix_relative=True)


def answers(rows: int = 8, **columns):
    """Prompts with answers of 3 to 3 + rows - 1 words."""
    texts = [" " + " ".join(tiny.WORDS[40 + i : 43 + 2 * i]) for i in range(rows)]
    return tiny.prompts(rows, teacher_completion=texts, **columns)


def prompts_of(batches) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"])
    ]


# --- num_generations ---------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_each_prompt_so_often(tmp_path, parts):
    """Every step has its prompts as often as it says, written anew each time, and an epoch has
    each prompt in one step alone."""
    trainer = make(
        tmp_path, num_generations=2, max_steps=4, per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=parts,
    )  # fmt: skip
    trainer.train()
    seen = []
    for step in range(4):
        batches = trainer.batches[step * parts : (step + 1) * parts]
        prompts = prompts_of(batches)
        assert sorted(map(prompts.count, prompts)) == [2] * 4
        seen += set(prompts)
        texts = [tuple(ids) for batch in batches for ids in batch["completion_ids"].tolist()]
        assert len(set(zip(prompts, texts))) == 4
    assert len(seen) == len(set(seen)) == 8


def test_a_step_is_the_loop_s(tmp_path):
    teacher = tiny.model(1, hidden_size=48)
    trainer = make(
        tmp_path, teacher=teacher, num_generations=4, per_device_train_batch_size=1,
        gradient_accumulation_steps=4, data=answers(), **RELATIVE, prefix_weight=0.5,
        prefix_fraction=1.0, max_steps=1,
    )  # fmt: skip
    step_and_compare(trainer, teacher)
    assert len(set(prompts_of(trainer.batches))) == 1


@pytest.mark.parametrize("length", [4, 8])
def test_epochs_count_prompts(tmp_path, length):
    trainer = make(
        tmp_path, data=tiny.prompts(length), num_generations=4, max_steps=-1, num_train_epochs=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == length


def test_a_stream_repeats_its_rows(tmp_path):
    """... after it is shuffled, or the repetitions would be torn apart."""
    data = tiny.prompts().to_iterable_dataset()
    trainer = make(tmp_path, data=data, num_generations=2, max_steps=2)
    trainer.train()
    for batch in trainer.batches:
        prompts = prompts_of([batch])
        assert sorted(map(prompts.count, prompts)) == [2] * 4


@pytest.mark.parametrize("stop", [2, 3])  # before a new epoch, and amid a batch's steps
def test_resume(tmp_path, stop):
    resume_and_compare(
        tmp_path, stop, max_steps=6, num_generations=2, num_iterations=2, data=answers(4),
        **RELATIVE,
    )  # fmt: skip


_ONE_STEP = """
import sys, torch
from training import make
from test_trainer_generations import GROUP, answers
trainer = make(
    sys.argv[1], per_device_train_batch_size=2, ddp_backend="gloo", data=answers(), **GROUP
)
trainer.train()
weights = [p.detach() for p in trainer.model.parameters()]
saved = trainer.batches, trainer.losses, weights
torch.save(saved, f"{sys.argv[1]}/{trainer.accelerator.process_index}.pt")
"""
GROUP = dict(num_generations=4, max_steps=2, **RELATIVE)


@pytest.mark.slow
def test_a_group_on_two_processes(tmp_path):
    """The four completions of a prompt lie on both processes, two on each, and their steps are
    those of the loop by hand."""
    (ours, losses, weights), (theirs, others, same) = on_two_processes(_ONE_STEP, tmp_path, "ddp")
    assert len({*prompts_of(ours[:1]), *prompts_of(theirs[:1])}) == 1
    assert len({*prompts_of(ours), *prompts_of(theirs)}) == 2
    trainer = make(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, data=answers(),
        **GROUP,
    )  # fmt: skip
    trainer.seen = [(batch, True) for pair in zip(ours, theirs) for batch in pair]
    twin, teacher = tiny.model(0).double(), tiny.model(1, hidden_size=48).double()
    for step in range(2):
        loss = by_hand(trainer, twin, teacher, step=step)
        assert (losses[step] + others[step]) / 2 == pytest.approx(loss.item(), rel=1e-5)
        with torch.no_grad():
            for weight in twin.parameters():
                weight -= RATE * weight.grad
        twin.zero_grad()
    for one, other, true in zip(weights, same, twin.parameters(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.double(), true.detach(), rtol=1e-3, atol=1e-4)


# --- prefix_relative ---------------------------------------------------------------------------


def test_a_share_of_each_answer(tmp_path):
    """floor(alpha x its length) for each row, counted in tokens: alpha = (1 + cos(pi step / 4)) / 2
    is 1, 0.854, 0.5, 0.146. Answers are cut where a completion ends, at 10."""
    data = answers()
    trainer = make(tmp_path, data=data, max_steps=4, **RELATIVE)
    trainer.train()
    tokens = tiny.tokenizer()
    expected = {
        p: tokens(a)["input_ids"] for p, a in zip(data["prompt"], data["teacher_completion"])
    }
    assert {len(ids) for ids in expected.values()} == {3, 4, 5, 6, 7, 8, 9, 10}
    for step, batch in enumerate(trainer.batches):
        alpha = (1 + math.cos(math.pi * step / 4)) / 2
        for prompt, ids, length in zip(
            batch["prompt_ids"], batch["completion_ids"], batch["prefix_lengths"].tolist()
        ):
            answer = expected[tokens.decode(prompt[prompt != 0])]
            assert length == math.floor(alpha * len(answer))
            assert ids[:length].tolist() == answer[:length]
    assert len(set(trainer.batches[1]["prefix_lengths"].tolist())) > 1


def test_by_hand():
    """floor(0.5 x 7) = 3, floor((1 + cos(pi / 10)) / 2 x 41) = floor(0.97553 x 41) = 39."""
    assert scheduled_length("linear", 7, 1, 2) == 3
    assert scheduled_length("cosine", 41, 1, 10) == 39


def test_of_an_answer_that_the_teacher_writes(tmp_path):
    """It writes the whole of it, and half is kept."""
    asked = []

    class Asks(TrOPDTrainer):
        def generate_with_teacher(self, prompt_ids, images, fields, tokens):
            written = super().generate_with_teacher(prompt_ids, images, fields, tokens)
            asked.append((tokens, [len(ids) for ids in written]))
            return written

        def distill(self, student, teacher, inputs, normalizer):
            lengths.append(sorted(inputs["prefix_lengths"].tolist()))
            return super().distill(student, teacher, inputs, normalizer)

    lengths: list = []
    trainer = make(tmp_path, kind=Asks, max_steps=2, prefix_schedule="linear", prefix_relative=True)
    trainer.train()
    (all_of_it, first), (tokens, written) = asked
    assert all_of_it == tokens == 10
    assert lengths == [sorted(first), sorted(n // 2 for n in written)]


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (dict(num_generations=3), "num_generations: 3 completions of a prompt do not divide the 8"),
        (dict(num_generations=0), "num_generations: must be a whole number of at least 1"),
        (dict(num_generations=2.0), "num_generations: expected a whole number"),
        (dict(num_generations=2, generation_kwargs={"do_sample": False}), "num_generations: it w"),
        (dict(num_generations=2, precomputed_teacher=True), "num_generations: it would have no ef"),
        (dict(prefix_relative=True), "prefix_relative: .* prefix_schedule is 'none'"),
        (dict(RELATIVE, prefix_length=4), "prefix_relative: .* and prefix_length 4: .* leave pref"),
        (dict(RELATIVE, lmbda=0.0), "prefix_relative: it would have no effect: with lmbda 0"),
        (
            dict(lmbda=0.0, prefix_schedule="constant", prefix_length=2),
            "prefix_length: it would have no effect: with lmbda 0",
        ),
        (dict(RELATIVE, precomputed_teacher=True), "prefix_relative: with precomputed_teacher"),
        (
            dict(accelerator_config={"dispatch_batches": True}),
            "accelerator_config: with dispatch_batches",
        ),
        (dict(accelerator_config={"split_batches": True}), "accelerator_config: with split_batch"),
        (dict(accelerator_config={"even_batches": False}), "accelerator_config: without even_batc"),
        (
            dict(accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 2}}),
            "accelerator_config: num_steps .*: set gradient_accumulation_steps",
        ),
        (dict(prefix_schedule="cosine"), "prefix_length: 0 with prefix_schedule 'cosine': give bo"),
    ],
)
def test_refused_by_the_config(settings, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        TrOPDConfig("unused", **HERE, **settings)


@pytest.mark.parametrize(
    ("settings", "texts", "error"),
    [
        (RELATIVE, ["  w1", "", " w3", " w4"], "teacher_completion: .* prompt 'w7 w8 w9' is empty"),
        (
            RELATIVE,
            ["  w1", None, " w3", " w4"],
            "teacher_completion: .* 'w7 w8 w9' is empty: drop",
        ),
        (dict(lmbda=0.0, num_generations=2), [" w1"] * 4, "num_generations: .*with lmbda 0"),
        (dict(lmbda=0.0, top_p=0.3), [" w1"] * 4, "top_p: .* with lmbda 0 completions are the te"),
        (
            dict(lmbda=0.0, generation_kwargs={"num_beams": 3}),
            [" w1"] * 4,
            "generation_kwargs: .* with lmbda 0 completions are the texts in teacher_completion",
        ),
    ],
)
def test_refused_before_a_model_is_loaded(tmp_path, settings, texts, error):
    args = TrOPDConfig(str(tmp_path), **HERE, per_device_train_batch_size=4, **settings)
    data = tiny.prompts(4, teacher_completion=texts)
    with pytest.raises(ValueError, match=error):
        TrOPDTrainer(unloadable(tmp_path), tiny.model(1), args, data)


def test_an_answer_without_tokens(tmp_path):
    """Of which text there is, and no token."""
    data = tiny.prompts(4, teacher_completion=["  "] * 4)
    trainer = make(tmp_path, data=data, **RELATIVE)
    with pytest.raises(ValueError, match="teacher_completion: prefix_relative .* is empty"):
        trainer.train()


def test_fewer_prompts_than_a_step(tmp_path):
    with pytest.raises(
        ValueError, match="train_dataset: 1 rows are fewer .* takes, 2 .* / num_gen"
    ):
        make(tmp_path, data=tiny.prompts(1), num_generations=2)
