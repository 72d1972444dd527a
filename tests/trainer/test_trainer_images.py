"""Rows with images: prefixes, completions and hidden states are those of each row alone."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version

pytest.importorskip("trl", reason="the trainer needs trl")
pytest.importorskip("PIL", reason="images need pillow")

import tiny
import vision
from engines import on_two_processes
from served import serve
from training import SGD, Spy
from training import make as text_trainer
from trl.data_utils import prepare_multimodal_messages

from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.generation_keys import check_prefill
from tropd_kernels.trainer.prefix import row_images

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LIMIT, PREFIX = 8, 4
TYPE_IDS = ("token_type_ids", "mm_token_type_ids")


class Hidden(Spy):
    """Keeps both sides' hidden states."""

    def distill(self, student, teacher, inputs, normalizer):
        self.__dict__.setdefault("hidden", []).append((student.hidden.detach(), teacher.hidden))
        return super().distill(student, teacher, inputs, normalizer)


def make(folder, kind, data, peft=None, **settings):
    defaults = dict(
        max_steps=1, per_device_train_batch_size=8, max_completion_length=LIMIT, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=5, objective="gkd",
        generation_kwargs={"do_sample": False}, **SGD | {"learning_rate": 0.0},
    )  # fmt: skip
    args = TrOPDConfig(str(folder), **(defaults | settings))
    student, teacher = (vision.model(kind, seed) for seed in (0, 1))
    processor = vision.processor(kind)
    return Hidden(student, teacher, args, data, processing_class=processor, peft_config=peft)


def by_hand(processor, row) -> dict[str, torch.Tensor]:
    """What a model gets of this row's prompt alone."""
    messages = prepare_multimodal_messages(row["prompt"], images=row_images(row))
    made = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    return {name: value for name, value in made.items() if name not in ("attention_mask", "labels")}


def followed(kind, fields, ids):
    """... and once these ids, which a model wrote, follow it."""
    more = torch.tensor([ids], dtype=torch.long)
    grown = {"input_ids": torch.cat([fields["input_ids"], more], 1)}
    written = vision.WRITTEN.get(kind, {})
    grown |= {
        name: torch.cat([fields[name], torch.full_like(more, written.get(name, 0))], 1)
        for name in TYPE_IDS
        if name in fields
    }
    return fields | grown


