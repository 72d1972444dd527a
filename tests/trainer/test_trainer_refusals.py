"""What the trainer refuses, and how models of two vocabularies or without a teacher get on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import datasets
import tiny
import transformers
from training import make

from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer
from tropd_kernels.trainer.context import check_context
from tropd_kernels.trainer.data_checks import check_prompts, check_unread, known_columns
from tropd_kernels.trainer.student_checks import check_adapters

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_vocabularies_padded_differently(tmp_path):
    """Each side's extra rows are never written, never read, and get no gradient."""
    student, teacher = tiny.model(0, vocab_size=104), tiny.model(1, hidden_size=48, vocab_size=112)
    trainer = make(tmp_path, student, teacher, prefix_schedule="constant", prefix_length=3)
    trainer.train()
    assert all(int(b["completion_ids"].max()) < 104 for b in trainer.batches)
    teacher = tiny.model(1, hidden_size=48, vocab_size=100)
    trainer = make(tmp_path, tiny.model(0, vocab_size=104), teacher)
    extra = trainer.model.lm_head.weight[100:].detach().clone()
    trainer.train()
    assert all(int(b["completion_ids"].max()) < 100 for b in trainer.batches)
    assert torch.equal(trainer.model.lm_head.weight[100:], extra)


def test_another_tokenizer_is_refused(tmp_path):
    teacher = tiny.model(1)
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tiny.tokenizer(("w1", "w0", *tiny.WORDS[2:])).save_pretrained(folder)
    with pytest.raises(ValueError, match="teacher_model: .*'w0' is 5 for the student and 6 for"):
        make(tmp_path, teacher=str(folder))
    tiny.tokenizer().save_pretrained(folder)
    make(tmp_path, teacher=str(folder))


def test_teacher_is_needed(tmp_path):
    args = TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="teacher_model: objective 'tropd' needs a teacher"):
        TrOPDTrainer(tiny.model(0), None, args, train_dataset=tiny.prompts())


def test_sft_goes_without_a_teacher(tmp_path):
    args = TrOPDConfig(
        str(tmp_path), objective="sft", bf16=False, use_cpu=True, report_to="none", max_steps=1,
        per_device_train_batch_size=2, max_completion_length=4, save_strategy="no",
    )  # fmt: skip
    trainer = TrOPDTrainer(
        tiny.model(0), None, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    assert math.isfinite(trainer.train().training_loss)


def test_sft_on_the_teacher_s_text(tmp_path):
    """Without a teacher's model: lmbda 0 and a column, or completions given as ids."""
    settings = dict(
        objective="sft", bf16=False, use_cpu=True, report_to="none", max_steps=1,
        per_device_train_batch_size=2, max_completion_length=4, save_strategy="no",
    )  # fmt: skip
    text = tiny.prompts(8, teacher_completion=[" w1 w2"] * 8)
    ids = tiny.prompts(8, completion_ids=[[6, 7, 2]] * 8)
    for data, more in ((text, {"lmbda": 0.0}), (ids, {"precomputed_teacher": True})):
        args = TrOPDConfig(str(tmp_path), **settings, **more)
        trainer = TrOPDTrainer(tiny.model(0), None, args, data, processing_class=tiny.tokenizer())
        assert math.isfinite(trainer.train().training_loss)
        assert trainer._buffered_inputs[0]["completion_ids"].tolist() == [[6, 7, 2]] * 2
    for guide in ({"lmbda": 0.0}, {"prefix_schedule": "constant", "prefix_length": 2}):
        args = TrOPDConfig(str(tmp_path), **settings, **guide)
        with pytest.raises(ValueError, match="teacher_model: the data set has no column"):
            TrOPDTrainer(
                tiny.model(0), None, args, tiny.prompts(), processing_class=tiny.tokenizer()
            )
    stream = datasets.IterableDataset.from_generator(lambda: iter(tiny.prompts()))
    trainer = TrOPDTrainer(tiny.model(0), None, args, stream, processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="teacher_model: the data set has no column"):
        trainer.train()


def test_float64_on_one_side(tmp_path):
    """bf16 casts both."""
    double = dict(dtype=torch.float64)
    for student, teacher in ((tiny.model(0, **double), None), (None, tiny.model(1, **double))):
        with pytest.raises(TypeError, match="teacher_model: its head is .* float64 on one side"):
            make(tmp_path, student, teacher)
    make(tmp_path, teacher=tiny.model(1, **double), bf16=True).train()
    make(tmp_path, teacher=tiny.model(1, **double), objective="sft").train()


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: the data set is empty"):
        make(tmp_path, data=tiny.prompts(0))
    with pytest.raises(ValueError, match="train_dataset: no column 'prompt'; it has 'text'"):
        make(tmp_path, data=tiny.prompts().rename_column("prompt", "text"))
    talk = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]] * 8
    with pytest.raises(ValueError, match="it has 'messages': take the messages before the answer"):
        make(tmp_path, data=tiny.prompts(messages=talk).remove_columns("prompt"))
    with pytest.raises(ValueError, match="no column 'guide'"):
        make(tmp_path, lmbda=0.5, objective="gkd", prefix_column="guide")
    with pytest.raises(ValueError, match="no column 'guide'"):
        make(tmp_path, prefix_schedule="linear", prefix_length=2, prefix_column="guide")


