"""A server's key and the hub's tokens: named in errors and logs, and never shown there."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from served import serve
from training import make, unloadable

from tropd_kernels import cli
from tropd_kernels.trainer import TrOPDConfig
from tropd_kernels.trainer.server import TeacherServer, TeacherServerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SECRET = "hf_S3CRET"
HERE = dict(use_cpu=True, bf16=False, report_to="none")


@pytest.fixture(scope="module")
def served():
    with serve(tiny.model(1), tiny.tokenizer(), api_key=SECRET) as running:
        yield running


def words(error) -> str:
    """All that is printed of an error that nobody catches."""
    return "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("key", [f"{SECRET}\n", f" {SECRET}\r\n"])
def test_white_space_around_a_key_is_none_of_it(tmp_path, served, monkeypatch, key):
    """As a file or a cluster's secret holds it. The error showed the key, and named no variable."""
    monkeypatch.setenv("VLLM_API_KEY", key)
    TeacherServer(served.url).score([[5]], [[6]])
    TeacherServer(served.url, api_key=key).score([[5]], [[6]])


@pytest.mark.parametrize("key", [f"{SECRET}\n{SECRET}", f"{SECRET}é", f"a {SECRET}"])
def test_a_key_that_no_header_holds(tmp_path, served, monkeypatch, key):
    with pytest.raises(ValueError, match="^api_key: it holds white space or") as error:
        TeacherServer(served.url, api_key=key)
    assert SECRET not in words(error)
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ValueError, match="^VLLM_API_KEY: it holds white space or") as error:
        make(tmp_path, unloadable(tmp_path), teacher_model_server_url=served.url)
    assert SECRET not in words(error)


def test_a_server_that_quotes_the_key(served):
    """... as some do of a wrong one."""
    client = TeacherServer(served.url, api_key=SECRET)
    served.faults.status += [401]
    served.faults.reason = f"Incorrect API key provided: {SECRET}"
    with pytest.raises(TeacherServerError, match=r"provided: \*\*\*.*Set VLLM_API_KEY") as error:
        client.score([[5]], [[6]])
    assert SECRET not in words(error)


@pytest.mark.parametrize("before", [0, 265, 295])
@pytest.mark.parametrize("key", [SECRET, "a\\b'c\"d-of-mine"])
def test_no_part_of_a_quoted_key_is_shown(served, before, key):
    """Wherever the server's words are cut, and however they are escaped."""
    client = TeacherServer(served.url, api_key=SECRET)
    client._api_key = key
    served.faults.status += [401]
    served.faults.reason = "x" * before + key
    with pytest.raises(TeacherServerError, match=r"\*|x'") as error:
        client.score([[5]], [[6]])
    shown = words(error)
    assert not any(key[i : i + 4] in shown or repr(key[i : i + 4])[1:-1] in shown
                   for i in range(len(key) - 3))  # fmt: skip


@pytest.mark.parametrize("before", [0, 280])
def test_no_part_of_a_key_in_a_malformed_answer_is_shown(served, before):
    client = TeacherServer(served.url, api_key=SECRET)
    served.faults.answer = lambda answer: {"choices": "x" * before + SECRET}
    with pytest.raises(TeacherServerError, match="its answer is malformed") as error:
        client.score([[5]], [[6]])
    assert not any(SECRET[i : i + 4] in words(error) for i in range(len(SECRET) - 3))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://me:{SECRET}@127.0.0.1:1", "it holds a user or a password"),
        (f"http://me:a/{SECRET}@127.0.0.1:1", "it holds a user or a password"),
        (f"me:{SECRET}@127.0.0.1:1", "it holds a user or a password"),
        (f"http://127.0.0.1:1/?key={SECRET}", "it holds a query"),
        (f"http://127.0.0.1:1/v1#{SECRET}", "it holds a query or a fragment"),
        ("http://", "must begin with http:// or https://, and name a server: 'http://'"),
        ("http://127.0.0.1:port", "must begin with http:// or https://, and name a server"),
        ("ftp://127.0.0.1", "must begin with http:// or https://"),
    ],
)
def test_an_address_with_more_than_an_address(url, message):
    """A password was not sent, and stood in every error."""
    for name, make_it in (
        ("url", lambda: TeacherServer(url, retries=0)),
        ("teacher_model_server_url",
         lambda: TrOPDConfig("unused", teacher_model_server_url=url, **HERE)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: {message}") as error:
            make_it()
        assert SECRET not in str(error.value)


@pytest.mark.parametrize("key", ["model_init_kwargs", "teacher_model_init_kwargs"])
@pytest.mark.parametrize("value", [f"token={SECRET}", f'{{"token": "{SECRET}"', [SECRET]])
def test_tokens_in_errors(key, value):
    with pytest.raises(ValueError, match=f"{key}: .*not shown, as it seems to hold a ") as error:
        TrOPDConfig("unused", **{key: value}, **HERE)
    assert SECRET not in str(error.value)


def test_tokens_in_what_is_printed_and_logged():
    """transformers hides hub_token in its own print and in what it logs, nothing below it."""

    @dataclass
    class Own(TrOPDConfig):
        extra: int = 1

    token, end = {"token": SECRET}, {"eos_token": "</s>"}  # whose name ends in token, too
    for kind in (TrOPDConfig, Own):
        config = kind(
            "unused", hub_token=SECRET, model_init_kwargs=token, teacher_model_init_kwargs=token,
            chat_template_kwargs=end, **HERE,
        )  # fmt: skip
        for text in (repr(config), str(config), str(config.to_dict()), config.to_json_string(),
                     str(config.to_sanitized_dict())):  # fmt: skip
            assert SECRET not in text and "<TOKEN>" in text and "</s>" in text
        assert config.model_init_kwargs == token and config.hub_token == SECRET


@pytest.mark.parametrize("text", [f"hub_token: {SECRET}: x", f"- hub_token={SECRET}"])
def test_tokens_in_a_file_that_cannot_be_read(tmp_path, capsys, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\n")
    assert cli.main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert SECRET not in error and ("line 1: mapping values are" in error or "not shown" in error)
