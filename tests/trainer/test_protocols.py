"""Three protocols, one teacher: the same numbers, texts and errors, from servers as strict as vLLM
0.32 and SGLang 0.5.23."""

from __future__ import annotations

import contextlib
import json
import re

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import served
import served_sglang
import tiny
import torch
import urllib3
from training import make, unloadable

from tropd_kernels.trainer import server as server_module
from tropd_kernels.trainer.server import TeacherServer, TeacherServerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROTOCOLS = ("vllm", "vllm_generate", "sglang")
BATCHED = ("vllm", "sglang")
TOP_4 = dict(objective_kwargs={"top_k": 4})
CONTEXT = {p: {"context_length" if p == "sglang" else "max_model_len": 20} for p in PROTOCOLS}
PROMPTS = [[5, 6, 7], [8, 9], [1], [10, 11, 12, 13], [14, 15], [5], [6, 7]]
COMPLETIONS = [[20, 21], [95, 22, 95], [2], [], [23] * 6, [24, 3], [25]]


@pytest.fixture
def start(monkeypatch):
    """A function that serves a teacher by a protocol while the test runs."""
    monkeypatch.setattr("tropd_kernels.trainer.retrying.BACKOFF_SECONDS", 0.01)
    with contextlib.ExitStack() as stack:

        def begin(protocol, model=None, **settings):
            model = tiny.model(1) if model is None else model
            if protocol == "sglang":
                return stack.enter_context(served_sglang.serve(model, tiny.tokenizer(), **settings))
            one = protocol == "vllm_generate"
            settings = dict(scale_out=one, completions=not one) | settings
            return stack.enter_context(served.serve(model, tiny.tokenizer(), **settings))

        yield begin


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_are_the_models(start, protocol, k):
    """... in the order of the sequences, one of them empty, also those of the vocabulary's last id,
    which SGLang echoes as another."""
    running = start(protocol)
    client = TeacherServer(running.url, concurrency=2)
    assert client.protocol.name == protocol  # found out
    assert client.count_ids(96) == 96  # or each new highest id would be a question
    running.requests.clear()
    found = client.score(PROMPTS, COMPLETIONS, k)
    for prompt, completion, scores in zip(PROMPTS, COMPLETIONS, found, strict=True):
        with torch.no_grad():
            logits = tiny.model(1)(torch.tensor([prompt + completion])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        label = expected.gather(1, torch.tensor(completion, dtype=torch.int64)[:, None])[:, 0]
        torch.testing.assert_close(scores.label_log_probs, label, atol=1e-5, rtol=1e-5)
        assert (scores.ids is None) == (k == 0)
        if k:
            best = expected.topk(k)
            assert torch.equal(scores.ids, best.indices)
            torch.testing.assert_close(scores.log_probs, best.values, atol=1e-5, rtol=1e-5)
    # Six sequences that hold tokens, by two requests at once.
    assert len(running.requests) == (2 if protocol in BATCHED else 6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_texts_are_the_same_with_the_same_seed(start, protocol):
    running = start(protocol, tiny.model(1, spread=1.5))
    client = TeacherServer(running.url)
    sampling = dict(temperature=1.0, top_p=0.9, top_k=-1, min_p=0.0, repetition_penalty=1.0,
                    presence_penalty=0.0, frequency_penalty=0.0)  # fmt: skip
    first, again = (client.generate([[5]] * 30, 30, seeds=range(30), **sampling) for _ in range(2))
    assert first == again
    assert sorted(running.texts) == sorted(first * 2)
    assert {text[-1] for text in first if len(text) < 30} == {2, 3}


@pytest.mark.parametrize("protocol", PROTOCOLS[1:])
def test_a_run_is_that_by_completions(tmp_path, start, protocol):
    """Prefixes written by the teacher, and scored with the rest."""
    running = start(protocol)
    settings = TOP_4 | dict(max_steps=2, prefix_schedule="constant", prefix_length=3)
    there = make(
        tmp_path, teacher_model_server_url=running.url, teacher_server_protocol=protocol,
        teacher_server_concurrency=2, **settings,
    )  # fmt: skip
    there.train()
    vllm = make(tmp_path, teacher_model_server_url=start("vllm").url, **settings)
    vllm.train()
    assert there.losses == vllm.losses
    assert all((batch["prefix_lengths"] > 0).all() for batch in there.batches)
    asked = {request["path"] for request in running.requests}
    assert asked == {"/tokenize", there._server.protocol.path}


def test_an_adapter_on_sglang(start):
    running = start("sglang", adapters=("adapter",))
    client = TeacherServer(running.url, "adapter")
    client.score([[5]], [[6]])
    client.generate([[5]], 2)
    assert [request.get("lora_path") for request in running.requests] == ["adapter"] * 2
    TeacherServer(running.url).score([[5]], [[6]])
    assert "lora_path" not in running.requests[-1]


# --- batches -----------------------------------------------------------------------------------


def test_requests_hold_no_more_than_they_may(start, monkeypatch):
    running = start("vllm")
    client = TeacherServer(running.url, concurrency=1)
    client.count_ids(96)
    running.requests.clear()
    sizes = lambda: sorted(len(r["prompt"]) for r in running.requests if "prompt" in r)
    monkeypatch.setattr(server_module, "MOST_LOG_PROBS", 4 * 10)
    client.score([[5] * 4] * 5, [[6]] * 5, 3)  # 5 tokens, 4 log-probs each: two in a request
    assert sizes() == [2, 2, 5]  # the last is one prompt of five ids
    running.requests.clear()
    client.score([[5] * 40], [[6]], 3)  # one sequence is asked however long it is
    assert sizes() == [41]


@pytest.mark.parametrize("how", ["refuses", "answers the first"])
def test_server_that_takes_one_sequence_a_request(start, how):
    running = start("vllm")
    expected = TeacherServer(running.url).score(PROMPTS, COMPLETIONS)
    client = TeacherServer(running.url, concurrency=2)
    running.faults.no_batches = how == "refuses"
    running.faults.answer = lambda answer: answer | {"choices": answer["choices"][:1]}
    for requests in (2 + 6, 6):  # the second time no batch is tried
        running.requests.clear()
        for one, other in zip(client.score(PROMPTS, COMPLETIONS), expected, strict=True):
            assert torch.equal(one.label_log_probs, other.label_log_probs)
        assert len(running.requests) == requests


@pytest.mark.parametrize("protocol", BATCHED)
def test_an_error_names_the_sequence_of_a_batch(start, protocol):
    running = start(protocol, **CONTEXT[protocol])
    client = TeacherServer(running.url, concurrency=1)
    long = [[5], [7] * 19, [6]]
    words = r"request 2 of 3 \(the log-probs of 1 tokens after a prompt of 19 that begins \[7, "
    with pytest.raises(TeacherServerError, match=words):
        client.score(long, [[6]] * 3, 2)
    assert client.score(long[::2], [[6]] * 2, 2)[1].ids.shape == (1, 2)
    # ... also where all are answered, and one badly.
    running.faults.answer = lambda answer: json.loads(
        re.sub(r"-[0-9.e+-]+(?=[^-]*$)", "0.5", json.dumps(answer), count=1)
    )
    with pytest.raises(TeacherServerError, match=r"request 3 of 3 .* reach 0.5, above 0"):
        client.score([[5], [7], [6]], [[6]] * 3, 2)
    running.faults.answer = None
    running.faults.status += [500] * 20
    client = TeacherServer(running.url, concurrency=1, retries=1)
    with pytest.raises(TeacherServerError, match=r"request 1 of 2 .* and 1 more with it failed"):
        client.score([[5], [7]], [[6]] * 2, 2)


# --- contexts and ids --------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_sequence_at_the_context_and_beyond(start, protocol):
    """The room that a protocol states is what its server needs, to the token."""
    client = TeacherServer(start(protocol, **CONTEXT[protocol]).url)
    most = client.context - client.protocol.scoring_room
    client.score([[5]], [[6] * (most - 1)])
    with pytest.raises(
        TeacherServerError, match="Start the server with a larger --(max-m|context)"
    ):
        client.score([[5]], [[6] * most])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_text_at_the_context_and_beyond(start, protocol):
    model = tiny.model(1)
    model.generation_config.eos_token_id = []
    client = TeacherServer(start(protocol, model, **CONTEXT[protocol]).url)
    most = client.context - client.protocol.writing_room
    for seed in range(9):
        with contextlib.suppress(AssertionError):
            (text,) = client.generate([[5]], most - 1, seeds=[seed])
            assert len(text) == most - 1
            break
    else:
        pytest.fail("every text ended by itself")
    if protocol != "vllm":  # which cuts a text too, but refuses max_tokens beyond its context
        with pytest.raises(TeacherServerError, match="the server cut the text after .* of "):
            client.generate([[5]], most, seeds=[seed])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("most", [96, 97, 200])
def test_count_of_ids(start, protocol, most):
    """SGLang reads beyond its table for an unknown id: none is ever sent in a sequence."""
    running = start(protocol)
    assert TeacherServer(running.url).count_ids(most) == 96
    if protocol == "sglang":
        assert {tuple(request["input_ids"]) for request in running.requests} == {(0,)}


def test_a_cut_prompt_on_sglang(start):
    running = start("sglang", context_length=20, truncates=True)
    with pytest.raises(TeacherServerError, match="input_token_logprobs for 16 tokens .*truncate"):
        TeacherServer(running.url).score([[5]], [[6] * 15])


# --- bad answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (dict(drop_last=True), "tokens were asked, . came"),
        (dict(no_log_probs=True), "tokens were asked, none came"),
        (dict(most=2), "[23] log-probs came for token 0 .*which should be the 4 likeliest"),
        (dict(nan=True), "hold NaN|which no distribution's do"),
        (dict(page="<html>Welcome</html>"), "its answer is no JSON: '<html>.*address of the serv"),
        (dict(page="[]"), "its answer is malformed: ..|a list of 1 results was asked, .. came"),
        (dict(page="{}"), "its answer is malformed: .{}|a list of 1 results was asked, {} came"),
        (dict(answer=lambda answer: [answer]), "its answer is malformed|its answer is malf"),
    ],
)
def test_answers_that_cannot_be(start, protocol, fault, words):
    running = start(protocol)
    client = TeacherServer(running.url)
    for name, value in fault.items():
        setattr(running.faults, name, value)
    with pytest.raises(TeacherServerError, match=f"request 1 of 1 .*(?:{words})"):
        client.score([[5, 6, 7]], [[8, 9]], 4)


