"""Tokenizers that differ in special tokens alone: `special_token_map`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make, resume_and_compare, step_and_compare, unloadable

from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.special_tokens import compare_tokenizers, full_table

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: The teacher's `tiny.SPECIAL`: an end of its own, and the student's <|end|> at another id.
SPECIAL = ("<pad>", "<|start|>", "<|end|>", "<eot>", "<unk>")
MAP = {"<s>": "<|start|>", "</s>": "<eot>", "<|end|>": "<|end|>"}
TABLE = torch.tensor([0, 1, 3, 2, *range(4, tiny.VOCAB)])
TALK = [[{"role": "user", "content": text}] for text in tiny.prompts()["prompt"]]


def tokenizer(special=SPECIAL, words=tiny.WORDS, eos="<eot>", bos=None, pad="<pad>"):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate((*special, *words))}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    known = dict(pad_token=pad, eos_token=eos, unk_token="<unk>", bos_token=bos)
    return type(tiny.tokenizer())(
        tokenizer_object=backend, additional_special_tokens=list(special), **known
    )


def teacher(**options):
    made = tiny.model(1, **(dict(hidden_size=48) | options))
    made.generation_config.eos_token_id = [3]
    return made


def saved(folder, model, words=None) -> str:
    model.save_pretrained(folder)
    (tokenizer() if words is None else words).save_pretrained(folder)
    return str(folder)


def in_the_student_s_ids(model):
    """The same teacher with its embedding and its head in the order of the student's ids."""
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(layer.weight[TABLE].clone())
    return model


@pytest.mark.parametrize(
    "settings",
    [
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
        dict(objective="reverse_kl"),
        dict(prefix_schedule="constant", prefix_length=3, objective_kwargs={"top_k": 4}),
    ],
)
def test_step_is_the_loop_by_hand(tmp_path, settings):
    """Ends and turns in prompts and completions, and their columns in the loss."""
    name = saved(tmp_path / "teacher", teacher())
    data = tiny.Dataset.from_dict({"prompt": TALK})
    trainer = make(tmp_path, teacher=name, data=data, special_token_map=MAP, **settings)
    step_and_compare(trainer, in_the_student_s_ids(teacher()))
    ids = torch.cat([b["prompt_ids"].flatten() for b in trainer.batches])
    assert (ids == 3).any()


def ending():
    """A teacher that writes without doubt, and often the special ids 2 and 3."""
    model = teacher(spread=300.0)
    with torch.no_grad():
        model.lm_head.weight[2:4] *= 3
    return model


def test_the_teacher_writes_in_the_student_s_ids(tmp_path):
    """... also the end, which has another id for each: a text ends there, and not at <|end|>."""
    student = tiny.model(0)
    student.generation_config.eos_token_id = [2]
    name = saved(tmp_path / "teacher", ending())
    trainer = make(tmp_path, student, name, special_token_map=MAP, objective="reverse_kl",
                   lmbda=0.0, max_completion_length=20, max_steps=2)  # fmt: skip
    trainer.train()
    writer, hits, texts = in_the_student_s_ids(ending()), [], []
    for batch in trainer.batches:
        for i in range(4):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            written = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
            with torch.no_grad():
                logits = writer(torch.cat([prompt, written])[None]).logits[0, len(prompt) - 1 : -1]
            hits.append((logits.argmax(-1) == written).float())
            texts.append(written.tolist())
    assert torch.cat(hits).mean() > 0.9
    assert any(text[-1] == 2 for text in texts) and not any(2 in text[:-1] for text in texts)
    assert any(3 in text[:-1] for text in texts)


@pytest.mark.parametrize(
    ("keys", "known"),
    [
        ({"suppress_tokens": [3]}, {"suppress_tokens": [3]}),
        ({"begin_suppress_tokens": [3, 100]}, {"begin_suppress_tokens": [3]}),
        ({"bad_words_ids": [[3], [4, 100]]}, {"bad_words_ids": [[3]]}),
        ({"sequence_bias": [[[3], -1e9], [[100], 5.0]]}, {"sequence_bias": [[[3], -1e9]]}),
        ({"bad_words_ids": [[100]]}, {}),
    ],
)
def test_ids_of_generation_kwargs_are_the_student_s(tmp_path, keys, known):
    """The student's 3 is the teacher's 2, which it would write often; 100 it does not have, with a
    map or without."""
    texts = []
    for given, mapped in ((keys, True), (keys, False), (known, False)):
        student, writer, settings = tiny.model(0, vocab_size=104), ending(), {}
        student.generation_config.eos_token_id = [2]
        if mapped:
            writer, settings = saved(tmp_path / "teacher", writer), dict(special_token_map=MAP)
        else:
            in_the_student_s_ids(writer).generation_config.eos_token_id = [2]
        trainer = make(tmp_path, student, writer, objective="reverse_kl", lmbda=0.0, max_steps=2,
                       max_completion_length=20, generation_kwargs=given, **settings)  # fmt: skip
        trainer.train()
        texts.append([b["completion_ids"].masked_fill(b["completion_mask"] == 0, 0).tolist()
                      for b in trainer.batches])  # fmt: skip
    assert texts[0] == texts[1] == texts[2]
    first = [row[0] for batch in texts[0] for row in batch]
    later = [i for batch in texts[0] for row in batch for i in row[1:]]
    assert (3 in first) == (not known)
    assert (3 in later) == (not known or "begin_suppress_tokens" in known)


