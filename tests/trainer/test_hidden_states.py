"""A remote teacher that sends hidden states: every objective, by the head of its checkpoint."""

from __future__ import annotations

import base64
import contextlib
import json
import warnings

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import served
import served_states
import tiny
import torch
import urllib3
from safetensors.torch import load_file, save_file
from training import make, step_and_compare, unloadable
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tropd_kernels.heads import read_head
from tropd_kernels.trainer import TeacherServer, TeacherServerError, TrOPDConfig, server
from tropd_kernels.trainer.progress import gives_whole
from tropd_kernels.trainer.teacher_head import load_head

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STATES = dict(teacher_server_protocol="vllm_hidden_states")
STEPS = dict(max_steps=3, optim="adamw_torch", learning_rate=1e-3)
OBJECTIVES = {
    "tropd": dict(objective_kwargs={"top_k": 4}),
    "gkd": dict(objective="gkd", beta=0.5),
    "reverse_kl": dict(objective="reverse_kl", temperature=0.7),
    "eopd": dict(objective="eopd", objective_kwargs={"top_k": 4}),
    "clip_outlier": dict(objective="clip_outlier", kl_discount_factor=0.5, importance_gamma=0.5),
    "sampled": dict(objective="reverse_kl", gradient_sampling=0.3),
    "two steps on a batch": dict(objective="opd", num_iterations=2),
}
PROMPTS = [[5, 6, 7], [8, 9], [1], [10, 11, 12, 13], [14, 15]]
COMPLETIONS = [[20, 21], [95, 22, 95], [2], [], [23] * 6]


