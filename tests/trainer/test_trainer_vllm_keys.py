"""Keys of `generation_kwargs` that vLLM does not take are refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import sys
import types
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROTOCOL = "vllm.entrypoints.openai.completion.protocol"


@dataclasses.dataclass
class SamplingParams:
    """Of some of vLLM's fields, and with its own check of one of them."""

    n: int = 1
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    seed: int | None = None
    logit_bias: dict | None = None
    structured_outputs: object = None
    extra_args: dict | None = None
    _all_stop_token_ids: object = None

    def __post_init__(self):
        if self.min_tokens < 0:
            raise ValueError(
                f"min_tokens must be greater than or equal to 0, got {self.min_tokens}."
            )
        if isinstance(self.structured_outputs, dict):
            raise TypeError("TRL makes their own class of them")
        if not self.top_p > 0:
            raise ValueError("top_p must be in (0, 1]")


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in, for vLLM is not installed where the tests run."""
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    sys.modules["vllm"].SamplingParams = SamplingParams
    return monkeypatch


def config(given, **settings):
    return TrOPDConfig("unused", use_cpu=True, bf16=False, report_to="none", use_vllm=True,
                       generation_kwargs=given, **settings)  # fmt: skip


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_keys_that_vllm_does_not_have(vllm, mode):
    for key, near in (("min_token", r" \(did you mean 'min_tokens'\?\)"), ("num_beams", ""),
                      ("_all_stop_token_ids", "")):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"^generation_kwargs: '{key}' is no key of vLLM's [A-Z,a-z]*{near}$"
        ):
            config({key: 2}, vllm_mode=mode)
    for given in ({"min_tokens": 2, "seed": 3}, {"structured_outputs": {"regex": "a"}}, {}):
        assert config(given, vllm_mode=mode).generation_kwargs == given


def test_values_that_vllm_refuses(vllm):
    with pytest.raises(
        ValueError, match="^generation_kwargs: vLLM refuses them: min_tokens must be greater"
    ):
        config({"min_tokens": -1})
    # A server takes None for its default.
    with pytest.raises(ValueError, match="^generation_kwargs: vLLM refuses them: .*NoneType"):
        config({"top_p": None}, vllm_mode="colocate")
    config({"top_p": None}, vllm_mode="server")


def test_what_a_server_ignores(vllm):
    """A request for completions has not every field of a SamplingParams, and some of its own."""
    request = SimpleNamespace(model_fields=dict.fromkeys(["prompt", "min_tokens", "vllm_xargs"]))
    names = PROTOCOL.split(".")
    for depth in range(2, len(names)):
        name = ".".join(names[:depth])
        vllm.setitem(sys.modules, name, types.ModuleType(name))
    protocol = types.ModuleType(PROTOCOL)
    protocol.CompletionRequest = request
    vllm.setitem(sys.modules, PROTOCOL, protocol)
    for key in ("extra_args", "prompt"):  # TRL sends the prompts
        with pytest.raises(ValueError, match=f"'{key}' is no key of vLLM's requests"):
            config({key: {}}, vllm_mode="server")
    config({"extra_args": {"a": 1}}, vllm_mode="colocate")
    config({"min_tokens": 1, "vllm_xargs": {"a": 1}}, vllm_mode="server")
    with pytest.raises(ValueError, match="'vllm_xargs' is no key of vLLM's SamplingParams"):
        config({"vllm_xargs": {"a": 1}}, vllm_mode="colocate")


def test_without_vllm_trl_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert config({"min_token": 2}).generation_kwargs == {"min_token": 2}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"truncate_prompt_tokens": 8}, "the loss reads the whole prompt"),
        ({"repetition_detection": {"max_pattern_size": 4}}, "completions end with a token"),
        ({"flat_logprobs": True}, "the trainer reads the completions' ids alone"),
    ],
    ids=str,
)
def test_keys_of_vllm_that_are_not_taken(given, words):
    (key,) = given
    with pytest.raises(ValueError, match=f"^generation_kwargs: '{key}' is not taken: {words}"):
        config(given)