@torch.no_grad()
def hidden_states(model, fields):
    return model.base_model(**fields, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def greedily(model, kind, fields, ids):
    """Continues these ids to an end or the limit, without a cache."""
    ids = list(ids)
    while len(ids) < LIMIT and ids[-1:] not in ([2], [3]):
        logits = model(**followed(kind, fields, ids), use_cache=False).logits[0, -1]
        logits[vision.IDS[vision.IMAGE]] = -torch.inf  # as TRL has it suppressed
        ids.append(int(logits.argmax()))
    return ids


def rows_of(trainer, data, batch=None):
    """Each completion of the batch with its row of the data set, found by its prompt's words."""
    rows = {tuple(by_hand(trainer.processing_class, row)["input_ids"][0].tolist()): row
            for row in data}  # fmt: skip
    if batch is None:
        (batch,) = trainer.batches
    for i, (ids, mask) in enumerate(zip(batch["prompt_ids"], batch["prompt_mask"])):
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        yield i, rows[tuple(ids[mask.bool()].tolist())], completion


def compare_hidden(trainer, kind, fields, completion, found, student=None):
    """Both sides' hidden states of a row (C, H) with those of the row alone."""
    models = student or trainer.model, trainer.teacher_model
    for model, hidden in zip(models, found, strict=True):
        start = fields["input_ids"].shape[1] - 1
        alone = hidden_states(model, followed(kind, fields, completion))[start:-1]
        # float32; a token out of place differs by a percent and more.
        error = (hidden[: len(completion)] - alone).norm()
        assert error <= 1e-4 * alone.norm()


#: Images of each row: two, one and none, or one and none; and as many as there are rows.
ROWS = {
    "images": [[0, 5], [], [2], []], "image": [[0], [], [2], [3]],
    "as many": [[0, 5], [], [2], [4]],
}  # fmt: skip


def some_images(which):
    for i, of_row in enumerate(ROWS[which]):
        images = [vision.image(number) for number in of_row]
        given = {"image": (images or [None])[0]} if which == "image" else {"images": images}
        yield given | {"prompt": [{"role": "user", "content": " ".join(tiny.WORDS[i : 2 * i + 1])}]}


# PaliGemma's processor takes only prompts of one length, and an image in each.
@pytest.mark.parametrize(
    ("which", "size"), [("images", 4), ("images", 1), ("image", 2), ("as many", 2)]
)
@pytest.mark.parametrize("kind", sorted(vision.KINDS.keys() - {"paligemma"}))
def test_rows_without_an_image_among_others(tmp_path, kind, which, size):
    """... also where a micro-batch has none at all."""
    data = list(some_images(which))
    sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
    trainer = make(tmp_path, kind, data, **sizes)
    trainer.train()
    assert len(trainer.batches) == 4 // size
    for batch, hidden in zip(trainer.batches, trainer.hidden, strict=True):
        for i, row, completion in rows_of(trainer, data, batch):
            fields = by_hand(trainer.processing_class, row)
            assert completion == greedily(trainer.model, kind, fields, [])
            compare_hidden(trainer, kind, fields, completion, [of[i] for of in hidden])


@pytest.mark.parametrize("settings", [{"prefix_schedule": "constant", "prefix_length": PREFIX},
                                      {"lmbda": 0.0}], ids=["prefix", "answer"])  # fmt: skip
@pytest.mark.parametrize("kind", ["idefics3", "qwen2_vl"])
def test_rows_without_an_image_behind_a_teacher_s_text(tmp_path, kind, settings):
    """... of a student with an adapter, and in an evaluation."""
    peft = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj", "v_proj"])
    data, sizes = list(some_images("images")), dict(gradient_accumulation_steps=4)
    trainer = make(tmp_path, kind, data, peft, per_device_train_batch_size=1, **sizes, **settings)
    trainer.train()
    trainer.evaluate(data)
    trainer.evaluate(data[1::2])
    student = trainer.model.get_base_model()  # which an adapter at its start is
    seen = zip((batch for batch, _ in trainer.seen), trainer.hidden, strict=True)
    rows = 0
    for batch, hidden in seen:
        for i, row, completion in rows_of(trainer, data, batch):
            fields = by_hand(trainer.processing_class, row)
            length = int(batch["prefix_lengths"][i])
            assert completion[:length] == greedily(trainer.teacher_model, kind, fields, [])[:length]
            assert completion == greedily(student, kind, fields, completion[:length])
            compare_hidden(
                trainer, kind, fields, completion, [of[i] for of in hidden], student=student
            )
            rows += 1
    assert rows == 4 + 4 + 2


_MIXED = """
import sys, torch
from engines import use
settings = use(sys.argv[2])
from test_trainer_images import make, some_images
data = list(some_images("image"))[:2]  # one row with an image, and one without
trainer = make(
    sys.argv[1], "qwen2_vl", data, per_device_train_batch_size=1, **settings,
    **({} if sys.argv[2] == "ddp" else {"use_cpu": False}),
)
said = ""
try:
    trainer.train()
except ValueError as error:
    said = str(error)
torch.save(said, f"{sys.argv[1]}/{trainer.accelerator.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_images_on_one_process_alone(tmp_path, engine):
    """Sharded layers that read them would wait for those of a process that has none: it is said
    before that, on both."""
    said = on_two_processes(_MIXED, tmp_path, engine)
    for words in said:
        assert words.startswith("images: some processes have") == (engine == "fsdp2"), words


@pytest.mark.parametrize("writer", ["column", "teacher"])
@pytest.mark.parametrize("kind", vision.KINDS)
def test_a_prefix_of_rows_with_images(tmp_path, kind, writer):
    """The student goes on from it as it would from that row alone, and the loss is on that.

    Prefixes of several lengths behind prompts of several lengths, and complete behind the longest:
    a per-token field that does not grow with them is out of place, or too short.
    """
    answers = [" ".join(tiny.WORDS[50 + i :][: (5, 4, 2, 1)[i % 4]]) for i in range(8)]
    columns = {"teacher_completion": answers} if writer == "column" else {}
    data = vision.prompts(8, kind, **columns)
    trainer = make(tmp_path, kind, data, prefix_schedule="constant", prefix_length=PREFIX)
    trainer.train()
    models = trainer.model, trainer.teacher_model
    lengths, gone_on = set(), 0
    for i, row, completion in rows_of(trainer, data):
        fields = by_hand(trainer.processing_class, row)
        length = int(trainer.batches[0]["prefix_lengths"][i])
        if writer == "column":
            answer = [*trainer._tokenizer(row["teacher_completion"])["input_ids"], 3]
            assert completion[:length] == answer[:PREFIX]
        else:
            assert completion[:length] == greedily(models[1], kind, fields, [])[:PREFIX]
        assert completion == greedily(models[0], kind, fields, completion[:length])
        lengths.add(length)
        gone_on += len(completion) > length
        compare_hidden(trainer, kind, fields, completion, [of[i] for of in trainer.hidden[0]])
    assert gone_on >= 3
    assert writer == "teacher" or lengths == {2, 3, 4}


@pytest.mark.parametrize("talk", [False, True])
@pytest.mark.parametrize("kind", ["deepseek_vl", "qwen2_vl"])
def test_prompts_without_images_beside_a_processor(tmp_path, caplog, kind, talk):
    """Also of one that returns tensors unless it is told not to; and nothing is said of it."""
    prompts, answers = ["w1 w2 w3", "w4"], [" w5 w6", " w7"]
    if talk:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    data = tiny.Dataset.from_dict({"prompt": prompts, "teacher_completion": answers})
    settings = dict(per_device_train_batch_size=2, lmbda=0.0, generation_kwargs=None)
    trainer = make(tmp_path, kind, data, **settings)
    trainer.train()
    (batch,) = trainer.batches
    kept = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    end = 3 if talk else 2
    assert sorted(ids[mask].tolist() for ids, mask in kept) == [[10, 11, end], [12, end]]
    said = [{"role": "assistant", "content": answers[0]}] if talk else answers[0]
    whole = trainer._tokenize(prompts[0] + said, {"prompt": prompts[0]})
    assert {type(token) for token in whole} == {int}
    assert "processor_kwargs" not in caplog.text


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_a_processor_that_pads_on_the_right(tmp_path, kind):
    """As a recipe of SFT leaves it. Per-token fields are in the prompts' places none the less."""
    data = vision.prompts(8, kind)
    trainer = make(tmp_path, kind, data, prefix_schedule="constant", prefix_length=PREFIX)
    trainer.processing_class.tokenizer.padding_side = "right"
    trainer.train()
    for i, row, completion in rows_of(trainer, data):
        fields = by_hand(trainer.processing_class, row)
        compare_hidden(trainer, kind, fields, completion, [of[i] for of in trainer.hidden[0]])
    assert trainer.processing_class.tokenizer.padding_side == "right"


def test_an_answer_in_parts(tmp_path):
    """As messages, and the prompt's image among its parts: nothing is left to prepare."""
    talk = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"w{i} w1"}]}]
        for i in range(8)
    ]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "w5 w6"}]}]
    data = vision.prompts(8, teacher_completion=[answer] * 8).remove_columns("prompt")
    data = data.add_column("prompt", talk)
    trainer = make(tmp_path, "gemma3", data, lmbda=0.0, generation_kwargs=None)
    trainer.train()
    assert all(completion == [10, 11, 3] for *_, completion in rows_of(trainer, data))


