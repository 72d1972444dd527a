"""What a teacher's server answers, and cannot mean: refused, with the request and the token.

Each of these answers once was trained on, or read as another one.
"""

from __future__ import annotations

import copy
import math
import re
import time
import types

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from served import serve
from training import make, unloadable

from tropd_kernels.trainer.completions import read_scores
from tropd_kernels.trainer.server import TeacherServer, TeacherServerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOP_4 = dict(objective_kwargs={"top_k": 4})


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr("tropd_kernels.trainer.retrying.BACKOFF_SECONDS", 0.01)
    with serve(tiny.model(1, hidden_size=48), tiny.tokenizer()) as running:
        yield running


def remote(folder, served, **settings):
    return make(folder, teacher_model_server_url=served.url, **settings)


def log_probs_by(change):
    """A fault: every log-prob goes through `change`."""

    def fault(answer):
        answer = copy.deepcopy(answer)
        for choice in answer["choices"]:
            for position in choice["prompt_logprobs"] or []:
                for entry in (position or {}).values():
                    entry["logprob"] = change(entry["logprob"])
        return answer

    return fault


# --- log-probs of no distribution --------------------------------------------------------------

NO_LOG_PROBS = {
    "log10": (lambda value: value / math.log(10), "sum to [12].*natural logarithms"),
    "all alike": (lambda value: -0.1, "sum to [34]"),
    "excluded": (lambda value: -9999.0, "sum to 0,"),
    "far down": (lambda value: -9998.0, "sum to 0,"),
}


@pytest.mark.parametrize("kind", NO_LOG_PROBS)
def test_log_probs_of_no_distribution(tmp_path, served, kind):
    """To another base, or all the same: in training, with a request to look for."""
    change, words = NO_LOG_PROBS[kind]
    trainer = remote(tmp_path, served, **TOP_4)
    served.faults.answer = log_probs_by(change)
    with pytest.raises(TeacherServerError, match=f"request . of 4 .*{words}") as error:
        trainer.train()
    assert "token" in str(error.value) and trainer.state.global_step == 0


@pytest.mark.parametrize("kind", NO_LOG_PROBS)
def test_log_probs_of_no_distribution_are_seen_at_once(tmp_path, served, kind):
    """Before a model is loaded."""
    change, words = NO_LOG_PROBS[kind]
    (tmp_path / "config.json").write_text("{}")
    served.faults.answer = log_probs_by(change)
    with pytest.raises(TeacherServerError, match=f"a first request for log-probs .*{words}"):
        remote(tmp_path, served, student=unloadable(tmp_path), **TOP_4)


def test_a_teacher_that_excludes_every_token(tmp_path, served):
    """An objective of K1 alone gets one log-prob a token, of which no sum tells anything."""
    trainer = remote(tmp_path, served, objective="mask_outlier")
    served.faults.answer = log_probs_by(lambda value: -9999.0)
    with pytest.raises(TeacherServerError, match="all [0-9]+ tokens are -inf"):
        trainer.train()


def test_the_label_counts_once_and_counts():
    """Beside the k likeliest, or as one of them: the sum is that of distinct ids."""
    position = {"5": {"logprob": math.log(0.6)}, "6": {"logprob": math.log(0.65)}}
    with pytest.raises(ValueError, match="token 0 and the 1 likeliest ids there sum to 1.25,"):
        read_scores({"prompt_logprobs": [None, position]}, [4], [5], 1)
    alone = {"prompt_logprobs": [None, {"5": {"logprob": math.log(0.6)}}]}
    assert read_scores(alone, [4], [5], 1).ids.tolist() == [[5]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(teacher_log_probs=[[-0.5, -1.5], [-math.inf] * 2]), "teacher_ids: .*0.1353 at"),
        (dict(teacher_log_probs=[[-0.5, -1.5], [-60.0, -70.0]]), "teacher_ids: .*0.1353 at"),
        (dict(teacher_log_probs=[[-0.5, -1.5], [-0.1, -3.0]], teacher_label_log_probs=[-0.5, -0.3]),
         "teacher_ids: .* sum of 1.695 at token 1"),
        (dict(teacher_label_log_probs=[-math.inf] * 2, teacher_ids=[[5, 6]] * 2),
         "teacher_label_log_probs: the log-probs of all 2 tokens are -inf"),
    ],
)  # fmt: skip
def test_columns_of_no_distribution(tmp_path, change, words):
    """By the same rule as a server's."""
    row = dict(
        prompt="w1 w2", completion_ids=[7, 8], teacher_label_log_probs=[-0.5, -2.0],
        teacher_ids=[[7, 5], [6, 5]], teacher_log_probs=[[-0.5, -1.5], [-0.5, -3.0]],
    )  # fmt: skip
    settings = dict(precomputed_teacher=True, objective_kwargs={"top_k": 2})
    make(tmp_path, data=tiny.Dataset.from_list([row] * 4), **settings).train()
    with pytest.raises(ValueError, match=words):
        make(tmp_path, data=tiny.Dataset.from_list([row | change] * 4), **settings).train()


# --- ids and choices that cannot be ------------------------------------------------------------


def top_k_with(sent):
    """A fault: the last of the likeliest ids, which is not the label, is another one."""

    def fault(answer):
        answer = copy.deepcopy(answer)
        for position in answer["choices"][0]["prompt_logprobs"] or []:
            if position:
                position[sent] = position.pop(list(position)[-1])
        return answer

    return fault


