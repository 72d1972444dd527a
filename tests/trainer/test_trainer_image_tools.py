"""Images in prompts together with tools: of a batch some rows call one, and go on after its answer
with their own images.

Five families of models, that tell images from text in five ways (`helpers/vision.py`). A call is
one word, which TRL's parser of responses does not know: it is replaced.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")
pytest.importorskip("PIL", reason="images need pillow")

import tiny
import vision
from test_trainer_image_options import BATCHES, GUIDES, IMAGES, KINDS, fields_of, rows
from test_trainer_images import followed
from training import SGD, Spy, every_step_is_the_loop
from trl.trainer import distillation_trainer

from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LIMIT, END = 14, 3
CALL, TOLD = (tiny.tokenizer().convert_tokens_to_ids(word) for word in ("w90", "w88"))
#: Rows that call the tool: with two images, with none, with three, with one.
CALLERS = (0, 1, 3, 6)
_CALLS = (
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} "
    "{{ c['function']['arguments'] | tojson }} {% endfor %}<|end|>"
)


def look() -> str:
    """Looks."""
    return "w88 w87"


def parsed(tokenizer, ids, prefix=None, tools=None):
    message = {"role": "assistant", "content": tokenizer.decode(ids)}
    if CALL not in ids:
        return message
    function = {"name": "look", "arguments": {}}
    return message | {"tool_calls": [{"type": "function", "function": function}]}


def processor(kind):
    made = vision.processor(kind)
    made.chat_template = made.chat_template.replace("<|end|>", _CALLS)
    made.tokenizer.response_template = {"defaults": {"role": "assistant"}, "fields": {}}
    return made


class Looks(Spy):
    """A student that calls the tool in some rows, and writes what it likes once it was answered;
    the others write it at once."""

    def _sample_completions(self, prompt_ids, images, fields, *rest):
        written = super()._sample_completions(prompt_ids, images, fields, *rest)
        for place, ids in enumerate(prompt_ids):
            calls = any(tiny.tokenizer().convert_tokens_to_ids(f"w{7 * row}") in ids
                        for row in CALLERS)  # fmt: skip
            if calls and TOLD not in ids:
                written[place] = [CALL, END]
            elif calls:
                self.__dict__.setdefault("answers", []).append((ids, written[place]))
        return written


def make(folder, kind, **settings):
    defaults = dict(
        max_steps=2, max_completion_length=LIMIT, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, logging_steps=1,
        seed=5, generation_kwargs={"do_sample": False}, **SGD,
    )  # fmt: skip
    args = TrOPDConfig(str(folder), **(defaults | settings))
    student, teacher = (vision.model(kind, seed) for seed in (0, 1))
    return Looks(student, teacher, args, rows(), processing_class=processor(kind), tools=[look])


@torch.no_grad()
def greedily(model, kind, fields, ids, tokens):
    """What the model writes after these ids of the row alone, without a cache."""
    written = []
    while len(written) < tokens and written[-1:] not in ([2], [3]):
        read = followed(kind, fields, ids + written)
        logits = model(**read, use_cache=False).logits[0, -1]
        logits[vision.IDS[vision.IMAGE]] = -torch.inf
        written.append(int(logits.argmax()))
    return written


@pytest.mark.parametrize(
    ("guide", "batch"), [("alone", "reuse"), ("teacher", "whole"), ("column", "parts")]
)
@pytest.mark.filterwarnings("ignore:tools. ")  # what it likes may be a call, at the very end
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_loop_s(tmp_path, monkeypatch, kind, guide, batch):
    monkeypatch.setattr(distillation_trainer, "parse_response", parsed)
    trainer = make(tmp_path, kind, **GUIDES[guide] | BATCHES[batch])
    fields = fields_of(trainer, kind, rows())
    moved = every_step_is_the_loop(trainer, trainer.teacher_model, fields, tolerance=1e-4)
    assert all(norm > 0.01 for norm in moved)
    assert any("pixel_values" in one for one in trainer.batches)
    answered = []
    for one in trainer.batches:
        said = one["completion_mask"].bool() & ~one["loss_mask"].bool()
        answered.append((said & (one["completion_ids"] == TOLD)).any(1))
        assert torch.equal(said.any(1), answered[-1])
    assert 0 < torch.cat(answered).float().mean() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_goes_on_with_its_own_images(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(distillation_trainer, "parse_response", parsed)
    trainer = make(tmp_path, kind, max_steps=1, per_device_train_batch_size=len(IMAGES))
    fields = fields_of(trainer, kind, rows())
    student = vision.model(kind, 0)
    trainer.train()
    assert len(trainer.answers) == len(CALLERS)
    for prompt, answer in trainer.answers:
        start = prompt.index(CALL)
        known = fields(torch.tensor(prompt[:start]), torch.tensor([], dtype=torch.long))
        known = {name: v.float() if v.is_floating_point() else v for name, v in known.items()}
        known["input_ids"] = torch.tensor([prompt[:start]])
        expected = greedily(student, kind, known, prompt[start:], len(answer))
        assert answer == expected
