"""A teacher's server that cannot do what a run needs: seen before anything is loaded, and a text
that it cuts never passes for a whole one."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from served import serve
from training import make, unloadable

from tropd_kernels.trainer.completions import read_text
from tropd_kernels.trainer.server import TeacherServer, TeacherServerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOP_4 = dict(objective_kwargs={"top_k": 4})
SFT = dict(objective="sft", lmbda=0.0)


@pytest.fixture
def served_with(monkeypatch):
    """A function that serves a teacher while the test runs."""
    monkeypatch.setattr("tropd_kernels.trainer.retrying.BACKOFF_SECONDS", 0.01)
    with contextlib.ExitStack() as stack:

        def start(model=None, **settings):
            model = tiny.model(1, hidden_size=48) if model is None else model
            return stack.enter_context(serve(model, tiny.tokenizer(), **settings))

        yield start


def remote(folder, served, **settings):
    """A trainer with this teacher."""
    return make(folder, teacher_model_server_url=served.url, **settings)


# --- texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [SFT, dict(prefix_schedule="constant", prefix_length=9) | TOP_4]
)
def test_a_text_that_the_server_cuts(tmp_path, served_with, settings):
    """It once got an end that nobody wrote. Here the server's own max_new_tokens cuts it."""
    served = served_with()
    trainer = remote(tmp_path, served, **settings)
    served.faults.max_new_tokens = 3
    with pytest.raises(TeacherServerError, match="the server cut the text after 3 of ") as error:
        trainer.train()
    assert "--max-model-len" in str(error.value) and trainer.state.global_step == 0


def test_an_end_follows_only_an_end(tmp_path, served_with):
    """Texts are kept as they were written: with either of two ends, or cut at our own limit."""
    served = served_with(tiny.model(1, spread=1.5))
    trainer = remote(
        tmp_path, served, **SFT, max_completion_length=40, max_steps=4, temperature=1.0
    )
    trainer.train()
    kinds = {2: 0, 3: 0, None: 0}
    for batch in trainer.batches:
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool()):
            text = ids[mask].tolist()
            assert text in served.texts
            ends = [i for i in text if i in (2, 3)]
            assert ends == text[-1:] if len(text) < 40 else len(ends) <= 1
            kinds[ends[0] if ends else None] += 1
    assert all(kinds.values()), kinds


@pytest.mark.parametrize(
    ("reason", "cause", "tokens"),
    [("stop", None, 2), ("stop", 3, 2), ("stop", 3, 4), ("length", None, 4)],
)
def test_whole_texts(reason, cause, tokens):
    ids = [*range(5, 4 + tokens), 3 if reason == "stop" else 9]
    choice = {"token_ids": ids, "finish_reason": reason, "stop_reason": cause}
    assert read_text(choice, 4) == ids


@pytest.mark.parametrize(
    ("reason", "cause", "words"),
    [
        ("length", None, "the server cut the text after 2 of 4 tokens"),
        ("abort", None, "broke off after 2 of 4 tokens, with finish_reason 'abort'"),
        ("repetition", "repetition_detected", "with finish_reason 'repetition'"),
        ("stop", "Question:", "stop_reason 'Question:'"),
        (None, None, "with finish_reason None"),
    ],
)
def test_texts_that_nobody_ended(reason, cause, words):
    choice = {"token_ids": [5, 6], "finish_reason": reason, "stop_reason": cause}
    with pytest.raises(ValueError, match=words):
        read_text(choice, 4)


@pytest.mark.parametrize("key", ["max_time", "forced_eos_token_id"])
def test_settings_that_would_cut_a_loaded_teachers_text(tmp_path, key):
    with pytest.raises(ValueError, match=f"generation_kwargs: '{key}' is not taken"):
        make(tmp_path, generation_kwargs={key: 3})


# --- the context -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "least"),
    [(TOP_4, 5 + 10 + 1), (SFT, 5 + 10)],  # to score, vLLM writes one token more
)
def test_prompts_that_exceed_the_servers_context(tmp_path, served_with, settings, least):
    """The longest prompt has 5 tokens, a completion 10; vLLM would refuse to score it at a later
    step, or cut the text that it writes."""
    served = served_with(max_model_len=least)
    remote(tmp_path, served, per_device_train_batch_size=8, **settings).train()
    served = served_with(max_model_len=least - 1)
    trainer = remote(tmp_path, served, per_device_train_batch_size=8, **settings)
    words = f"the prompt of 5 tokens .* of 10 tokens.* exceeds the context of {least - 1} of"
    with pytest.raises(ValueError, match=f"teacher_model_server_url: {words}"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("settings", "least"), [(TOP_4, 12), (SFT, 11)])