@pytest.mark.parametrize("sent", ["-3", "5.7", "+5", " 5", "05", "x", "9" * 30])
def test_keys_that_are_no_ids(tmp_path, served, sent):
    trainer = remote(tmp_path, served, **TOP_4)
    served.faults.answer = top_k_with(sent)
    words = f"request . of 4 .*'{re.escape(sent)}' is an id of the log-probs of token 0: expected"
    with pytest.raises(TeacherServerError, match=words):
        trainer.train()


def test_an_id_that_the_teacher_does_not_have(tmp_path, served):
    """It took a place among the likeliest, and was dropped later as padding."""
    trainer = remote(tmp_path, served, **TOP_4)
    served.faults.answer = top_k_with("9999999")
    words = "request . of 4 .*id 9999999 came among the likeliest of token 0, and .* refuses it"
    with pytest.raises(TeacherServerError, match=words):
        trainer.train()
    with pytest.raises(TeacherServerError, match="a first request for log-probs .*id 9999999 came"):
        remote(tmp_path, served, student=unloadable(tmp_path), **TOP_4)


def test_ids_that_only_the_teacher_has(tmp_path):
    """Of a vocabulary that is padded further than the student's: they stay what they were."""
    tall = tiny.model(1, hidden_size=48, vocab_size=123)
    with serve(tall, tiny.tokenizer()) as served:
        trainer = remote(tmp_path, served, **TOP_4)
        trainer.train()
        asked = [r["prompt"] for r in served.requests if len(r.get("prompt", "")) == 1]
    ids = torch.cat(
        [batch["teacher_ids"][batch["completion_mask"].bool()] for batch in trainer.batches]
    )
    assert ids.shape[1] == 4 and 96 <= ids.max() < 123
    assert len(asked) < 10  # once for each new highest id, not for each request


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: [c | {"index": 1}], r"the indices \[1\] came: expected the one of index 0"),
        (lambda c: [c | {"index": 1}, c], r"the indices \[1, 0\] came"),
        (lambda c: [c, c], r"the indices \[0, 0\] came"),
        (lambda c: [], r"the indices \[\] came"),
        (lambda c: None, "its answer is malformed: .*choices"),
        (lambda c: ["text"], "its answer is malformed"),
    ],
)
def test_other_choices_than_the_one(served, change, words):
    """The first was taken, whatever its index."""
    client = TeacherServer(served.url)
    served.faults.answer = lambda answer: answer | {"choices": change(answer["choices"][0])}
    with pytest.raises(TeacherServerError, match=f"request 1 of 1 .*{words}"):
        client.score([[5]], [[6]])


@pytest.mark.parametrize("sent", [True, "-0.5", None, [-0.5]])
def test_log_probs_that_are_no_numbers(served, sent):
    client = TeacherServer(served.url)
    served.faults.answer = log_probs_by(lambda value: sent)
    with pytest.raises(TeacherServerError, match="is a log-prob of token 0: expected a number"):
        client.score([[5]], [[6]])


@pytest.mark.parametrize(
    ("ids", "cause", "words"),
    [
        ([5, -1, 2], None, "-1 came as id 1 of the text: expected a whole number of at least 0"),
        ([5, 5.7, 2], None, "5.7 came as id 1"),
        ([5, "6", 2], None, "'6' came as id 1"),
        ([True, 2], None, "True came as id 0"),
        ([], None, "with 0 ids, .* expected an end that the teacher wrote as the last id"),
        ([5, 6], 3, r"the last of them \[6\]: expected the end 3 that the teacher wrote"),
        ([5, 2, 7, 2], None, "goes on after its end, id 2, which is token 1 of 4"),
        ([*range(5, 25)], None, "20 ids came for a text of at most 10"),
    ],
)
def test_texts_that_cannot_be(tmp_path, served, ids, cause, words):
    """A negative id looked up the embedding's end, and an end was added to a text of no tokens."""
    trainer = remote(tmp_path, served, objective="sft", lmbda=0.0)
    text = {"token_ids": ids, "finish_reason": "stop", "stop_reason": cause}
    served.faults.answer = lambda answer: answer | {"choices": [answer["choices"][0] | text]}
    with pytest.raises(TeacherServerError, match=f"request 1 of 4 .*{words}"):
        trainer.train()
    assert trainer.state.global_step == 0


# --- requests that take too long ---------------------------------------------------------------


@pytest.mark.parametrize("part", ["headers", "body"])
def test_an_answer_that_drips_is_too_late(served, part):
    """Every byte in time, the whole of them not: it once was waited for, however long."""
    client = TeacherServer(served.url, timeout=0.2, retries=1)
    served.requests.clear()
    served.faults.drips = part
    words = r"no answer after 2 attempts: .*timed out.*more than 0.2 s .teacher_server_timeout."
    with pytest.raises(TeacherServerError, match=words):
        client.score([[5]], [[6]])
    assert len(served.requests) == 2
    served.faults.drips = None
    assert len(client.score([[5]], [[6]])) == 1


def test_a_servers_retry_after_is_not_waited_for(served, monkeypatch):
    """It once could stop a run for 6 hours; only the pauses that are documented are made."""
    client = TeacherServer(served.url, retries=3)
    slept = []
    fake = types.SimpleNamespace(sleep=slept.append, time=time.time)
    monkeypatch.setattr("urllib3.util.retry.time", fake)
    served.faults.headers = {"Retry-After": "7200"}
    served.faults.status += [503, 429, 503]
    client.score([[5]], [[6]])
    assert slept == [0.02, 0.04]  # BACKOFF_SECONDS is 0.01 here
    served.requests.clear()
    served.faults.status += [413]
    with pytest.raises(TeacherServerError, match="HTTP 413: .*made to fail"):
        client.score([[5]], [[6]])
    assert len(served.requests) == 1