def teacher(**changes):
    return tiny.model(1, hidden_size=48, **changes)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that serves a model, and the folder of its checkpoint."""
    monkeypatch.setattr("tropd_kernels.trainer.retrying.BACKOFF_SECONDS", 0.01)
    with contextlib.ExitStack() as stack:

        def begin(model=None, **settings):
            model = teacher() if model is None else model
            model.save_pretrained(tmp_path / "served")
            settings.setdefault("root", str(tmp_path / "served"))
            running = served_states.serve(model, tiny.tokenizer(), **settings)
            return stack.enter_context(running), str(tmp_path / "served")

        yield begin


def remote(folder, running, **settings):
    served_by, checkpoint = running
    made = make(
        folder, teacher=checkpoint, teacher_model_server_url=served_by.url, **STATES, **settings
    )
    served_by.requests.clear()
    return made


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_is_that_of_the_loaded_teacher(tmp_path, start, name):
    """Losses, every metric, and weights."""
    settings = STEPS | OBJECTIVES[name]
    here = make(tmp_path, teacher=teacher(), **settings)
    here.train()
    running = start()
    there = remote(tmp_path, running, **settings)
    there.train()
    assert there.losses == pytest.approx(here.losses, rel=1e-4)
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-3, atol=2e-5)
    for ours, theirs in zip(here.state.log_history, there.state.log_history, strict=True):
        assert ours.keys() == theirs.keys()
        for metric in ours:
            if metric.startswith("tropd/") and "per_second" not in metric and "peak" not in metric:
                assert theirs[metric] == pytest.approx(ours[metric], rel=1e-3, abs=1e-5), metric
    assert {request["path"] for request in running[0].requests} == {"/pooling"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_the_models(start, dtype):
    """... in the order of the sequences, one of them empty."""
    model = teacher(dtype=dtype)
    running, _ = start(model)
    client = TeacherServer(running.url, concurrency=2, protocol="vllm_hidden_states")
    client.protocol.head = read_head(model)
    found = client.score(PROMPTS, COMPLETIONS)
    for prompt, completion, one in zip(PROMPTS, COMPLETIONS, found, strict=True):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + completion])).last_hidden_state[0]
        assert one.states.dtype == dtype
        assert torch.equal(one.states, states[len(prompt) - 1 : -1])
    assert len(running.requests) == 2  # four sequences that hold tokens
    assert {r["embed_dtype"] for r in running.requests} == {str(dtype).removeprefix("torch.")}


def test_a_step_by_hand_with_prefixes_of_a_column(tmp_path, start):
    data = tiny.prompts(teacher_completion=[" w50 w51 w52 w53"] * 8)
    settings = dict(prefix_schedule="constant", prefix_length=2, prefix_column="teacher_completion")
    trainer = remote(tmp_path, start(), data=data, objective="gkd", **settings)
    step_and_compare(trainer, teacher())
    assert (trainer.batches[0]["prefix_lengths"] == 2).all()


def test_an_evaluation(tmp_path, start):
    here = make(tmp_path, teacher=teacher(), evaluate=tiny.prompts(5), objective="gkd")
    there = remote(tmp_path, start(), evaluate=tiny.prompts(5), objective="gkd")
    torch.manual_seed(3)
    expected = here.evaluate()
    torch.manual_seed(3)
    assert there.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("size", [tiny.VOCAB + 8, tiny.VOCAB - 6])
def test_a_teacher_of_another_vocabulary(tmp_path, start, size):
    """A server takes every id that its tokenizer has, also beyond a smaller head."""
    here = make(tmp_path, teacher=teacher(vocab_size=size), objective="gkd", **STEPS)
    here.train()
    there = remote(tmp_path, start(teacher(vocab_size=size)), objective="gkd", **STEPS)
    there.train()
    assert there._shared_vocab_size == min(size, tiny.VOCAB)
    assert there.losses == pytest.approx(here.losses, rel=1e-4)


def test_whole_distributions_are_watched():
    config = lambda **more: TrOPDConfig("out", use_cpu=True, bf16=False, **more)
    url = dict(teacher_model_server_url="http://teacher:8000")
    assert gives_whole(config()) and gives_whole(config(**url, **STATES))
    assert not gives_whole(config(**url))


def test_requests_hold_no_more_than_they_may(start, monkeypatch):
    running, _ = start()
    client = TeacherServer(running.url, concurrency=1, protocol="vllm_hidden_states")
    client.protocol.head = read_head(teacher())
    # 48 float32 numbers of a token are 256 bytes of base64, as much as 4 log-probs.
    monkeypatch.setattr(server, "MOST_LOG_PROBS", 4 * 10)
    client.score([[5] * 4] * 5, [[6]] * 5)
    assert sorted(len(r["input"]) for r in running.requests) == [1, 2, 2]


# --- the head ----------------------------------------------------------------------------------

HEADS = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "a scale": dict(kind=CohereForCausalLM, config=CohereConfig, logit_scale=0.25),
    "a bias": dict(kind=PhiForCausalLM, config=PhiConfig),
}


@pytest.mark.parametrize("files", ["one file", "several files"])
@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_checkpoints(tmp_path, name, files):
    model = teacher(**HEADS[name])
    size = "5GB" if files == "one file" else "10KB"
    model.save_pretrained(tmp_path, max_shard_size=size)
    several = files == "several files"
    assert (tmp_path / "model.safetensors.index.json").is_file() == several
    expected, found = read_head(model), load_head(str(tmp_path), TrOPDConfig("out", use_cpu=True))
    assert torch.equal(found.weight, expected.weight)
    assert (found.bias is None) == (expected.bias is None)
    if found.bias is not None:
        assert torch.equal(found.bias, expected.bias)
    for number in ("logit_scale", "softcap", "vocab_size"):
        assert getattr(found, number) == getattr(expected, number)
    assert all(p.is_meta for p in found.backbone.parameters() if p is not found.weight)


def test_only_the_heads_file_is_read(tmp_path):
    teacher().save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()) - {index["lm_head.weight"]}:
        (tmp_path / file).unlink()
    load_head(str(tmp_path), TrOPDConfig("out", use_cpu=True))


def test_a_head_under_another_prefix(tmp_path):
    model = teacher()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_head(str(tmp_path), TrOPDConfig("out", use_cpu=True))
    assert torch.equal(found.weight, model.lm_head.weight)


def test_a_checkpoint_without_a_head(tmp_path):
    model = teacher()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^teacher_model: the head of .* no tensor of 'lm_head'"):
        load_head(str(tmp_path), TrOPDConfig("out", use_cpu=True))


@pytest.mark.parametrize("root", ["org/served", "served/", None, "org/base", "/models/served-base"])
def test_another_checkpoint_than_the_served_one(tmp_path, start, root):
    """Of the same width it could not be seen in the states."""
    running, checkpoint = start()
    entry = {"id": "teacher", "owned_by": "vllm", "root": root}
    running.faults.models = [entry if root else {"id": "teacher", "owned_by": "vllm"}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        remote(tmp_path, (running, checkpoint), objective="gkd")
    told = [str(one.message) for one in caught if str(one.message).startswith("teacher_model:")]
    if root and "base" in root:
        (words,) = told
        assert checkpoint in words and repr(root) in words
    else:
        assert not told


def test_an_adapter_has_no_head(tmp_path, start):
    peft = pytest.importorskip("peft")
    running, checkpoint = start()
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^teacher_model: .*is an adapter: .*merged checkpoint"):
        remote(tmp_path, (running, str(tmp_path / "adapter")), objective="gkd")


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (dict(nan=True), "hold NaN or infinity"),
        (dict(drop_last=True), r"bytes came for \d+ tokens|states of width"),
        (dict(page="<html>"), "no JSON"),
        (dict(answer=lambda a: a | {"data": a["data"][:-1]}), r"indices .* came: expected"),
        (dict(answer=lambda a: a | {"data": [d | {"data": [[0.1]]} for d in a["data"]]}), "base64"),
        (dict(answer=lambda a: a | {"data": [d | {"data": "%"} for d in a["data"]]}), "base64"),
        (dict(answer=lambda a: {"object": "list"}), "its answer is malformed"),
    ],
)
def test_answers_that_cannot_be(tmp_path, start, fault, words):
    """... in the middle of a run, whose checkpoint is named and whole."""
    running = start()
    settings = dict(objective="gkd", max_steps=3, save_strategy="steps", save_steps=1)
    trainer = remote(tmp_path, running, teacher_server_retries=0, **settings)
    original = trainer.after_loss

    def then_fail(*arguments):
        original(*arguments)
        if trainer.state.global_step == 1:
            for name, value in fault.items():
                setattr(running[0].faults, name, value)

    trainer.after_loss = then_fail
    with pytest.raises(TeacherServerError, match=words) as caught:
        trainer.train()
    assert "request 1 of " in str(caught.value) and "checkpoint-2" in str(caught.value)
    for name in fault:
        setattr(running[0].faults, name, getattr(type(running[0].faults)(), name))
    resumed = remote(tmp_path, running, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = remote(tmp_path / "whole", running, **settings)
    whole.train()
    assert resumed.losses == whole.losses[2:]


def test_states_of_another_width_than_the_head(tmp_path, start):
    running, _ = start()
    tiny.model(1, hidden_size=64).save_pretrained(tmp_path / "other")
    words = r"a first request .* states of width 48 came for \d+ tokens, .* of width 64: give"
    with pytest.raises(TeacherServerError, match=words):
        remote(tmp_path, (running, str(tmp_path / "other")), objective="gkd")


@pytest.mark.parametrize("guide", [dict(lmbda=0.5), dict(prefix_schedule="constant",
                                                         prefix_length=2)])  # fmt: skip
def test_such_a_server_writes_nothing(tmp_path, start, guide):
    running, checkpoint = start()
    with pytest.raises(NotImplementedError, match=r"^teacher_server_protocol: .*set prefix_column"):
        make(tmp_path, unloadable(tmp_path), checkpoint, objective="gkd", **guide, **STATES,
             teacher_model_server_url=running.url)  # fmt: skip


def test_the_checkpoint_is_missing(tmp_path, start):
    running, _ = start()
    for given in (None, teacher(), "self"):
        with pytest.raises(ValueError, match=r"^teacher_model: .*checkpoint that is served"):
            make(tmp_path, unloadable(tmp_path), given, objective="gkd", **STATES,
                 teacher_model_server_url=running.url)  # fmt: skip
    with pytest.raises(OSError, match=r"^teacher_model"):
        make(tmp_path, unloadable(tmp_path), "/nowhere", objective="gkd", **STATES,
             teacher_model_server_url=running.url)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(task="embed"), r"pooling_task .*Start the server with --runner pooling --pooler"),
        (dict(name="other"), r"`teacher` does not exist.*teacher_model_name_or_path"),
        (dict(api_key="secret"), "VLLM_API_KEY"),
        (dict(max_model_len=11), "exceeds the context of 11"),
    ],
)
def test_servers_that_do_not_fit(tmp_path, start, settings, words):
    running, checkpoint = start(**settings)
    with pytest.raises((TeacherServerError, ValueError), match=words):
        make(tmp_path, unloadable(tmp_path), checkpoint, objective="gkd", **STATES,
             max_completion_length=11, teacher_model_server_url=running.url,
             teacher_model_name_or_path="teacher")  # fmt: skip


@pytest.mark.parametrize("key", ["dtype", "attn_implementation", "device_map"])
def test_options_that_no_head_is_loaded_with(tmp_path, start, key):
    running, checkpoint = start()
    words = f"^teacher_model_init_kwargs: '{key}' would have no effect: .* head"
    with pytest.raises(ValueError, match=words):
        make(tmp_path, unloadable(tmp_path), checkpoint, objective="gkd", **STATES,
             teacher_model_server_url=running.url,
             teacher_model_init_kwargs={key: "auto", "local_files_only": True})  # fmt: skip
    with pytest.raises(ValueError, match="^special_token_map: .* no teacher is loaded"):
        remote(tmp_path, (running, checkpoint), special_token_map={"<s>": "<|end|>"})


def test_a_server_of_log_probs(tmp_path):
    teacher().save_pretrained(tmp_path / "served")
    with served.serve(teacher(), tiny.tokenizer()) as running:
        words = r"nothing at /pooling: start the server with --runner pooling"
        with pytest.raises(TeacherServerError, match=words):
            remote(tmp_path, (running, str(tmp_path / "served")), objective="gkd")


def test_it_is_not_found_out(start):
    """Its log-probs are asked, which it does not have: the protocol has to be said."""
    running, _ = start()
    client = TeacherServer(running.url)
    assert client.protocol.name == "vllm"
    with pytest.raises(TeacherServerError, match=r"nothing at /v1/completions: set teacher_serv"):
        client.score([[5]], [[6]])
    running.faults.models = []
    with pytest.raises(TeacherServerError, match=r"nothing at /v1/completions"):
        TeacherServer(running.url, "teacher").score([[5]], [[6]])


def test_a_client_without_a_head(start):
    running, _ = start()
    client = TeacherServer(running.url, protocol="vllm_hidden_states")
    with pytest.raises(ValueError, match=r"^protocol: .*set protocol\.head"):
        client.score([[5]], [[6]])


# --- the test server ---------------------------------------------------------------------------


def test_a_context_is_filled(start):
    running, _ = start(max_model_len=12)
    client = TeacherServer(running.url, protocol="vllm_hidden_states")
    client.protocol.head = read_head(teacher())
    assert client.score([[5]], [[6] * 11])[0].states.shape == (11, 48)
    with pytest.raises(TeacherServerError, match=r"context length is 12 .*--max-model-len"):
        client.score([[5]], [[6] * 12])
    assert client.count_ids(200) == tiny.VOCAB


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (dict(input=[]), "at least one prompt"),
        (dict(input=[[5], []]), "cannot be empty"),
        (dict(input=[[-1]]), "-1 is out of vocabulary"),
        (dict(input=[["a"]]), "validation error"),
        (dict(input=[[5]], task="classify"), "Unsupported task: 'classify'"),
        (dict(input=[[5]], normalize=False), "was removed"),
        (dict(input=[[5]], embed_dtype="int8"), "validation error"),
    ],
)
def test_what_vllm_refuses(start, body, words):
    running, _ = start()
    response = urllib3.request("POST", f"{running.url}/pooling", json=body)
    assert response.status == 400 and words in response.json()["error"]["message"]


def test_states_have_length_1_where_nothing_is_said(start):
    running, _ = start()
    ask = lambda **more: urllib3.request(
        "POST", f"{running.url}/pooling", json=dict(input=[5, 6]) | more
    ).json()["data"][0]["data"]
    assert torch.tensor(ask()).norm(dim=-1).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    sent = bytearray(base64.b64decode(ask(use_activation=False, encoding_format="base64")))
    states = torch.frombuffer(sent, dtype=torch.float32).view(2, 48)
    assert states.norm(dim=-1).min() > 1.5
