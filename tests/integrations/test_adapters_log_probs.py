"""The adapters of trainers that give log-probs: each framework's own classes where they are
installed, gradients against its own loss, in float32."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from adapters import PPO_CLIP, K, N, assert_same, gradient, make_batch

from tropd_kernels import TopKTeacher, distillation_loss
from tropd_kernels.integrations.log_probs import named_rule


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def batch(draw):
    return make_batch(draw)


@pytest.fixture
def tokens(draw):
    """Log-probs (2, 7) of the student, of the policy that sampled, and of the teacher; a mask."""
    log_probs = (torch.randn(2, 7, generator=draw) / 2 - 2).requires_grad_()
    old = log_probs.detach() + torch.randn(2, 7, generator=draw) / 4
    teacher = torch.randn(2, 7, generator=draw) - 2
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = mask[1, 5] = False
    return log_probs, old, teacher, mask


def test_knobs_without_effect_are_refused():
    """No trainer's loss has a prefix; PPO's clip is refused where nothing gives old log-probs."""
    from tropd_kernels.integrations.skyrl import policy_loss

    policy_loss("opd", **PPO_CLIP, prefix_weight=None)
    with pytest.raises(ValueError, match="skyrl: prefix_weight has no effect here, .* no teacher_"):
        policy_loss("opd", prefix_weight=0.1)
    with pytest.raises(ValueError, match="test: clip_ratio_high has no effect .* old_log_probs"):
        named_rule("test", "opd", dict(clip_ratio_high=0.2), missing=("old_log_probs",))
    with pytest.raises(ValueError, match="skyrl: objective 'reopold' takes its mean over"):
        policy_loss("reopold")


def test_prime_rl_s_reverse_kl_is_opd(tokens):
    """A double of its module: with the reward of the sampling policy, its importance ratio times
    the reference's log-ratio."""
    from tropd_kernels.integrations import prime_rl

    double = ModuleType("loss_of_prime_rl")
    sys.modules["loss_of_prime_rl"] = double
    double.LossOutputs = SimpleNamespace
    inputs_type = type("LossInputs", (SimpleNamespace,), {"__module__": "loss_of_prime_rl"})
    log_probs, old, teacher, mask = (t[0] for t in tokens)
    weights = torch.linspace(0.5, 2, 7)
    inputs = inputs_type(
        trainer_logprobs=log_probs, inference_logprobs=old, ref_logprobs=teacher, advantages=None,
        loss_mask=mask, loss_weights=weights,
    )  # fmt: skip
    ours = prime_rl.loss(inputs, objective="opd")
    ratio = (log_probs - old).exp()
    theirs = -(mask * (teacher - old) * ratio * weights).sum()
    assert_same(ours.loss, theirs, tokens[0])
    assert ours.metrics["tropd/trust"] == 1
    inputs.ref_logprobs = None
    with pytest.raises(ValueError, match="no ref_logprobs"):
        prime_rl.loss(inputs)
    with pytest.raises(ValueError, match=r"trainer\.loss: .*cannot be served: it needs more"):
        prime_rl.loss(inputs, objective="tropd")
    del sys.modules["loss_of_prime_rl"]


@pytest.fixture
def skyrl(monkeypatch):
    """SkyRL's own ppo_utils, with doubles of what it imports of SkyRL, which wants Python 3.12."""
    import importlib.util
    from pathlib import Path

    package = importlib.util.find_spec("skyrl")
    if package is None:
        pytest.skip("needs skyrl: make engines")
    for needed in ("ray", "jaxtyping", "loguru"):
        pytest.importorskip(needed)
    root = Path(package.origin).parent
    names = ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train",
             "skyrl.backends.skyrl_train.utils", "skyrl.train", "skyrl.train.config")  # fmt: skip
    for name in names:
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, module)
    config = sys.modules["skyrl.train.config"]
    for name in ("AlgorithmConfig", "OffPolicyCorrectionConfig"):
        setattr(config, name, SimpleNamespace)
    return importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")