def test_splits_are_no_data_set(tmp_path):
    """A forgotten split=: two splits would pass for two rows."""
    splits = datasets.DatasetDict(train=tiny.prompts(), test=tiny.prompts())
    words = r"a DatasetDict .* pass dataset\['train'\]; it has splits 'train', 'test'"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, data=splits, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"pass dataset\['a'\]; it has splits 'a'"):
        make(tmp_path, data={"a": tiny.prompts()}, per_device_train_batch_size=1)
    assert "eval_test_loss" in make(tmp_path, evaluate=splits).evaluate()


def test_evaluation_without_training_data(tmp_path):
    args = TrOPDConfig(
        str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_completion_length=4
    )
    trainer = TrOPDTrainer(
        tiny.model(0), tiny.model(1), args, None, tiny.prompts(2), processing_class=tiny.tokenizer()
    )
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(ValueError, match="train_dataset: none was given"):
        trainer.train()


def test_fewer_rows_than_a_step(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: 6 rows are fewer than one .* takes, 8"):
        make(tmp_path, data=tiny.prompts(6), gradient_accumulation_steps=2)


def test_prefix_beyond_the_context(tmp_path):
    """Each row is given as many new tokens as the one with the shortest prefix needs."""
    words = " ".join(tiny.WORDS[:50])
    answers = [" w1 w2", " " + words] * 4
    data = tiny.prompts(8, teacher_completion=answers)
    trainer = make(
        tmp_path, data=data, max_completion_length=58, prefix_schedule="constant", prefix_length=58
    )
    words = (
        r"a prompt of (\d+) tokens, its prefix of (\d+) and (\d+) .* the student's context of 64"
    )
    with pytest.raises(ValueError, match=f"^{words}") as error:
        trainer.train()
    prompt, prefix, rest = map(int, re.match(words, str(error.value)).groups())
    assert prompt <= max(len(text.split()) for text in data["prompt"])
    assert (prefix, rest) == (50, 58 - 2)


def test_prompt_beyond_the_context(tmp_path):
    data = tiny.prompts(7).add_item({"prompt": " ".join(["w7"] * 60)})
    trainer = make(tmp_path, data=data, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="a prompt of 60 tokens .* exceed the student's context"):
        trainer.train()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt: no token in '', .* in the row {'prompt': ''}"),
        (" ", "prompt: no token in ' '"),
        (None, "prompt: expected text or messages, got the row {'prompt': None}"),
    ],
)
@pytest.mark.parametrize("rows", [1, 8])
def test_prompt_without_tokens(tmp_path, prompt, words, rows):
    """One among others would be continued from its padding."""
    data = tiny.Dataset.from_dict({"prompt": ["w1 w2"] * (8 - rows) + [prompt] * rows})
    trainer = make(tmp_path, data=data, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_conversation_without_messages(tmp_path):
    data = tiny.Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}], []] * 4})
    with pytest.raises(ValueError, match="prompt: expected text or messages, got the row"):
        make(tmp_path, data=data).train()