@pytest.mark.parametrize("column", ["prompt", "teacher_completion"])
@pytest.mark.parametrize(
    ("kind", "token"),
    [("gemma3", vision.IMAGE), ("gemma3", vision.BEGIN), ("llava_next", vision.IMAGE),
     ("qwen2_vl", vision.IMAGE), ("qwen2_vl", vision.VIDEO)],
)  # fmt: skip
def test_a_placeholder_among_the_words(tmp_path, kind, token, column):
    """The processor or the model would look for one more image, and fail without naming the row."""
    word = f"w9 {token} w11"
    given = {"prompt": vision.prompts(8, kind)["prompt"][:], "teacher_completion": ["w5 w6"] * 8}
    given[column][1] = word if column != "prompt" else [{"role": "user", "content": word}]
    words = re.escape(f"{column}: '{token}' in '{word}' is a placeholder of the processor, and no")
    prefixes = dict(prefix_schedule="constant", prefix_length=PREFIX)
    with pytest.raises(ValueError, match=f"^{words}"):
        make(tmp_path, kind, vision.prompts(8, **given), **prefixes).train()


IN_A_COLUMN = {"prompt": [{"role": "user", "content": "w1"}], "image": vision.image(1)}
IN_A_MESSAGE = {
    "prompt": [{"role": "user", "content": [{"type": "image", "image": vision.image(1)}]}]
}