def test_context_that_no_prompt_fits(tmp_path, served_with, settings, least):
    remote(tmp_path, served_with(max_model_len=least), **settings)
    served = served_with(max_model_len=least - 1)
    with pytest.raises(ValueError, match="the shortest prompt.* exceeds the context of"):
        remote(tmp_path, served, student=unloadable(tmp_path), **settings)


def test_server_that_does_not_tell_its_context(tmp_path, served_with):
    """Its refusal says what to do."""
    served = served_with(max_model_len=12)
    served.faults.models = [{"id": "teacher"}]
    trainer = remote(tmp_path, served, **TOP_4)
    with pytest.raises(TeacherServerError, match="maximum context length is 12 .*max-model-len"):
        trainer.train()


def test_an_adapters_context_is_its_models(served_with):
    served = served_with()
    served.faults.models = [
        {"id": "base", "max_model_len": 32, "parent": None},
        {"id": "adapter", "max_model_len": None, "parent": "base"},
    ]
    assert [TeacherServer(served.url, name).context for name in (None, "adapter", "gone")] == [
        32, 32, None,
    ]  # fmt: skip


@pytest.mark.parametrize("sent", ["4096", True, False, 0, -1, 31.5, float("inf"), [32]])
def test_a_context_that_is_no_number_of_tokens(served_with, sent):
    """Some once passed for unknown, others for contexts."""
    served = served_with()
    served.faults.models = [{"id": "other", "max_model_len": sent}, {"id": "teacher"}]
    assert TeacherServer(served.url, "teacher").context is None
    with pytest.raises(TeacherServerError, match="max_model_len of 'other' is .*: expected the c"):
        TeacherServer(served.url)
    served.faults.models[0]["max_model_len"] = 32.0
    assert TeacherServer(served.url).context == 32


# --- the first look ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "settings", "words"),
    [
        (dict(max_logprobs=3), TOP_4, "max allowed: 3.*Start the server with --max-logprobs 4 or"),
        ({}, TOP_4 | dict(teacher_model_name_or_path="gone"),
         "`gone` does not exist.*Set teacher_model_name_or_path to .*: teacher"),
        (dict(api_key="secret"), TOP_4, "HTTP 401: .*Set VLLM_API_KEY"),
        ({}, SFT | dict(top_p=0.0), "a first request for a text failed: .*top_p must be in"),
    ],
)  # fmt: skip
def test_what_the_server_refuses_is_seen_at_once(tmp_path, served_with, server, settings, words):
    served = served_with(**server)
    with pytest.raises(TeacherServerError, match=words):
        remote(tmp_path, served, student=unloadable(tmp_path), **settings)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(dict(no_log_probs=True), "prompt_logprobs for 9 tokens were asked, none came"),
     (dict(most=2), "start the server with --max-logprobs 4")],
)  # fmt: skip
def test_server_without_the_log_probs(tmp_path, served_with, fault, words):
    served = served_with()
    for name, value in fault.items():
        setattr(served.faults, name, value)
    with pytest.raises(TeacherServerError, match=words):
        remote(tmp_path, served, student=unloadable(tmp_path), **TOP_4)


def test_server_that_is_not_asked(tmp_path, served_with):
    """The teacher's text is in the data set: neither its context nor its log-probs matter."""
    served = served_with(max_model_len=5, max_logprobs=0)
    data = tiny.prompts(teacher_completion=[" w3 w4 w5"] * 8)
    remote(tmp_path, served, data=data, **SFT).train()
    assert {r["path"] for r in served.requests} == {"/tokenize"}


def test_key_from_the_environment(tmp_path, served_with, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    remote(tmp_path, served_with(api_key="secret"), **TOP_4).train()


def test_ids_that_the_server_does_not_have(tmp_path, served_with):
    """A student with a taller vocabulary does not write them, as beside a loaded teacher: vLLM
    would refuse to score them."""
    student = tiny.model(0, vocab_size=123)
    with torch.no_grad():
        student.get_output_embeddings().weight[96:] *= 3
    trainer = remote(tmp_path, served_with(), student=student, **TOP_4)
    assert trainer.generation_config.suppress_tokens == list(range(96, 123))
    trainer.train()
    assert all((batch["completion_ids"] < 96).all() for batch in trainer.batches)


@pytest.mark.parametrize("most", [96, 97, 98, 200])
def test_count_of_ids(served_with, most):
    assert TeacherServer(served_with().url).count_ids(most) == 96