@pytest.mark.parametrize("corrected", [False, True])
def test_skyrl_s_ppo_loss_is_opd_with_its_advantages(skyrl, tokens, corrected, monkeypatch):
    """Also with its correction for a policy that sampled with other log-probs."""
    from tropd_kernels.integrations import skyrl as adapter

    log_probs, old, teacher, mask = tokens
    weights = mask / mask.sum()
    config = SimpleNamespace(
        policy_loss_type="regular", eps_clip_low=0.2, eps_clip_high=0.2,
        off_policy_correction=SimpleNamespace(
            tis_ratio_type="token" if corrected else None, token_tis_ratio_clip_high=1.5,
            sequence_mask_metric=None, outlier_token_is_threshold_low=None,
            outlier_token_is_threshold_high=None, token_mask_is_threshold_low=None,
            token_mask_is_threshold_high=None,
        ),
    )  # fmt: skip
    call = (log_probs, old, teacher - old)
    given = dict(config=config, loss_mask=weights)
    if corrected:
        given["rollout_logprobs"] = old + torch.linspace(-1, 1, 14).view(2, 7)
    theirs, their_metrics = skyrl.ppo_policy_loss(*call, **given)
    assert 0 < their_metrics.pop("clip_ratio")
    name = f"tropd_test_{corrected}"
    adapter.register(name, "opd", **PPO_CLIP)
    ours, metrics = skyrl.PolicyLossRegistry.get(name)(*call, **given)
    assert_same(ours, theirs, log_probs)
    assert bool(their_metrics) == corrected
    assert metrics == {"trust": 1.0} | their_metrics
    with pytest.raises(ValueError, match=name):
        adapter.register(name)
    with pytest.raises(ValueError, match="skyrl: .*cannot be served"):
        adapter.register("other", "gkd")
    monkeypatch.setattr(skyrl, "ppo_policy_loss", lambda log_probs: None)
    with pytest.raises(RuntimeError, match="ppo_policy_loss is .log_probs., expected .log_probs, "):
        adapter.register("other")


@pytest.mark.parametrize("objective", ["opd", "mask_outlier"])
def test_tinker_sends_back_the_gradient(tokens, objective):
    """Through its own client's computation of a custom loss, without a server."""
    tinker = pytest.importorskip("tinker", reason="needs tinker: make engines")
    from tinker.lib.public_interfaces.training_client import TrainingClient

    from tropd_kernels.integrations.tinker import custom_loss

    log_probs, old, teacher, mask = tokens
    floats = lambda t: tinker.TensorData(
        data=t.float().tolist(), dtype="float32", shape=list(t.shape)
    )
    data, outputs = [], []
    for row in range(2):
        data.append(tinker.Datum(
            model_input=tinker.ModelInput.from_ints(list(range(7))),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData(data=[1] * 7, dtype="int64", shape=[7]),
                "teacher_logprobs": floats(teacher[row]), "sampling_logprobs": floats(old[row]),
                "mask": floats(mask[row]),
            },
        ))  # fmt: skip
        outputs.append({"logprobs": floats(log_probs[row].detach())})
    forward = SimpleNamespace(loss_fn_outputs=outputs)
    found = TrainingClient._compute_custom_loss(data, custom_loss(objective), forward)
    reward = teacher - old
    kept = mask & ((reward > -1.3863) if objective == "mask_outlier" else mask)
    theirs = -(kept * reward * (log_probs - old).exp()).sum()
    assert found.loss_sum == pytest.approx(theirs.item(), rel=1e-5)
    weights = torch.stack([d.loss_fn_inputs["weights"].to_torch() for d in found.data])
    torch.testing.assert_close(-weights, gradient(theirs, log_probs), rtol=1e-5, atol=1e-6)
    assert 0 < found.metrics["trust"] <= 1
    for datum in data:  # without a token that counts
        datum.loss_fn_inputs["mask"] = floats(torch.zeros(7))
    none = TrainingClient._compute_custom_loss(data, custom_loss(objective), forward)
    assert (none.loss_sum, none.metrics["trust"]) == (0, 1)
    del data[0].loss_fn_inputs["teacher_logprobs"]
    with pytest.raises(ValueError, match="teacher_logprobs"):
        TrainingClient._compute_custom_loss(data, custom_loss(objective), forward)