def test_log_probs_of_other_ids(start):
    running = start("sglang")
    client = TeacherServer(running.url)

    def shifted(results):
        rows = results[0]["meta_info"]["input_token_logprobs"]
        results[0]["meta_info"]["input_token_logprobs"] = [*rows[:2], rows[1]]
        return results

    running.faults.answer = shifted
    with pytest.raises(TeacherServerError, match="the log-prob of id 8 .* token 1, which is id 9"):
        client.score([[5, 6, 7]], [[8, 9]])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("other", PROTOCOLS)
def test_another_protocol_than_said(tmp_path, start, protocol, other):
    if protocol == other:
        assert TeacherServer(start(protocol).url, protocol=protocol).protocol.name == protocol
        return
    path = {"vllm": "/v1/completions", "vllm_generate": "/inference/v1/generate",
            "sglang": "/generate"}[other]  # fmt: skip
    words = (
        f"a first request for log-probs failed: HTTP 404: .*There is nothing at {path}: set teach"
    )
    if (protocol, other) == ("vllm", "vllm_generate"):
        words = "HTTP 403: 'Scale-out endpoints are disabled.*--enable-scale-out, or set teacher_se"
    with pytest.raises(TeacherServerError, match=words):
        make(
            tmp_path, student=unloadable(tmp_path), teacher_model_server_url=start(protocol).url,
            teacher_server_protocol=other, **TOP_4,
        )  # fmt: skip