USER = {"role": "user", "content": "w1"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}


@pytest.mark.parametrize(
    "prompt",
    [
        ["w1 w2", "w3"],  # the tokenizer would read a pair of texts, as one
        ["w1", "w2", "w3"],
        [7, 8],
        7,
        True,
        USER,
        (USER,),  # TRL takes no tuple for a conversation
        [USER, "w1"],
        [{"role": "user"}],
        [{"role": None, "content": "w1"}],
        [{"role": "user", "content": None, "tool_calls": None}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["w1"]}],
        [{"role": "user", "content": [{"text": "w1"}]}],
        [{"role": "assistant", "tool_calls": [{"type": "function"}]}],  # TRL reads "content"
    ],
)
def test_prompt_of_a_wrong_kind(prompt):
    with pytest.raises(ValueError, match="prompt: expected text or messages, got the row"):
        check_prompts([{"prompt": prompt}])


def test_prompts_of_every_kind():
    parts = [{"type": "image", "image": None}, {"type": "text", "text": "w1"}]
    for prompt in ("", "w1", [USER], [USER, CALL], [{"role": "user", "content": parts}]):
        check_prompts([{"prompt": prompt}] * 2)


def test_a_prompt_with_its_answer():
    """The student would write a second one behind it."""
    answered = [USER, {"role": "assistant", "content": "w2"}]
    with pytest.warns(UserWarning, match="^prompt: .* the assistant's.* take it out"):
        check_prompts([{"prompt": answered}] * 2)
    with warnings.catch_warnings(action="error"):
        check_prompts([{"prompt": [*answered, USER]}, {"prompt": [USER]}])


@pytest.mark.parametrize(
    "data",
    [
        "a.jsonl",
        Path("a.jsonl"),
        ["w1"] * 8,
        [1] * 8,
        type("Rows", (torch.utils.data.IterableDataset,), {"__iter__": None})(),
        iter([{"prompt": "w1"}]),
        tiny.prompts().to_pandas(),
        lambda: iter([{"prompt": "w1"}]),
    ],
    ids=["name", "path", "texts", "numbers", "torch's", "iterator", "frame", "generator function"],
)
def test_what_is_no_data_set(tmp_path, data):
    """It would fail at the first batch, in words of its own."""
    words = f"^train_dataset: a {type(data).__name__} is no data set of rows: .*load_dataset"
    for settings in ({}, {"chat_template_kwargs": {"padding": False}}):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, data=data, **settings)


def test_text_and_messages_in_one_batch(tmp_path):
    rows = [{"prompt": "w1"}, {"prompt": [USER]}]
    with pytest.raises(ValueError, match="text and messages in one batch, 'w1' and .*'user'"):
        make(tmp_path, data=rows * 4).train()


def test_context_that_is_not_known():
    """XLNet, which has no bound, gives one of -1."""
    config = transformers.XLNetConfig()
    assert config.max_position_embeddings == -1
    check_context([[6, 7]], 4, {"student": config}, tiny.tokenizer())


@pytest.mark.parametrize("credit", [{}, {"kl_discount_factor": 0.5}, {"importance_gamma": 0.5}])
def test_nan_stops_and_saves_the_batch(tmp_path, credit):
    teacher = tiny.model(1)
    trainer = make(tmp_path, teacher=teacher, **credit)
    with torch.no_grad():
        teacher.lm_head.weight[:] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0") as caught:
        trainer.train()
    (path,) = tmp_path.glob("nonfinite_loss_step_0_process_0.pt")
    for words in (str(path), f"begin anew: no checkpoint is in '{tmp_path}'"):
        assert words in str(caught.value)
    saved = torch.load(path)
    assert torch.equal(saved["inputs"]["completion_ids"], trainer.batches[0]["completion_ids"])