def test_of_several_teachers_each_has_its_own(tmp_path):
    """The one with the student's tokenizer is read in the student's ids."""
    same = tiny.model(2)
    same.save_pretrained(tmp_path / "same")
    tiny.tokenizer().save_pretrained(tmp_path / "same")
    names = {"a": saved(tmp_path / "other", teacher()), "b": str(tmp_path / "same")}
    data = tiny.prompts(teacher_id=["a", "b"] * 4)
    trainer = make(tmp_path, data=data, several=names, special_token_map=MAP)
    step_and_compare(trainer, [in_the_student_s_ids(teacher()), same])


def test_resume(tmp_path):
    name = saved(tmp_path / "teacher", teacher())
    resume_and_compare(tmp_path, 2, max_steps=3, teacher=name, special_token_map=MAP)


def test_refused_without_it_with_the_line_to_write(tmp_path):
    name = saved(tmp_path / "teacher", teacher())
    with pytest.raises(ValueError) as error:
        make(tmp_path, teacher=name)
    assert str(error.value).startswith("teacher_model: its tokenizer is not the student's, but")
    line = str(error.value).split("Write special_token_map=")[1].split(", and see")[0]
    assert eval(line) == MAP
    make(tmp_path, teacher=name, special_token_map=eval(line))


def test_the_line_for_r1_distill_and_qwen2_5():
    """Their special tokens from id 151643 on, here from 0: an end for the end, what is left by id
    and in order."""
    r1 = (
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜begin▁of▁sentence｜>",
        "<unk>",
    )
    qwen = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<unk>")
    ours = tokenizer(r1, eos=r1[0], bos=r1[3], pad=r1[0])
    theirs = tokenizer(qwen, eos=qwen[2], pad=qwen[0])
    with pytest.raises(ValueError) as error:
        compare_tokenizers(ours, theirs, None)
    line = str(error.value).split("Write special_token_map=")[1].split(", and see")[0]
    assert eval(line) == {r1[0]: qwen[2], r1[1]: qwen[1], r1[2]: qwen[0], r1[3]: qwen[3]}
    assert compare_tokenizers(ours, theirs, eval(line)) == {0: 2, 2: 0}


def test_table_by_hand():
    assert compare_tokenizers(tiny.tokenizer(), tokenizer(), MAP) == {2: 3, 3: 2}
    assert full_table({2: 3, 3: 2}, 6, 8, "cpu").tolist() == [0, 1, 3, 2, 4, 5]
    assert full_table({2: 5}, 7, 8, "cpu").tolist() == [0, 1, 5, 3, 4, 2, 6]  # 5: of padding
    assert full_table({2: 7}, 6, 8, "cpu").tolist() == [0, 1, 7, 3, 4, 5]
    assert full_table({}, 6, 8, "cpu") is None
    with pytest.raises(ValueError, match="leads to id 9, and the teacher's head has .* below 8"):
        full_table({2: 9}, 6, 8, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"<nobody>": "<eot>"}, "the student has no token '<nobody>'"),
        ({"</s>": "<nobody>"}, "the teacher has no token '<nobody>'"),
        ({"</s>": "<|end|>"}, "'</s>' and '<|end|>' would both be the teacher's id 2"),
        ({"</s>": "w7"}, "'</s>' and 'w7' would both be the teacher's id 12"),
        ({"<s>": None}, r"'<s>' is not in it, .* Write special_token_map=\{'<s>': '<\|start\|>'"),
    ],
)
def test_maps_that_do_not_fit(changes, words):
    given = {mine: yours for mine, yours in (MAP | changes).items() if yours is not None}
    with pytest.raises(ValueError, match=f"^special_token_map: {words}"):
        compare_tokenizers(tiny.tokenizer(), tokenizer(), given)


def test_other_words_are_another_family():
    theirs = tokenizer(words=("w1", "w0", *tiny.WORDS[2:]))
    with pytest.raises(ValueError, match="^teacher_model: its tokenizer is not .* of one family$"):
        compare_tokenizers(tiny.tokenizer(), theirs, None)
    with pytest.raises(
        ValueError, match="^special_token_map: 'w0' is not in it, .* No map of spec"
    ):
        compare_tokenizers(tiny.tokenizer(), theirs, MAP)


@pytest.mark.parametrize("given", [{}, {"a": 1}, "a", '["a"]'])
def test_bad_maps(tmp_path, given):
    with pytest.raises(ValueError, match="^special_token_map: expected a mapping of the student's"):
        TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, special_token_map=given)


def test_without_effect(tmp_path):
    tiny.model(1).save_pretrained(tmp_path / "same")
    tiny.tokenizer().save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="^special_token_map: it would have no effect: the tok"):
        make(tmp_path, teacher=str(tmp_path / "same"), special_token_map=MAP)
    several = dict.fromkeys("ab", str(tmp_path / "same"))
    with pytest.raises(ValueError, match="^special_token_map: it would have no effect: the tok"):
        make(tmp_path, data=tiny.prompts(teacher_id=["a", "b"] * 4), several=several,
             special_token_map={"nobody": "neither"})  # fmt: skip
    with pytest.raises(ValueError, match="^special_token_map: the teacher's tokenizer is not fou"):
        make(tmp_path, teacher=tiny.model(1), special_token_map=MAP)
    name = unloadable(tmp_path)
    told = tiny.prompts(teacher_prompt=["w1"] * 8)
    with pytest.raises(ValueError, match="^special_token_map: it would have no effect: .* itself"):
        make(tmp_path, name, "self", told, special_token_map=MAP)
    served = dict(teacher_model_server_url="http://127.0.0.1:1", objective="opd")
    for without in (served, dict(precomputed_teacher=True, objective="opd")):
        with pytest.raises(ValueError, match="^special_token_map: .* with .* no teacher is loaded"):
            make(tmp_path, name, special_token_map=MAP, **without)