ON_TOP_K = {
    "raw": ("forward_kl", dict(top_k=K)),
    "bucket": ("forward_kl", dict(top_k=K, top_k_tail="bucket")),
    "renormalized": ("reverse_kl", dict(top_k=K, top_k_tail="renormalize_both")),
    "reverse": ("reverse_kl", dict(top_k=K)),
}


@pytest.mark.parametrize("name", ON_TOP_K)
def test_tinker_s_log_probs_of_a_top_k_are_logits_of_one_id_more(batch, name):
    """Through its client: the gradient that reaches whole logits is that of the loss on them."""
    tinker = pytest.importorskip("tinker", reason="needs tinker: make engines")
    from tinker.lib.public_interfaces.training_client import TrainingClient

    from tropd_kernels.integrations.tinker import custom_loss

    logits, teacher, labels = batch
    objective, knobs = ON_TOP_K[name]
    top = teacher.log_softmax(-1).topk(K)
    mask = labels != -100
    log_probs = logits.log_softmax(-1).gather(-1, top.indices)

    def sent(tensor, kind="float32"):
        shape = list(tensor.shape)
        return tinker.TensorData(data=tensor.flatten().tolist(), dtype=kind, shape=shape)

    data = [tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(range(N // 2))),
        loss_fn_inputs={"target_tokens": sent(top.indices[row], "int64"),
                        "teacher_logprobs": sent(top.values[row]), "mask": sent(mask[row].float())},
    ) for row in range(2)]  # fmt: skip
    outputs = [{"logprobs": sent(log_probs[row].detach())} for row in range(2)]
    forward = SimpleNamespace(loss_fn_outputs=outputs)
    found = TrainingClient._compute_custom_loss(data, custom_loss(objective, **knobs), forward)
    weights = torch.stack([d.loss_fn_inputs["weights"].to_torch() for d in found.data])
    answers = TopKTeacher(top.indices, top.values, top.values[..., 0])
    rule = named_rule("test", objective, knobs)
    truth = distillation_loss(
        logits, labels, answers, replace(rule, top_k=K), reduction="sum", backend="reference"
    )
    assert found.loss_sum == pytest.approx(truth.loss.item(), rel=1e-5)
    expected = gradient(truth.loss, logits)
    theirs = gradient(-(weights.view_as(log_probs) * log_probs).sum(), logits)
    close = dict(rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(theirs, expected, **close)


def test_tinker_s_forms_are_told_apart(tokens):
    from tropd_kernels.integrations.tinker import custom_loss

    class Field:
        def __init__(self, tensor):
            self.to_torch = lambda: tensor

    log_probs = tokens[0].detach()
    for objective, knobs, given, form in (
        ("opd", {}, log_probs, r"'opd' takes target_tokens \(T\), sampled"),
        ("forward_kl", dict(top_k=K), log_probs[0], r"takes target_tokens \(T, K\)"),
    ):
        datum = SimpleNamespace(loss_fn_inputs={"teacher_logprobs": Field(given)})
        with pytest.raises(ValueError, match=form):
            custom_loss(objective, **knobs)([datum], [given])
    given = log_probs[0][:, None].expand(-1, K - 1)
    datum = SimpleNamespace(loss_fn_inputs={"teacher_logprobs": Field(given)})
    with pytest.raises(ValueError, match=f"tinker: .*{K - 1} ids a token.*top_k={K}"):
        custom_loss("forward_kl", top_k=K)([datum], [given])
    for objective, knobs, why in (
        ("tropd", {}, "policy_gradient, gate reads more"),
        ("gkd", {}, "needs more of the teacher"),
        ("forward_kl", dict(top_k=K, top_k_ids="student"), "top_k_ids"),
    ):
        with pytest.raises(ValueError, match=f"tinker: .*{why}"):
            custom_loss(objective, **knobs)