@pytest.mark.parametrize("settings", [{"objective": "opd"}, {"objective": "sft", "lmbda": 0.0}])
@pytest.mark.parametrize("row", [IN_A_COLUMN, IN_A_MESSAGE], ids=["column", "message"])
def test_a_served_teacher_is_not_sent_images(tmp_path, row, settings):
    """It would score, or write, without having seen them."""
    with serve(tiny.model(1, vocab_size=128), tiny.tokenizer()) as served:
        args = TrOPDConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_completion_length=4,
            bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            teacher_model_server_url=served.url, teacher_server_retries=0, **settings,
        )  # fmt: skip
        student, processor = vision.model("gemma3", 0), vision.processor("gemma3")
        trainer = Spy(student, None, args, [row] * 4, processing_class=processor)
        at_construction = len(served.requests)
        with pytest.raises(NotImplementedError, match="images are not sent to a teacher's server"):
            trainer.train()
        assert len(served.requests) == at_construction


def test_a_processor_that_pads_by_default(tmp_path, monkeypatch):
    """As Gemma 4's: its padding is no part of a prompt."""
    from transformers.models.gemma3.processing_gemma3 import Gemma3ProcessorKwargs

    runs = []
    for pads in (False, True):
        defaults = {**Gemma3ProcessorKwargs._defaults, "text_kwargs": {"padding": pads}}
        monkeypatch.setattr(Gemma3ProcessorKwargs, "_defaults", defaults)
        trainer = make(tmp_path, "gemma3", vision.prompts())
        trainer.train()
        (batch,) = trainer.batches
        assert len(set(batch["prompt_mask"].sum(1).tolist())) > 1
        runs.append([batch[f"{part}_{what}"] for part in ("prompt", "completion")
                     for what in ("ids", "mask")])  # fmt: skip
    for plain, padded in zip(*runs, strict=True):
        assert torch.equal(plain, padded)


@pytest.mark.parametrize("own", [[7], None])
def test_the_token_of_images_stays_suppressed(tmp_path, own):
    """Beside a list of the user's: a written one would have no pixels."""
    given = {"suppress_tokens": own, "do_sample": False}
    trainer = make(tmp_path, "gemma3", vision.prompts(), generation_kwargs=given)
    image = trainer.model.config.image_token_id
    assert trainer.generation_config.suppress_tokens == [*(own or ()), image]


TALK = [{"role": "user", "content": "w1 w2 w3"}]


@pytest.mark.parametrize(
    "column", ["video", "videos", "audio", "audios", "pixel_values", "image_grid_thw"]
)
def test_columns_of_other_modalities(tmp_path, column):
    """TRL would drop them, and train on the text alone."""
    rows = [{"prompt": TALK, column: [1.0]}] * 8
    words = f"^train_dataset: the column '{column}' would not be read: .*images"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, "qwen2_vl", tiny.Dataset.from_list(rows))
    # Of a list, a value that is there.
    trainer = make(tmp_path, "qwen2_vl", rows, remove_unused_columns=False)
    with pytest.raises(ValueError, match=f"^{column}: it would not be read: a prompt goes with im"):
        trainer.train()
    make(tmp_path, "qwen2_vl", [{"prompt": TALK, column: None}] * 8)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"}, {"type": "audio", "audio": "a.wav"},
        {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "url": "a.png"},
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_are_no_images(tmp_path, part):
    """TRL reads images of one form."""
    talk = [{"role": "user", "content": [part, {"type": "text", "text": "w1"}]}]
    trainer = make(tmp_path, "qwen2_vl", [{"prompt": talk}] * 8)
    words = f"^prompt: a part of type '{part['type']}' would not be read: .*'image': image"
    with pytest.raises(ValueError, match=words):
        trainer.train()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK, "image": None},
        {"prompt": TALK, "images": []},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
    ],
)
def test_images_beside_a_model_of_text(tmp_path, row):
    """Of a column without an image TRL would still write each message as a list of parts, which a
    template for text prints as Python does."""
    trainer = text_trainer(tmp_path, data=[row] * 8)
    with pytest.raises(ValueError, match="^prompt: its (images|videos) would not be read: the pro"):
        trainer.train()