def test_protocols_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"protocol: must be one of .*'sglang'.*got 'tgi'"):
        TeacherServer("http://127.0.0.1:9", protocol="tgi")
    with pytest.raises(ValueError, match="teacher_server_protocol: must be one of vllm, .*'tgi'"):
        make(tmp_path, teacher_model_server_url="http://a", teacher_server_protocol="tgi")


def test_a_model_that_sglang_does_not_have(start):
    """/generate would answer with the one that it has."""
    words = "the list of models failed: it does not list 'other'. Set teacher_model_.*: teacher"
    with pytest.raises(TeacherServerError, match=words):
        TeacherServer(start("sglang").url, "other")


def test_a_page_in_the_middle_of_a_run(tmp_path, start):
    """The checkpoint stays, and the run goes on from it."""
    running = start("sglang")
    settings = TOP_4 | dict(
        teacher_model_server_url=running.url, max_steps=2, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    cut = make(tmp_path, **settings)
    distill = cut.distill

    def then_a_page(*arguments):
        running.faults.page = "<html>Bad gateway</html>"
        return distill(*arguments)

    cut.distill = then_a_page
    last = str(tmp_path / "checkpoint-1")
    with pytest.raises(TeacherServerError, match=f"Bad gateway.*go on from {last} by resume"):
        cut.train()
    running.faults.page = None
    resumed = make(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=last)
    assert resumed.losses == whole.losses[1:]


# --- SGLang's refusals, from its source --------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (dict(input_ids=[]), "input_ids cannot be empty"),
        (dict(input_ids=[5] * 20), "input .20 tokens. is longer than the model's context length"),
        (dict(input_ids=[5] * 14), "Input length .14 tokens. exceeds the maximum allowed length"),
        (dict(input_ids=[5], sampling_params={"max_new_tokens": 20}), "a total of 21 tokens: 1"),
        (dict(input_ids=[5], sampling_params={"top_p": 0, "max_new_tokens": 0}), "top_p must be"),
        (dict(input_ids=[0], token_ids_logprob=[96]), r"valid range is \[0, 96\)"),
        (dict(input_ids=[5], lora_path="gone"), "never been loaded: gone"),
    ],
)
def test_what_sglang_refuses(start, body, words):
    running = start("sglang", context_length=20)
    body = {"sampling_params": {"max_new_tokens": 0}} | body
    response = urllib3.request("POST", running.url + "/generate", json=body, retries=False)
    assert response.status == 400
    assert re.search(words, json.loads(response.data)["error"]["message"])
