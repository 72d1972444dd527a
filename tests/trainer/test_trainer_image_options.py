"""Images with every option: each step is that of the loop by hand, over each row alone.

Rows have two images, one, or none. Five families of models, that tell images from text in five
ways (`helpers/vision.py`).
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")
pytest.importorskip("PIL", reason="images need pillow")

import tiny
import vision
from datasets import Dataset
from pairs import covering
from test_trainer_images import by_hand as fields_by_hand
from test_trainer_images import followed
from training import SGD, Spy, every_step_is_the_loop

from tropd_kernels.trainer import TrOPDConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.slow,  # images without these options, and these without images, are quick tests
]
KINDS = ("aria", "gemma3", "idefics3", "llava_next", "qwen2_vl")
IMAGES = ([0, 5], [], [2], [1, 4, 3], [], [6], [7], [8])


def rows():
    """Questions of 1 to 4 words about as many images as `IMAGES` says, with answers."""
    talk = [
        [{"role": "user", "content": " ".join(tiny.WORDS[7 * i : 7 * i + 1 + i % 4])}]
        for i in range(len(IMAGES))
    ]
    answers = [" ".join(tiny.WORDS[60 + i : 64 + 2 * i]) for i in range(len(IMAGES))]
    images = [[vision.image(number) for number in of_row] for of_row in IMAGES]
    return Dataset.from_dict({"prompt": talk, "images": images, "teacher_completion": answers})


#: Whose words a completion begins with.
GUIDES = {
    "alone": {},
    "teacher": dict(prefix_schedule="constant", prefix_length=3, prefix_column=None),
    "column": dict(prefix_schedule="constant", prefix_length=3),
    # At the first step the whole answer, at the second half of it.
    "relative": dict(prefix_schedule="linear", prefix_relative=True, prefix_steps=2),
    # With this seed the teacher writes the first step's completions, the student the second's.
    "lmbda": dict(lmbda=0.5, prefix_column=None, seed=6),
}
OBJECTIVES = {
    "tropd": {},
    "gkd": dict(objective="gkd"),
    "credit": dict(objective="opd", kl_discount_factor=0.5, importance_gamma=0.5),
    "drift": dict(drift_tau=3.0, drift_block_size=4),
    "selected": dict(select_by="disagreement", select_fraction=0.5),
    "threshold": dict(objective="gkd", select_by="entropy", select_threshold=1.0),
    "gradient_tolerance": dict(gradient_tolerance=0.2),
    "gradient_sampling": dict(objective="gkd", gradient_sampling=0.3),
}  # fmt: skip
#: How rows come together, with the optimizer's steps on each batch.
BATCHES = {
    "whole": dict(per_device_train_batch_size=4),
    "parts": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "rows": dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
    "groups": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=2),
    "reuse": dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, num_iterations=2),
}
#: Where a micro-batch's tokens are ranked, or gates are relative to their mean, the loop by hand
#: has single rows; and gates are of a later step on a batch.
ONLY = {"selected": ("rows", "reuse"), "drift": ("reuse",)}
_ALL = [
    case
    for case in itertools.product(KINDS, GUIDES, OBJECTIVES, BATCHES, ("all", "lora"))
    if case[3] in ONLY.get(case[2], BATCHES)
]
#: All of them would take the better part of an hour.
PAIRS = [_ALL[i] for i in covering(_ALL)]


def trainer_of(folder, kind, trained="all", data=None, **settings):
    peft = None
    if trained == "lora":
        lora = pytest.importorskip("peft")
        peft = lora.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    defaults = dict(
        max_steps=2, max_completion_length=8, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, logging_steps=1,
        seed=5, **SGD,
    )  # fmt: skip
    args = TrOPDConfig(str(folder), **(defaults | settings))
    return Spy(
        vision.model(kind, 0), vision.model(kind, 1), args, rows() if data is None else data,
        processing_class=vision.processor(kind), peft_config=peft,
    )  # fmt: skip


def fields_of(trainer, kind, data):
    """What a model reads of each row besides ids, from the row of the data set with its prompt."""
    made = [fields_by_hand(trainer.processing_class, row) for row in data]
    known = {tuple(of["input_ids"][0].tolist()): of for of in made}
    assert len(known) == len(data)

    def fields(prompt, completion):
        whole = followed(kind, known[tuple(prompt.tolist())], completion.tolist())
        return {
            name: value.double() if value.is_floating_point() else value
            for name, value in whole.items()
            if name != "input_ids"
        }

    return fields


@pytest.mark.parametrize(("kind", "guide", "objective", "batch", "trained"), PAIRS)
def test_every_step_is_the_loop_s(tmp_path, kind, guide, objective, batch, trained):
    settings = GUIDES[guide] | OBJECTIVES[objective] | BATCHES[batch]
    trainer = trainer_of(tmp_path, kind, trained, **settings)
    teacher, data = trainer.teacher_model, rows()
    fields = fields_of(trainer, kind, data)
    sampled = objective.startswith("gradient")  # whose loss is of all ids, and exact
    # float32, through a model of images and one of text; a token out of place differs by a percent.
    moved = every_step_is_the_loop(trainer, teacher, fields, not sampled, tolerance=1e-4)
    assert all(norm > 0.01 for norm in moved)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(("tropd/gradient_error" in log) == sampled for log in logs)
    lengths = [batch["prefix_lengths"] for batch in trainer.batches]
    assert bool(torch.cat(lengths).any()) == (guide != "alone")
    assert any("pixel_values" in batch for batch in trainer.batches)