class Spoils(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **_):
        trained = [p for p in model.model.parameters() if p.requires_grad]
        trained[-1].data.view(-1)[-1] = math.nan


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_weights_that_diverged(tmp_path, lora, evaluate):
    """The loss of the step that spoils them is finite, and sampling fails before the next. Of an
    adapter's student the head stays as it was."""
    settings = {}
    if lora:
        peft = pytest.importorskip("peft")
        settings["peft"] = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    if evaluate:
        settings |= dict(evaluate=tiny.prompts(2), eval_strategy="steps", eval_steps=1)
    trainer = make(tmp_path, max_steps=3, **settings)
    trainer.add_callback(Spoils)
    with pytest.raises(FloatingPointError, match="the student's weights .* at step 1"):
        trainer.train()
    assert all(map(math.isfinite, trainer.losses))


class SpoilsTheLast(Spoils):
    def on_step_end(self, args, state, control, **keywords):
        if state.global_step == state.max_steps:
            super().on_step_end(args, state, control, **keywords)


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_weights_that_the_last_step_spoilt(tmp_path, strategy):
    """Nothing is sampled after it. A checkpoint of such weights would be named as one to go on
    from, and take the place of the one before."""
    saves = strategy == "steps"
    limits = dict(save_steps=1, save_total_limit=1) if saves else {}
    trainer = make(tmp_path, max_steps=2, save_strategy=strategy, **limits)
    trainer.add_callback(SpoilsTheLast)
    kept = ["checkpoint-1"] if saves else []
    way = f"go on from {tmp_path / kept[0]} by" if kept else "begin anew: no checkpoint is in"
    with pytest.raises(FloatingPointError, match=f"the student's weights .* at step 2.* {way}"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == kept
    assert (tmp_path / "trainer_state.json").is_file()


@pytest.mark.parametrize(
    ("changes", "adapted"),
    [
        ({}, dict(target_modules=["q_proj", "lm_head"])),
        (
            dict(tie_word_embeddings=True),
            dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
        ),
    ],
    ids=["named", "tied to the embeddings"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_adapter_on_the_head_is_refused(tmp_path, changes, adapted, wrapped):
    """In words for any model: TRL's name lm_head, which a user need not have named."""
    peft = pytest.importorskip("peft")
    config, student = peft.LoraConfig(task_type="CAUSAL_LM", **adapted), tiny.model(0, **changes)
    if wrapped:
        student, config = peft.get_peft_model(student, config), None
    words = (
        "^model: an adapter is on its output head, .* target_modules .* ensure_weight_tying .* "
        "modules_to_save"
    )
    with pytest.raises(ValueError, match=words):
        make(tmp_path, student, peft=config)


@pytest.mark.parametrize(
    ("key", "config", "off"),
    [
        ("kasa_config", "KasaConfig", dict(beta=0.0, gamma=0.0)),
        ("monteclora_config", "MontecloraConfig", dict(kl_loss_weight=0.0, use_entropy=False)),
    ],
)
def test_adapter_with_a_loss_of_its_own_is_refused(tmp_path, key, config, off):
    """... which PEFT leaves to the training loop; without one it trains."""
    lora = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(lora, config):
        pytest.skip(f"this peft has no {config}")
    made = getattr(lora, config)
    for options in ({}, off):
        adapter = lora.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, **{key: made(**options)}
        )
        trainer = make(tmp_path, peft=adapter)
        if options:
            trainer.train()
            continue
        with pytest.raises(ValueError, match=f"^peft_config: {key} has a loss of its own"):
            trainer.train()


def test_task_type_of_an_adapter_that_is_not_trained(tmp_path):
    """It may be of a reward model on the same weights."""
    peft = pytest.importorskip("peft")
    adapter = partial(peft.LoraConfig, target_modules=["q_proj"])
    student = peft.get_peft_model(tiny.model(0), adapter(task_type="CAUSAL_LM"))
    student.add_adapter("reward", adapter(task_type="SEQ_CLS"))
    make(tmp_path, student)
    student.set_adapter("reward")
    with pytest.raises(ValueError, match="^peft_config: task_type SEQ_CLS is of another kind"):
        make(tmp_path, student)


def test_an_adapter_that_transformers_added(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    # It asks for a later PEFT than this needs.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **given: None)
    student, classifier = tiny.model(0), tiny.model(0)
    student.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    trainer = make(tmp_path, student, max_steps=1)
    trainer.train()
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    classifier.add_adapter(peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="^peft_config: task_type SEQ_CLS is of another kind"):
        make(tmp_path, classifier)


def test_adapter_whose_budget_nobody_deals_out():
    """AdaMSS, whose subspaces PEFT's callback deals out between steps (scikit-learn makes them)."""
    callbacks = pytest.importorskip("peft.tuners.adamss.asa_callback")

    class Own(callbacks.AdamssAsaCallback):
        pass

    def check(use_asa, *given):
        adapter = SimpleNamespace(use_asa=use_asa)
        check_adapters(SimpleNamespace(peft_config={"a": adapter}, active_adapters=["a"]), given)

    check(False)
    check(True, transformers.PrinterCallback(), Own())
    for given in ((), (transformers.PrinterCallback(),)):
        with pytest.raises(ValueError, match="^peft_config: use_asa has no effect without"):
            check(True, *given)


def test_saved_config_reads_back(tmp_path):
    """`to_dict` of a config makes the same one again: no default turns into a given value."""
    args = TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    again = dataclasses.replace(args)
    assert again.beta is None and again.rule() == args.rule()
    json.dumps(args.to_dict())


@pytest.mark.parametrize("which", ["model", "teacher_model"])
def test_models_sharded_by_tensor_parallelism_are_refused(tmp_path, group, which):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    models = {"model": tiny.model(0), "teacher_model": tiny.model(1)}
    head = models[which].lm_head
    weight = distribute_tensor(head.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)])
    head.weight = torch.nn.Parameter(weight)
    with pytest.raises(NotImplementedError, match=f"^{which}: its lm_head.weight is a DTensor"):
        make(tmp_path, *models.values())


def test_columns_as_far_as_they_are_known():
    """A transform may make any of them; another library's `format` says nothing."""
    data = tiny.prompts()
    assert known_columns(data.with_format("torch")) == ["prompt"] == known_columns(data)
    assert known_columns(data.with_transform(lambda rows: {"text": rows["prompt"]})) is None
    other = type("Rows", (), {"column_names": ["prompt"], "format": lambda self: "csv"})
    assert known_columns(other()) == ["prompt"]
    assert known_columns([{"prompt": "w1"}]) is None


@pytest.mark.parametrize(
    "column", ["chat_template_kwargs", "tools", "completion_mask", "tool_mask", "old_log_probs"]
)
def test_columns_that_nothing_reads(tmp_path, column):
    """Their names are read elsewhere: each is refused where it would have to change something."""
    words = f"train_dataset: the column {column!r} would not be read: "
    data = tiny.prompts().add_column(column, [[1.0]] * len(tiny.prompts()))
    if column in ("chat_template_kwargs", "tools"):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, data=data)
    else:
        make(tmp_path, data=data)  # completions that are generated have masks of their own
    for name in ("completion_ids", "teacher_label_log_probs"):
        data = data.add_column(name, [[5]] * len(data))
    with pytest.raises(ValueError, match=words):
        make(tmp_path, data=data, objective="opd", precomputed_teacher=True)


def test_a_column_of_tools_that_may_be_read():
    """Tools of the trainer hold for all rows, and reward functions get the column."""
    data, args = datasets.Dataset.from_dict({"tools": [[]]}), TrOPDConfig(use_cpu=True, bf16=False)
    for given in (dict(tools=[print]), dict(rewarded=True)):
        check_unread({"train_dataset": data}, args, **given)
    with pytest.raises(ValueError, match=r"^eval_dataset\['a'\]: the column 'tools' would not"):
        check_unread({"eval_dataset": {"a": data}}, args)
