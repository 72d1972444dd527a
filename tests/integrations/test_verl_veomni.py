"""VeOmni's hook: its own function of hidden states, from its source, and a double of verl's engine
for it, for VeOmni's models want another transformers than this one."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make engines")

import verl_engine as helper
from verl_engine import K, V, gradients, loss_function, make_batch

from tropd_kernels import Divergence
from tropd_kernels.integrations import verl as integration  # noqa: F401  it registers
from tropd_kernels.integrations import verl_fused, verl_replaced
from tropd_kernels.integrations.verl_rows import Rows


@pytest.fixture
def kernels(monkeypatch):
    """The module of VeOmni's function, with a double of what it imports beside torch."""
    package = importlib.util.find_spec("veomni")
    if package is None:
        pytest.skip("needs veomni: make engines")
    source = Path(package.origin).parent / "ops/kernels/cross_entropy/chunk_topk_distill.py"
    names = ("veomni", "veomni.distributed", "veomni.ops", "veomni.ops.kernels",
             "veomni.ops.kernels.cross_entropy", "veomni.distributed.parallel_state")  # fmt: skip
    for name in names:
        module = ModuleType(name)
        module.__path__ = [str(source.parent)] if name.endswith("cross_entropy") else []
        monkeypatch.setitem(sys.modules, name, module)
    state = SimpleNamespace(sp_enabled=False)
    sys.modules["veomni.distributed.parallel_state"].get_parallel_state = lambda: state
    name = "veomni.ops.kernels.cross_entropy.chunk_topk_distill"
    spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_veomni_s_own_forward_kl_is_ours_on_raw_masses(kernels):
    draw = torch.Generator().manual_seed(0)
    n, hidden_size, temperature = 13, 8, 0.7
    hidden = torch.randn(1, n, hidden_size, generator=draw)
    weight = torch.randn(V, hidden_size, generator=draw) / 3
    labels = torch.randint(V, (n,), generator=draw)
    labels[::4] = -100
    top = (2 * torch.randn(n, V, generator=draw)).log_softmax(-1).topk(K)
    rows = Rows(labels, top.indices, top.values, torch.rand(n, generator=draw))
    rule = Divergence("forward_kl", top_k=K, top_k_tail="raw")
    theirs = kernels.chunk_topk_distill_function
    verl_replaced.take_over_hidden(kernels)
    request = verl_fused.Request(labels, rule, rows, K)
    outputs = []
    for ours in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        verl_replaced.CURRENT.set(request if ours else None)
        output = kernels.chunk_topk_distill_function(
            *leaves, labels, top.indices[None], top.values[None], shift_labels=labels[None],
            temperature=temperature,
        )  # fmt: skip
        verl_replaced.CURRENT.set(None)
        scale = torch.linspace(0.5, 2, n)
        (sum((value * scale).sum() for value in output[:3])).backward()
        outputs.append([*output, *(leaf.grad for leaf in leaves)])
    assert kernels.chunk_topk_distill_function is not theirs
    for name, a, b in zip(
        ["log_probs", "entropy", "losses", "student", "teacher", "hidden", "weight"], *outputs
    ):
        torch.testing.assert_close(
            b, a, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert set(request.found) == {"tropd_trust", "tropd_label_in_topk"}


def test_a_veomni_of_another_version_is_named(kernels):
    kernels.chunk_topk_distill_function = lambda hidden_states, weights: None
    with pytest.raises(
        RuntimeError, match="chunk_topk_distill_function is .hidden_states, weights"
    ):
        verl_replaced.take_over_hidden(kernels)


def test_another_veomni_leaves_verl_s_engine_and_the_others_ours(kernels, monkeypatch):
    from verl.workers.engine import EngineRegistry

    monkeypatch.setattr(EngineRegistry, "_engines", copy.deepcopy(EngineRegistry._engines))
    monkeypatch.setattr(verl_fused, "VeOmniEngineWithLMHead", type("Engine", (), {}))
    with pytest.warns(UserWarning, match="veomni engine.*chunk_topk_distill_function is missing"):
        verl_fused.register_engines((("cpu", "another"),))
    engines = EngineRegistry._engines["language_model"]
    assert engines["fsdp"]["cpu", "another"] is verl_fused.FusedEngine
    assert ("cpu", "another") not in engines.get("veomni", {})


@pytest.mark.parametrize("name", ["tropd", "tropd_forward_kl", "tropd_opd"])
def test_verl_s_engine_for_veomni_forms_the_losses_from_hidden_states(
    group, tmp_path, kernels, name, monkeypatch
):
    """A double of `VeOmniEngineWithLMHead`: it gives the teacher's tensors to the model, which
    gives them to the function, as ForCausalLMLoss does."""
    from verl.workers.engine import FSDPEngineWithLMHead

    helper.use_cpu(monkeypatch)
    verl_fused.register_engines((("cpu", "any"),))
    verl_replaced.take_over_hidden(kernels)
    form = "sampled" if name == "tropd_opd" else "top_k"

    class Engine(FSDPEngineWithLMHead):
        def prepare_model_inputs(self, micro_batch):
            inputs, arguments = super().prepare_model_inputs(micro_batch)
            if form == "top_k":
                inputs["teacher_topk_ids"] = micro_batch["teacher_ids"].values()[None]
                inputs["teacher_topk_log_probs"] = micro_batch["teacher_logprobs"].values()[None]
            return inputs, arguments

        def _build_module(self):
            module = super()._build_module()

            def forward(input_ids, position_ids, shift_labels, temperature, teacher_topk_ids=None,
                        teacher_topk_log_probs=None, attention_mask=None, **_):  # fmt: skip
                where = dict(position_ids=position_ids, use_cache=False)
                hidden = module.model(input_ids=input_ids, **where)[0]
                ids, log_probs = teacher_topk_ids, teacher_topk_log_probs
                if ids is None:
                    ids, log_probs = shift_labels[..., None], hidden[..., :1].detach()
                values = kernels.chunk_topk_distill_function(
                    hidden, module.lm_head.weight, input_ids, ids, log_probs,
                    shift_labels=shift_labels, temperature=temperature,
                )  # fmt: skip
                names = ("log_probs", "entropy", "distillation_losses", "student_mass",
                         "teacher_mass")  # fmt: skip
                return verl_fused.FusedOutput(**dict(zip(names, values)))

            module.forward = forward
            return module

    monkeypatch.setattr(verl_fused, "FSDPEngineWithLMHead", Engine)
    folder = helper.make_model(tmp_path, tie_word_embeddings=True)
    double = type("Double", (verl_fused.FusedVeOmni, Engine), {})
    theirs = gradients(
        helper.make_engine(folder, False), make_batch(form, False), loss_function(name)
    )
    with monkeypatch.context() as patch:
        from verl.workers.engine import EngineRegistry

        patch.setattr(EngineRegistry, "get_engine_cls", lambda *_: double)
        engine = helper.make_engine(folder, True)
    ours = gradients(engine, make_batch(form, True), loss_function(name))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    for parameter, gradient in theirs[1].items():
        close = dict(rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
        torch.testing.assert_close(ours[1][parameter], gradient, **close)
    assert ours[0]["metrics"].keys() == theirs[0]["metrics"].keys()
    assert verl_replaced.CURRENT.get() is None
