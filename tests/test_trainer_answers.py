"""What a teacher's server answers, and cannot mean: refused, with the request and the token.

Each of these answers once was trained on, or read as another one.
"""

from __future__ import annotations

import copy
import math
import time
import types

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from served import serve
from training import make

from tropd_kernels.trainer import server as server_module
from tropd_kernels.trainer.completions import read_scores
from tropd_kernels.trainer.server import TeacherServer, TeacherServerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOP_4 = dict(objective_kwargs={"top_k": 4})


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(server_module, "BACKOFF_SECONDS", 0.01)
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
    """Before a model is loaded: the folder, as a student, fails when it is."""
    change, words = NO_LOG_PROBS[kind]
    served.faults.answer = log_probs_by(change)
    with pytest.raises(TeacherServerError, match=f"a first request for log-probs .*{words}"):
        remote(tmp_path, served, student=str(tmp_path), **TOP_4)


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