@pytest.mark.parametrize("column", ["video", "videos", "audio", "audios", "pixel_values"])
def test_columns_of_other_modalities_beside_a_model_of_text(tmp_path, column):
    rows = [{"prompt": TALK, column: [1.0]}] * 8
    words = f"^train_dataset: the column '{column}' would not be read: .* tokenizer"
    with pytest.raises(ValueError, match=words):
        text_trainer(tmp_path, data=tiny.Dataset.from_list(rows))
    trainer = text_trainer(tmp_path, data=rows, remove_unused_columns=False)
    with pytest.raises(ValueError, match=f"^{column}: it would not be read: .* tokenizer"):
        trainer.train()


def test_images_beside_a_teacher_of_text(tmp_path):
    """Its forward would take any keyword, and read the images' tokens as words."""
    args = TrOPDConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_completion_length=4,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    student, teacher = vision.model("qwen2_vl", 0), tiny.model(1, vocab_size=vision.VOCAB)
    processor = vision.processor("qwen2_vl")
    trainer = Hidden(student, teacher, args, vision.prompts(4), processing_class=processor)
    with pytest.raises(NotImplementedError, match="^images: a LlamaForCausalLM does not see them"):
        trainer.train()
    text = vision.prompts(4).remove_columns("image")
    Hidden(student, teacher, args, text, processing_class=processor).train()


def test_two_columns_of_images(tmp_path):
    """TRL reads the one that the first row has."""
    one, other = {"images": [vision.image(2)]}, {"image": vision.image(3)}
    both = tiny.Dataset.from_list([{"prompt": TALK, "images": ["a"], "image": "b"}] * 8)
    with pytest.raises(ValueError, match="^train_dataset: the column 'image' would not be read be"):
        make(tmp_path, "qwen2_vl", both)
    for first, second, name in ((one, other, "image"), (other, one, "images"),
                                (one, one | other, "image"), ({}, other, "image")):  # fmt: skip
        rows = [{"prompt": TALK} | images for images in (first, second)] * 4
        trainer = make(tmp_path, "qwen2_vl", rows, shuffle_dataset=False)
        with pytest.raises(ValueError, match=f"^{name}: it would not be read"):
            trainer.train()


@pytest.mark.parametrize("kind", ["gemma3", "paligemma", "llava_next", "qwen2_vl"])
def test_prompts_read_in_chunks(tmp_path, monkeypatch, kind):
    """Refused where a token attends to later ones; the others write what they would at once."""
    data = list(vision.prompts(8, kind))
    greedy = {"do_sample": False}
    if kind in ("gemma3", "paligemma"):
        with pytest.raises(
            ValueError, match=f"^generation_kwargs: 'prefill_chunk_size': .* {kind}"
        ):
            make(tmp_path, kind, data, generation_kwargs=greedy | {"prefill_chunk_size": 3})
        return
    with monkeypatch.context() as earlier:
        earlier.setattr(f"{check_prefill.__module__}.transformers.__version__", "5.22.2")
        with pytest.raises(ValueError, match="'prefill_chunk_size': transformers 5.22.2 loses"):
            make(tmp_path, kind, data, generation_kwargs=greedy | {"prefill_chunk_size": 3})
    if Version(transformers.__version__) < Version("5.23.0"):
        return
    chunks = make(tmp_path, kind, data, generation_kwargs=greedy | {"prefill_chunk_size": 3})
    chunks.train()
    whole = make(tmp_path, kind, data, generation_kwargs=greedy)
    whole.train()
    assert torch.equal(chunks.batches[0]["completion_ids"], whole.batches[0]["completion_ids"])


@pytest.mark.skipif(not hasattr(transformers, "HrmTextConfig"), reason="transformers has no HRM")
def test_which_models_attend_to_later_tokens():
    def check(config, sees_images):
        args = SimpleNamespace(generation_kwargs={"prefill_chunk_size": 3}, use_vllm=False)
        check_prefill(args, config, sees_images)

    both = transformers.Gemma4TextConfig(use_bidirectional_attention="vision")
    for config, sees_images in (
        (transformers.Gemma3Config(), True),
        (transformers.Gemma4Config(text_config=both), True),
        (transformers.HrmTextConfig(), False),
    ):
        with pytest.raises(ValueError, match=f"'prefill_chunk_size': .* {config.model_type} "):
            check(config, sees_images)
    check(transformers.Gemma3Config(), False)  # prompts of text
    check(transformers.Gemma3TextConfig(), False)
    check(transformers.Gemma4Config(text_config=transformers.Gemma4TextConfig()), True)
    check(transformers.HrmTextConfig(prefix_lm=False), False)
