"""The small server of these tests is as strict as vLLM: what it lets pass, a client may rely on.

Statuses, messages and values are those of vLLM 0.32, from its source (see `served.py`).
"""

from __future__ import annotations

import json
import re

import pytest
import urllib3

pytest.importorskip("transformers", reason="the served model needs transformers")

import tiny
import torch
from served import serve

CONTEXT, MOST = 20, 5


@pytest.fixture(scope="module")
def served():
    model = tiny.model(1)
    with serve(model, tiny.tokenizer(), max_model_len=CONTEXT, max_logprobs=MOST) as running:
        yield running


def ask(served, path="/v1/completions", method="POST", **body):
    response = urllib3.request(method, served.url + path, json=body or None, retries=False)
    return response.status, json.loads(response.data)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (dict(prompt=[5] * 21), 400, "maximum context length is 20 tokens. .* at least 21 input"),
        (dict(prompt=[5] * 25), 400, "However, your prompt contains 25 input tokens"),
        (dict(prompt=[5] * 20, max_tokens=1), 400, "max_tokens must be at least 1, got 0."),
        (dict(prompt=[5], max_tokens=21), 400, "max_tokens=21 cannot be greater than max"),
        (dict(prompt=[5], max_tokens=0), 400, "max_tokens must be at least 1, got 0."),
        (dict(prompt=[5], prompt_logprobs=6), 400,
         "Requested prompt logprobs of 6, which is greater than max allowed: 5"),
        (dict(prompt=[5], prompt_logprobs=-1), 400, "logprobs of 96, which is greater than"),
        (dict(prompt=[5], prompt_logprobs=-2), 400, "must be a positive value or -1"),
        (dict(prompt=[5, 96]), 400, "Token id 96 is out of vocabulary"),
        (dict(prompt=[5, -1]), 400, "validation error"),
        (dict(prompt=[5], model="another"), 404, "`another` does not exist. Valid aliases"),
        (dict(prompt=[5], temperature=2.5), 400, r"temperature must be in \[0, 2\], got 2.5"),
        (dict(prompt=[5], top_p=0.0), 400, r"top_p must be in \(0, 1\], got 0.0"),
        (dict(prompt=[5], seed=2**63), 400, "seed"),
    ],
)  # fmt: skip
def test_refusals(served, body, status, words):
    got, answer = ask(served, **body)
    assert got == status and answer["error"]["code"] == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert re.search(words, answer["error"]["message"])


def test_models_say_their_context(served):
    status, answer = ask(served, "/v1/models", "GET")
    (entry,) = answer["data"]
    assert status == 200 and (entry["id"], entry["max_model_len"]) == ("teacher", CONTEXT)


def test_no_prompt_has_no_choices(served):
    assert ask(served, prompt=[]) == (200, {"object": "text_completion", "model": "teacher",
                                            "choices": []})  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "body", "length"),
    [(4, {}, 16), (4, dict(max_tokens=None), 16), (10, dict(max_tokens=16), 10),
     (17, dict(max_tokens=20), 3), (4, dict(max_tokens=2), 2)],
)  # fmt: skip
def test_max_tokens_is_lowered_to_what_the_context_leaves(served, prompt, body, length):
    """... and nothing but finish_reason says so; without it 16 are written."""
    for seed in range(9):
        _, answer = ask(served, prompt=[5] * prompt, return_token_ids=True, seed=seed, **body)
        (choice,) = answer["choices"]
        ids = choice["token_ids"]
        if choice["finish_reason"] == "length":
            assert len(ids) == length and choice["stop_reason"] is None
            break
    else:
        pytest.fail("every text ended by itself")


def test_ends():
    """The tokenizer's own end has no stop_reason, another one is its id; both are in token_ids."""
    seen = set()
    with serve(tiny.model(1, spread=1.0), tiny.tokenizer()) as served:
        for seed in range(60):
            _, answer = ask(
                served, prompt=[5], max_tokens=30, temperature=2.0, return_token_ids=True, seed=seed
            )
            (choice,) = answer["choices"]
            last = choice["token_ids"][-1]
            expected = {2: ("stop", None), 3: ("stop", 3)}.get(last, ("length", None))
            assert (choice["finish_reason"], choice["stop_reason"]) == expected
            seen.add(expected)
            if len(seen) == 3:
                return
    pytest.fail(f"only {seen} in 60 texts")


@pytest.mark.parametrize("k", [0, 3])
def test_prompt_log_probs(served, k):
    """The label's first, once where it is among the k likeliest, and none of the first token's."""
    ids = [5, 6, 7, 8]
    _, answer = ask(served, prompt=ids, prompt_logprobs=k, max_tokens=1)
    (choice,) = answer["choices"]
    first, *rows = choice["prompt_logprobs"]
    assert first is None and len(rows) == 3 and choice["token_ids"] is None
    with torch.no_grad():
        log_probs = tiny.model(1)(torch.tensor([ids])).logits[0].log_softmax(-1)
    for row, expected, label in zip(rows, log_probs, ids[1:]):
        assert next(iter(row)) == str(label)
        assert set(row) == {str(label)} | {str(i) for i in expected.topk(k).indices.tolist()}
        for i, entry in row.items():
            assert entry["logprob"] == pytest.approx(expected[int(i)].item(), abs=1e-5)
            assert entry["rank"] == int((expected >= expected[int(i)]).sum())


def test_what_is_not_sent_is_the_models_own():
    model = tiny.model(1)
    model.generation_config.temperature = 0.0
    with serve(model, tiny.tokenizer()) as served:
        texts = [
            [ask(served, prompt=[5], return_token_ids=True, seed=seed, **body)[1]["choices"][0]
             ["token_ids"] for seed in range(4)]
            for body in ({}, dict(temperature=1.0))
        ]  # fmt: skip
    assert len(set(map(tuple, texts[0]))) == 1 < len(set(map(tuple, texts[1])))


def test_key():
    with serve(tiny.model(1), tiny.tokenizer(), api_key="k") as served:
        assert ask(served, "/v1/models", "GET") == (401, {"error": "Unauthorized"})
