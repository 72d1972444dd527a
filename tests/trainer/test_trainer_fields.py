"""Fields that a processor makes of prompts: what generation reads of them, the loss reads."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from datasets import Dataset
from training import Spy, make

from tropd_kernels.trainer.fields import (
    extend_token_fields,
    fields_of_rows,
    has_rows,
    kept_fields,
    written_type,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TYPE_IDS = ("token_type_ids", "mm_token_type_ids")
GPT2 = dict(kind=transformers.GPT2LMHeadModel, config=transformers.GPT2Config, n_layer=2, n_head=4)

TALK = Dataset.from_dict({"prompt": [
    [{"role": "user", "content": " ".join(tiny.WORDS[i : i + 1 + i % 3])}] for i in range(4)
]})  # fmt: skip
TYPED = ["input_ids", "token_type_ids", "attention_mask"]


class Hidden(Spy):
    """Keeps both sides' hidden states."""

    def distill(self, student, teacher, inputs, normalizer):
        self.__dict__.setdefault("hidden", []).append((student.hidden.detach(), teacher.hidden))
        return super().distill(student, teacher, inputs, normalizer)


def test_types_of_text(tmp_path):
    """GPT-2 adds an embedding for type 0 too, which the loss has to do where generation did."""
    gpt2 = dict(kind=transformers.GPT2LMHeadModel, config=transformers.GPT2Config)
    trainer = make(
        tmp_path, tiny.model(0, **gpt2), tiny.model(1, **gpt2), TALK,
        kind=Hidden, learning_rate=0.0, disable_dropout=True, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, pad_to_multiple_of=4,
    )  # fmt: skip
    trainer.processing_class.model_input_names = TYPED
    trainer.train()
    assert len(trainer.hidden) == 2
    for batch, (found, _) in zip(trainer.batches, trainer.hidden):
        for i, mask in enumerate(batch["prompt_mask"]):
            prompt = batch["prompt_ids"][i][mask.bool()]
            completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
            ids = torch.cat([prompt, completion])[None]
            with torch.no_grad():
                alone = trainer.model.base_model(ids, token_type_ids=torch.zeros_like(ids))
            alone = alone.last_hidden_state[0, len(prompt) - 1 : -1]
            assert (found[i, : len(completion)] - alone).norm() <= 1e-4 * alone.norm()


@pytest.mark.parametrize(
    "settings", [{}, {"lmbda": 0.0}, {"prefix_schedule": "constant", "prefix_length": 3}]
)
@pytest.mark.parametrize("teacher", ["llama", "gpt2"])
@pytest.mark.parametrize("student", ["llama", "gpt2"])
def test_types_that_a_side_does_not_read(tmp_path, student, teacher, settings):
    """A Llama has none, and its generation would refuse them; GPT-2 has, beside it too."""
    kinds = {"llama": {}, "gpt2": GPT2}
    batches, hidden = [], []
    for names in (["input_ids", "attention_mask"], TYPED):
        trainer = make(
            tmp_path, tiny.model(0, **kinds[student]), tiny.model(1, **kinds[teacher]), TALK,
            kind=Hidden, disable_dropout=True, learning_rate=0.0, **settings,
        )  # fmt: skip
        trainer.processing_class.model_input_names = names
        trainer.train()
        batches += trainer.batches
        hidden += trainer.hidden
    assert ("field:token_type_ids" in batches[1]) == ("gpt2" in (student, teacher))
    if (student, teacher) == ("llama", "llama"):
        assert torch.equal(*(batch["completion_ids"] for batch in batches))
    (batch, of_student, of_teacher) = batches[1], *hidden[1]
    for i, mask in enumerate(batch["prompt_mask"]):
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([batch["prompt_ids"][i][mask.bool()], completion])[None]
        for side, model, found in ((student, trainer.model, of_student),
                                   (teacher, trainer.teacher_model, of_teacher)):  # fmt: skip
            types = {"token_type_ids": torch.zeros_like(ids)} if side == "gpt2" else {}
            with torch.no_grad():
                alone = model.base_model(ids, **types).last_hidden_state
            alone = alone[0, int(mask.sum()) - 1 : -1]
            assert (found[i, : len(completion)] - alone).norm() <= 1e-4 * alone.norm()


def test_types_of_the_rows_of_each_teacher(tmp_path):
    """With one number for each row's ids, and its own."""
    talk = [[{"role": "user", "content": " ".join(tiny.WORDS[i : i + 1 + i % 3])}]
            for i in range(4)]  # fmt: skip
    calls = []

    class Typed(Spy):
        def _tokenize_prompts(self, prompts):
            ids, images, fields = super()._tokenize_prompts(prompts)
            return ids, images, {"token_type_ids": [[i % 2 for i in row] for row in ids]} | fields

        def _sample_completions(self, prompt_ids, images, fields, *rest):
            calls.append((prompt_ids, fields["token_type_ids"]))
            return super()._sample_completions(prompt_ids, images, fields, *rest)

    gpt2 = dict(kind=transformers.GPT2LMHeadModel, config=transformers.GPT2Config)
    trainer = make(
        tmp_path, tiny.model(0, **gpt2),
        data=Dataset.from_dict({"prompt": talk, "teacher_id": ["a", "b", "b", "a"]}),
        several={"a": tiny.model(1, **gpt2), "b": tiny.model(2, **gpt2)}, kind=Typed, lmbda=0.0,
    )  # fmt: skip
    trainer.train()
    assert [len(prompts) for prompts, _ in calls] == [2, 2]
    for prompts, types in calls:
        assert types == [[i % 2 for i in row] for row in prompts]


