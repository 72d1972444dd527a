"""The label's log-prob from verl's teachers: its own functions, without the servers around them."""

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make engines")
pytest.importorskip("fastapi", reason="verl's servers import it: make engines")

import verl
from verl_engine import function_of

from tropd_kernels.integrations import verl as integration  # noqa: F401  it registers
from tropd_kernels.integrations import verl_replaced, verl_teacher

ROLLOUT = Path(verl.__file__).parent / "workers/rollout"
K = 2
#: Of three positions behind the first, the likeliest two ids and the label, with their log-probs.
TOP = [{5: -0.2, 7: -1.9}, {3: -0.5, 9: -1.0}, {1: -0.1, 2: -3.0}]
LABELS = [(7, -1.9), (4, -6.0), (1, -0.1)]


def vllm_answer():
    """A dict of each position: the prompt's own token first, then the likeliest, with ranks."""
    rows = [None]
    for top, (label, log_prob) in zip(TOP, LABELS):
        ranks = {token: rank for rank, token in enumerate(top, 1)}
        entries = {label: log_prob, **top}
        rows.append({
            token: SimpleNamespace(logprob=value, rank=ranks.get(token, 40))
            for token, value in entries.items()
        })  # fmt: skip
    return SimpleNamespace(prompt_logprobs=rows)


def sglang_answer():
    labels = [(log_prob, token, None) for token, log_prob in LABELS]
    top = [[(value, token, None) for token, value in row.items()] for row in TOP]
    return {
        "input_token_logprobs": [(None, 8, None), *labels],
        "input_top_logprobs": [None, *top],
    }


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_the_label_s_column_stands_behind_the_k_that_verl_sends(server):
    if server == "vllm":
        module = function_of(ROLLOUT / "vllm_rollout/utils.py", "extract_prompt_logprobs")
        call = lambda result, k: module.extract_prompt_logprobs(vllm_answer(), k, result)
    else:
        path = ROLLOUT / "sglang_rollout/async_sglang_server.py"
        module = function_of(path, "_extract_prompt_logprobs_sglang")
        call = lambda result, k: module._extract_prompt_logprobs_sglang(
            sglang_answer(), k, len(LABELS) + 1, result
        )
    theirs, alone = {}, {}
    call(theirs, K)
    call(alone, 0)
    for _ in range(2):  # a second time does nothing
        verl_replaced.keep_labels(module)
    ours, sampled = {}, {}
    call(ours, K)
    call(sampled, 0)
    assert sampled == alone
    for name, at, dummy in (("prompt_ids", 0, 0), ("prompt_logprobs", 1, 0.0)):
        assert [row[:K] for row in ours[name]] == theirs[name]
        assert [row[K] for row in ours[name]] == [label[at] for label in LABELS] + [dummy]
    torch.tensor(ours["prompt_logprobs"])


def test_functions_of_another_verl_are_named():
    module = function_of(ROLLOUT / "vllm_rollout/utils.py", "extract_prompt_logprobs")
    original = module.extract_prompt_logprobs
    module.extract_prompt_logprobs = lambda output, num_prompt_logprobs, result_dict: None
    with pytest.warns(UserWarning, match=r"utils.extract_prompt_logprobs is another.*verl 0.9.1"):
        verl_replaced.keep_labels(module)
    module.extract_prompt_logprobs = lambda output, result_dict: original
    with pytest.raises(RuntimeError, match=r"extract_prompt_logprobs is \(output, result_dict\)"):
        verl_replaced.keep_labels(module)


@pytest.mark.parametrize(("loss_mode", "width"), [("forward_kl_topk", K), ("tropd", K + 1)])
def test_verl_s_own_losses_get_k_columns(loss_mode, width):
    from verl.experimental.teacher_loop.teacher_manager import AsyncTeacherLLMServerManager
    from verl.workers.config import DistillationLossConfig

    manager = object.__new__(AsyncTeacherLLMServerManager)
    manager.distillation_loss_config = DistillationLossConfig(
        loss_mode=loss_mode, topk=K, use_policy_gradient=False
    )
    inference = SimpleNamespace(temperature=1.0)
    manager.teacher_model_configs = {"default": SimpleNamespace(inference=inference)}
    asked = []

    class Client:
        async def generate(self, sampling_params, prompt_ids, **_):
            asked.append(sampling_params["prompt_logprobs"])
            rows = [[0] * (K + 1) for _ in prompt_ids]
            return SimpleNamespace(extra_fields={"prompt_ids": rows, "prompt_logprobs": rows})

    manager.teacher_client = {"default": Client()}
    found = asyncio.run(manager.compute_teacher_logprobs_single([1, 2, 3]))
    assert asked == [K] and [tuple(t.shape) for t in found] == [(3, width)] * 2


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_verl_s_registry_gives_a_teacher_s_server_of_ours(name, monkeypatch):
    """With doubles of the two servers' modules; the rollout's server stays verl's."""
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    if name == "vllm":
        path, prefix = "vllm_rollout.vllm_async_server", "vLLM"
        module = function_of(ROLLOUT / "vllm_rollout/utils.py", "extract_prompt_logprobs")
    else:
        path, prefix = "sglang_rollout.async_sglang_server", "SGLang"
        source = ROLLOUT / "sglang_rollout/async_sglang_server.py"
        module = function_of(source, "_extract_prompt_logprobs_sglang")

    class Replica:
        def __init__(self, is_teacher_model):
            self.is_teacher_model, self.server_class = is_teacher_model, "verl's"

    setattr(module, f"{prefix}Replica", Replica)
    setattr(module, f"{prefix}HttpServer", type("HttpServer", (), {}))
    folder = f"verl.workers.rollout.{path.split('.')[0]}"
    package = ModuleType(folder)
    setattr(package, path.split(".")[1], module)
    monkeypatch.setitem(sys.modules, folder, package)
    monkeypatch.setitem(sys.modules, f"verl.workers.rollout.{path}", module)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    for ours in verl_teacher.REPLICAS.values():
        monkeypatch.delitem(sys.modules, f"tropd_kernels.integrations.{ours}", raising=False)
    replica = RolloutReplicaRegistry.get(name)
    assert issubclass(replica, Replica)
    assert replica(is_teacher_model=False).server_class == "verl's"
    server = replica(is_teacher_model=True).server_class.__ray_metadata__.modified_class
    assert server.__module__ == f"tropd_kernels.integrations.verl_{name}"
    assert any(getattr(f, "serves_tropd", False) for f in vars(module).values())
    # Not left for later tests, which have the doubles no longer.
    monkeypatch.delitem(sys.modules, f"tropd_kernels.integrations.verl_{name}")