def test_fields_that_no_row_has_are_not_split():
    assert fields_of_rows({"a": [[1], [2], [3]]}, [2, 0], 3) == {"a": [[3], [1]]}
    for value in ([1, 2], 5):
        with pytest.raises(NotImplementedError, match="^teacher_models: 'b', which processing_cl"):
            fields_of_rows({"b": value}, [2, 0], 3)


def reads(*names):
    """A model whose backbone reads these."""
    forward = eval(f"lambda self, {', '.join(names)}: None")
    backbone = type("Backbone", (), {"forward": forward})()
    return type("Model", (), {"forward": forward, "base_model": backbone})()


def test_fields_that_are_refused():
    """Rather than left out of the loss: generation reads them (Mllama, Idefics, Molmo 2)."""
    pixels = torch.ones(2, 1, 4, 4)
    for name, value in (
        ("cross_attention_mask", torch.ones(2, 3, 1, 1)),
        ("image_attention_mask", [[[1], [1]], [[1], [1]]]),
        ("position_ids", [[1, 2], [1, 2]]),
        ("pixel_rows", torch.ones(3)),
    ):
        fields = {"pixel_values": pixels, name: value, "for_nobody": [1]}
        with pytest.raises(NotImplementedError, match=f"{name!r}, which it makes of the prompts"):
            kept_fields(fields, [[1, 2], [3, 4]], reads("pixel_values", name), ["pixel_values"])


def test_fields_that_are_taken_along():
    fields = {
        "pixel_values": torch.ones(2, 1), "pixel_mask": torch.ones(2, 3),
        "labels": [[1, 2], [3, 4]], "moe_mm_token_type_ids": [[0, 0, 1], [1, 0]], "other": 1,
    }  # fmt: skip
    model = reads("pixel_values", "pixel_mask", "labels", "moe_mm_token_type_ids")
    kept = kept_fields(fields, [[5, 6], [7, 8]], model, ["pixel_values"])
    assert kept.types == {"moe_mm_token_type_ids": [[0, 1], [1, 0]]}
    assert kept.pixels.keys() == {"pixel_mask"}
    batch = {
        "prompt_ids": torch.zeros(2, 4, dtype=torch.long),
        "completion_ids": torch.zeros(2, 1, dtype=torch.long),
        "pixel_values": torch.ones(2, 1), "num_images": [2, 0],
    }  # fmt: skip
    found = kept.tensors(batch, SimpleNamespace(model_type="ernie4_5_vl_moe"))
    assert found["field:moe_mm_token_type_ids"].tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert [len(part) for part in found["field:pixel_mask"]] == [2, 0]


@pytest.mark.parametrize("key", ["num_images", "images_of_row"])
def test_padding_is_no_image(key):
    """... in a batch in TRL's form, and in one of ours; a row's types are of its words, too."""
    fields = {"pixel_values": torch.zeros(2, 1, 3, 4, 4), "token_type_ids": torch.zeros(2, 3)}
    for images, there in (([0, 0], False), ([0, 1], True)):
        batch = fields | {key: torch.tensor(images) if key == "images_of_row" else images}
        assert has_rows(batch, "pixel_values") is there
        assert has_rows(batch, "token_type_ids")
    assert has_rows(fields, "pixel_values") and not has_rows(fields, "image_sizes")


def test_fields_that_grow():
    """Those of a number a token, whatever they are called; a processor may have padded them."""
    prompts = [[1, 2, 3], [4, 5]]
    fields = {
        "token_type_ids": torch.tensor([[0, 1, 0], [0, 0, 1]]),
        "of_tomorrow": [[7, 8, 9], [6, 5]],
        "image_sizes": [[16, 8], [16, 8]],
        "pixel_values": torch.ones(2, 3),
    }
    of_zeros, of_ones = (SimpleNamespace(model_type=kind) for kind in ("gemma3", "paligemma"))
    found = extend_token_fields(fields, prompts, [2, 0], of_zeros)
    assert found["token_type_ids"] == [[0, 1, 0, 0, 0], [0, 1]]
    assert found["of_tomorrow"] == [[7, 8, 9, 0, 0], [6, 5]]
    assert found["image_sizes"] == fields["image_sizes"]
    assert found["pixel_values"] is fields["pixel_values"]
    assert fields["of_tomorrow"] == [[7, 8, 9], [6, 5]]
    found = extend_token_fields(fields, prompts, [2, 0], of_ones)
    assert found["token_type_ids"] == [[0, 1, 0, 1, 1], [0, 1]]
    assert found["of_tomorrow"] == [[7, 8, 9, 0, 0], [6, 5]]


def test_written_tokens_have_the_type_that_generation_gives_them():
    """Of each model that transformers can have write: a type that lets a written token see the ones
    after it would leak the labels into the loss."""
    classes = {
        cls
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        for classes in mapping.values()
        for cls in (classes if isinstance(classes, tuple) else (classes,))
    }
    asked = set()
    for cls in classes:
        for name in TYPE_IDS:
            if name not in inspect.signature(cls.forward).parameters:
                continue
            before = {name: torch.zeros(1, 1, dtype=torch.long)}
            blank = cls.__new__(cls)  # the rule needs no weights
            after = cls._update_model_kwargs_for_generation(blank, {}, before)
            assert written_type(name, cls.config_class) == after[name][0, -1], cls
            asked.add(cls.config_class.model_type)
    assert {"gemma3", "paligemma", "qwen2_vl"} <= asked
