"""What is an error: arguments, values of tensors, devices and backends.

Every error names the argument, as the caller spelt it, and says what was expected or what to do.
"""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
from calls import (
    BACKENDS,
    INF,
    NAN,
    SHAPE,
    WRONG,
    G,
    H,
    K,
    V,
    filled,
    head_loss,
    hidden_teacher,
    labels,
    log_probs,
    logits_loss,
    of,
    refused,
    top_k_teacher,
)

from tropd_kernels import (
    GKD,
    DistillationLoss,
    Divergence,
    LinearDistillationLoss,
    LinearLogProbs,
    LogitsTeacher,
    SampledTeacher,
    TokenRule,
    TrOPD,
    Veto,
    available_backends,
    backends,
    plan_chunks,
)
from tropd_kernels.backends import choose_backend


def test_nothing_is_wrong_without_the_changes():
    assert head_loss().loss.isfinite()
    assert logits_loss().loss.isfinite()
    assert log_probs().isfinite().all()


# --- the student and its head -------------------------------------------------------------------

HEADS = {
    "hidden is no tensor": (dict(hidden=[1.0]), TypeError, "student hidden", "list"),
    "weight is no tensor": (dict(weight=None), TypeError, "student weight"),
    "weight of one dimension": (dict(weight=of(V)), ValueError, "student weight", "(V, H)", "(7,)"),
    "an empty head": (dict(weight=of(0, H)), ValueError, "student weight", "0 rows", "gather it"),
    "hidden of another width": (
        dict(hidden=of(*SHAPE, H + 1)), ValueError, "student hidden", "(*, 4)", "(2, 3, 5)",
    ),
    "hidden of integers": (
        dict(hidden=labels(*SHAPE, H)), TypeError, "student hidden", "float", "int64",
    ),
    "a quantised head": (
        dict(weight=of(V, H).to(torch.float8_e4m3fn)), TypeError, "student weight", "float8_e4m3fn",
        "bfloat16", "dequantise",
    ),
    "bias is no tensor": (dict(bias=0.5), TypeError, "student bias"),
    "bias of integers": (dict(bias=labels(V)), TypeError, "student bias", "float", "int64"),
    "bias of another height": (dict(bias=of(V + 1)), ValueError, "student bias", "(7,)", "(8,)"),
    "scale 0": (dict(logit_scale=0), ValueError, "student logit_scale", "not 0"),
    "scale NaN": (dict(logit_scale=NAN), ValueError, "student logit_scale", "finite"),
    "scale of text": (dict(logit_scale="1"), WRONG, "student logit_scale"),
    "cap 0": (dict(softcap=0.0), ValueError, "student softcap", "positive", "None"),
    "cap below 0": (dict(softcap=-30.0), ValueError, "student softcap", "positive", "None"),
    "cap NaN": (dict(softcap=NAN), ValueError, "student softcap", "positive", "None"),
    "cap of text": (dict(softcap="30"), WRONG, "student softcap"),
    "workspace 0": (dict(max_workspace_bytes=0), ValueError, "max_workspace_bytes", "positive"),
    "workspace of text": (dict(max_workspace_bytes="1 GB"), WRONG, "max_workspace_bytes"),
    "workspace of a bool": (dict(max_workspace_bytes=True), WRONG, "max_workspace_bytes", "True"),
    "workspace of a fraction": (dict(max_workspace_bytes=1e9), WRONG, "max_workspace_bytes"),
    "workspace too small": (
        dict(max_workspace_bytes=999), ValueError, "max_workspace_bytes=999", "too small", "take",
    ),
    "workspace of the reference": (
        dict(max_workspace_bytes=10**9, backend="reference"), NotImplementedError,
        "backend='reference'", "max_workspace_bytes", "'torch'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("call", [head_loss, log_probs])
def test_heads(case, call):
    changes, error, *words = HEADS[case]
    refused(lambda: call(**changes), error, *words)


PLANS = {
    "tokens of a fraction": (dict(tokens=100.0), "tokens", "int", "100.0"),
    "tokens below 0": (dict(tokens=-1), "tokens", "at least 0", "-1"),
    "no vocabulary": (dict(vocab_size=0), "vocab_size", "at least 1"),
    "a width of a fraction": (dict(hidden_size=8.5), "hidden_size", "int", "8.5"),
    "a teacher without width": (dict(teacher_hidden_size=0), "teacher_hidden_size", "at least 1"),
    "backend unknown": (dict(backend="foo"), "backend", "'triton'", "'foo'"),
    "the reference": (dict(backend="reference"), "backend", "'triton'", "'reference'"),
    "reduction unknown": (dict(reduction="nonne"), "reduction", "'none'", "'nonne'"),
    "objective of text": (dict(objective="gkd"), "objective", "TokenRule", "'gkd'"),
    "workspace of text": (dict(max_workspace_bytes="1 GB"), "max_workspace_bytes", "'1 GB'"),
    "dtype of text": (dict(dtype="bfloat16"), "dtype", "torch.bfloat16", "'bfloat16'"),
    "dtype of integers": (dict(dtype=torch.int8), "dtype", "torch.float16", "torch.int8"),
    "a quantised head": (
        dict(weight_dtype=torch.float8_e4m3fn), "weight_dtype", "dequantised", "float8_e4m3fn",
    ),
    "a teacher's dtype": (dict(teacher_weight_dtype="half"), "teacher_weight_dtype", "'half'"),
    "a reference's dtype": (dict(reference_weight_dtype=1), "reference_weight_dtype", "1"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_plans(case):
    changes, *words = PLANS[case]
    given = dict(tokens=100, vocab_size=V, hidden_size=H) | changes
    refused(lambda: plan_chunks(**given), WRONG, *words)


PER_TOKEN = [
    "old_log_probs", "advantages", "task_advantages", "token_weight", "uniforms", "teacher_prefix",
    "mixing", "blending",
]  # fmt: skip


@pytest.mark.parametrize("module", [LinearDistillationLoss, DistillationLoss, LinearLogProbs])
def test_modules_are_refused_before_their_first_call(module):
    refused(lambda: module(temprature=2.0), TypeError, module.__name__, "mean 'temperature'")
    refused(lambda: module(labels=labels()), TypeError, module.__name__, "'labels'")
    if module is LinearLogProbs:
        refused(lambda: module(objective=GKD()), TypeError, "'objective'")
        refused(lambda: module(seed=1), TypeError, "no option 'seed'")  # nor does its call take it
    else:
        refused(lambda: module("tropd"), TypeError, "objective", "TokenRule", "'tropd'")
        refused(lambda: module(""), TypeError, "objective", "TokenRule")


@pytest.mark.parametrize("name", ["seed", "ids", "reference_teacher", *PER_TOKEN])
@pytest.mark.parametrize("module", [LinearDistillationLoss, DistillationLoss])
def test_a_module_is_given_what_changes_by_the_call(module, name):
    """A seed that it held would draw the same at every step."""
    refused(lambda: module(**{name: 1}), TypeError, module.__name__, name, "batch", "to the call")


def test_logits():
    quantised = of(*SHAPE, V).to(torch.float8_e4m3fn)
    refused(lambda: logits_loss(logits=quantised), TypeError, "logits", "float8", "bfloat16")
    refused(lambda: logits_loss(logits=None), TypeError, "logits", "NoneType")
    refused(lambda: logits_loss(logits=labels(*SHAPE, V)), TypeError, "logits", "float", "int64")
    refused(lambda: logits_loss(logits=of(*SHAPE, 0)), ValueError, "logits", "(*, V)")
    refused(lambda: logits_loss(logits=of()), ValueError, "logits", "(*, V)")


# --- arguments of every call --------------------------------------------------------------------

EVERYWHERE = {
    "labels of another shape": (
        dict(labels=labels(2, 2)), ValueError, "labels", "int64", "(2, 3)", "(2, 2)", "shift",
    ),
    "labels of 32 bits": (
        dict(labels=labels().int()), TypeError, "labels", "int64", "int32", ".long()",
    ),
    "labels of floats": (dict(labels=of(*SHAPE)), TypeError, "labels", "int64", "float32"),
    "labels of a list, at length": (
        dict(labels=[0] * 10**5), ValueError, "labels", "int64", "got a list",
    ),
    "labels are no tensor": (dict(labels=[0, 1]), ValueError, "labels", "int64", "(2, 3)"),
    "temperature 0": (dict(temperature=0), ValueError, "temperature", "positive", "0"),
    "temperature below 0": (dict(temperature=-1.0), ValueError, "temperature", "positive"),
    "temperature NaN": (dict(temperature=NAN), ValueError, "temperature", "positive"),
    "temperature infinite": (dict(temperature=INF), ValueError, "temperature", "positive"),
    "temperature of a bool": (dict(temperature=True), WRONG, "temperature", "number", "True"),
    "temperature of a list": (dict(temperature=[1.0] * 10**5), WRONG, "temperature", "[1.0, 1.0"),
    "temperature of text": (dict(temperature="1"), WRONG, "temperature", "'1'"),
    "ignore_index of a fraction": (
        dict(ignore_index=0.5), TypeError, "ignore_index", "int or None", "0.5",
    ),
    "ignore_index of a bool": (dict(ignore_index=True), TypeError, "ignore_index", "True"),
    "backend unknown": (dict(backend="cuda"), ValueError, "backend", "'triton'", "'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("call", [head_loss, logits_loss, log_probs])
def test_every_call(case, call):
    changes, error, *words = EVERYWHERE[case]
    refused(lambda: call(**changes), error, *words)


LOSSES = {
    "reduction unknown": (dict(reduction="avg"), ValueError, "reduction", "'mean'", "'avg'"),
    "reduction None": (dict(reduction=None), ValueError, "reduction", "'mean'", "None"),
    "normalizer 0": (dict(normalizer=0), ValueError, "normalizer", "positive"),
    "normalizer below 0": (dict(normalizer=-2.0), ValueError, "normalizer", "positive"),
    "normalizer NaN": (dict(normalizer=NAN), ValueError, "normalizer", "positive"),
    "normalizer infinite": (dict(normalizer=INF), ValueError, "normalizer", "positive"),
    "normalizer of a bool": (dict(normalizer=True), WRONG, "normalizer", "positive", "True"),
    "normalizer of text": (dict(normalizer="3"), WRONG, "normalizer", "positive"),
    "normalizer of a sum": (
        dict(normalizer=3.0, reduction="sum"), ValueError, "normalizer", "'mean'", "'sum'",
    ),
    "normalizer of each": (
        dict(normalizer=3.0, reduction="none"), ValueError, "normalizer", "'mean'", "'none'",
    ),
    "normalizers": (dict(normalizer=torch.ones(2)), ValueError, "normalizer", "one", "(2,)"),
    "objective of text": (dict(objective="tropd"), TypeError, "objective", "TokenRule", "'tropd'"),
    "objective not called": (dict(objective=GKD), TypeError, "objective", "TokenRule"),
    "no draws": (
        dict(objective=TrOPD(top_k=K)), ValueError, "seed=", "uniforms=", "gate='expected'",
    ),
    "seed of a fraction": (dict(objective=TrOPD(top_k=K), seed=0.5), TypeError, "seed", "int"),
    "seed of NumPy": (
        dict(objective=TrOPD(top_k=K), seed=numpy.int64(3)), TypeError, "int64", "int(seed)",
    ),
    "no teacher": (dict(teacher=None), ValueError, "needs a teacher", "SFT()"),
    "a tensor as teacher": (
        dict(teacher=of(*SHAPE, V)), TypeError, "teacher", "HiddenTeacher", "LogitsTeacher",
        "TopKTeacher", "SampledTeacher", "Tensor",
    ),
    "teacher of other tokens": (
        dict(teacher=LogitsTeacher(of(6, V))), ValueError, "LogitsTeacher", "(6,)", "labels",
        "(2, 3)",
    ),
    "teacher of other tokens, sampled": (
        dict(teacher=SampledTeacher(of(3, 2))), ValueError, "SampledTeacher", "(3, 2)", "labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_losses(case, call):
    changes, error, *words = LOSSES[case]
    refused(lambda: call(**changes), error, *words)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_a_teacher_of_another_precision(call, backend, device):
    """float64 on one side alone: its logits have no room in the other's."""
    with torch.device(device):
        teacher = hidden_teacher(hidden=of(*SHAPE, G).double(), weight=of(V, G).double())
        refused(
            lambda: call(teacher=teacher, backend=backend),
            TypeError, "teacher hidden", "float64", "float32", "cast",
        )  # fmt: skip
        # Half precision goes with any other.
        teacher = hidden_teacher(hidden=of(*SHAPE, G).bfloat16(), weight=of(V, G).bfloat16())
        assert call(teacher=teacher, backend=backend).loss.isfinite()


# --- per-token tensors --------------------------------------------------------------------------

TASK = TokenRule(task_weight=1.0)


@pytest.mark.parametrize("name", PER_TOKEN)
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_per_token_tensors(name, call):
    readers = {
        "mixing": Divergence("mixed"), "task_advantages": TASK, "blending": Veto(student_power=0.5),
    }  # fmt: skip
    if name in readers:
        call = partial(call, objective=readers[name])
    boolean = name == "teacher_prefix"
    dtype = torch.bool if boolean else torch.float32
    good = torch.zeros(SHAPE, dtype=dtype)
    refused(lambda: call(**{name: good[:, :2]}), ValueError, name, "labels' shape (2, 3)", "(2, 2)")
    refused(lambda: call(**{name: good.tolist()}), ValueError, name, "tensor", "list")
    refused(lambda: call(**{name: good.to("meta")}), ValueError, name, "meta", "cpu", "move")
    wanted = "bool" if boolean else "float"
    remedy = f"{name}.{wanted}()"
    refused(lambda: call(**{name: good.int()}), TypeError, name, wanted, "int32", remedy)
    if not boolean:
        leaf = good.clone().requires_grad_()
        refused(lambda: call(**{name: leaf}), ValueError, name, "requires grad", "detached")


@pytest.mark.parametrize("rule", [TASK, TokenRule(reward_filter="negative")])
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_task_advantages_and_the_rules_that_read_them(rule, call):
    refused(
        lambda: call(objective=rule), ValueError, "TokenRule(", "task_advantages", "shaped like",
    )  # fmt: skip
    refused(
        lambda: call(task_advantages=torch.ones(SHAPE)), ValueError, "task_advantages",
        "no effect", "task_weight", "reward_filter",
    )  # fmt: skip
    assert call(objective=rule, task_advantages=torch.ones(SHAPE)).loss.isfinite()


@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_advantages_of_a_rule_without_a_reward(call):
    given = {"advantages": torch.ones(SHAPE)}
    refused(
        lambda: call(objective=Divergence("jsd"), **given), ValueError, "advantages", "no effect",
        "divergence='jsd'", "policy_gradient",
    )  # fmt: skip
    gated = TokenRule(policy_gradient=0.0, gate="threshold", outlier="forward_kl")
    assert call(objective=gated, **given).loss.isfinite()


def mixed(weight):
    return dict(objective=Divergence("mixed"), mixing=filled(weight))


def blended(weight):
    return dict(objective=Veto(student_power=0.5), blending=filled(weight))


VALUES = {
    "label too large": (lambda: dict(labels=filled(V)), "label 7", "ignore_index=-100", "mask"),
    "label too large for the teacher": (
        lambda: dict(labels=filled(V - 1), teacher=LogitsTeacher(of(*SHAPE, V - 1))),
        "label 6", "vocabulary of 6", "share", "tokenizer",
    ),
    "label below 0": (lambda: dict(labels=filled(-1)), "label -1", "ignore_index=-100", "mask"),
    "label ignored elsewhere": (
        lambda: dict(labels=filled(-100), ignore_index=-1), "label -100", "ignore_index=-1",
    ),
    "weight NaN": (lambda: dict(token_weight=filled(NAN)), "token_weight", "not finite"),
    "weight infinite": (lambda: dict(token_weight=filled(INF)), "token_weight", "not finite"),
    "advantage NaN": (lambda: dict(advantages=filled(NAN)), "advantages", "not finite"),
    "advantage infinite": (lambda: dict(advantages=filled(-INF)), "advantages", "not finite"),
    "task's advantage NaN": (
        lambda: dict(objective=TASK, task_advantages=filled(NAN)), "task_advantages", "not finite",
    ),
    "old log-prob infinite": (
        lambda: dict(old_log_probs=filled(-INF)), "old_log_probs", "not finite",
    ),
    "old probabilities": (
        lambda: dict(old_log_probs=torch.rand(SHAPE) / 2 + 0.5),
        "old_log_probs hold", "above 0", "probabilities", "logarithm",
    ),
    "old negative log-likelihoods": (
        lambda: dict(old_log_probs=torch.rand(SHAPE) + 1.5),
        "old_log_probs hold", "above 0", "negative log-likelihoods", "sign",
    ),
    "one old log-prob above 0": (
        lambda: dict(old_log_probs=torch.arange(-3.0, 3.0).reshape(SHAPE)),
        "old_log_probs hold", "above 0", "up to 2", "check what the policy that sampled",
    ),
    "sampled probabilities": (
        lambda: dict(teacher=SampledTeacher(torch.rand(SHAPE) / 2 + 0.5)),
        "teacher label_log_probs", "above 0", "probabilities", "logarithm",
    ),
    "sampled negative log-likelihoods": (
        lambda: dict(teacher=SampledTeacher(torch.rand(SHAPE) + 1.5)), "teacher label_log_probs",
        "above 0", "negative log-likelihoods", "sign",
    ),
    "sampled logits": (
        lambda: dict(teacher=SampledTeacher(torch.arange(-3.0, 3.0).reshape(SHAPE))),
        "teacher label_log_probs", "above 0", "up to 2", "check",
    ),
    "sampled NaN": (
        lambda: dict(teacher=SampledTeacher(filled(NAN))),
        "teacher label_log_probs", "NaN", "check",
    ),
    "top-k NaN": (
        lambda: dict(teacher=top_k_teacher(log_probs=filled(NAN, (*SHAPE, K)))),
        "teacher log_probs", "NaN", "-inf",
    ),
    "top-k probabilities": (
        lambda: dict(teacher=top_k_teacher(log_probs=filled(0.25, (*SHAPE, K)))),
        "teacher log_probs", "above 0", "probabilities", "logarithm",
    ),
    "top-k logits": (
        lambda: dict(teacher=top_k_teacher(log_probs=filled(9.0, (*SHAPE, K)))),
        "teacher log_probs", "above 0", "up to 9", "logits", "logsumexp",
    ),
    "uniform 1": (lambda: dict(uniforms=filled(1.0)), "uniforms", "[0, 1)", "torch.rand"),
    "uniform below 0": (lambda: dict(uniforms=filled(-0.1)), "uniforms", "[0, 1)", "torch.rand"),
    "uniform NaN": (lambda: dict(uniforms=filled(NAN)), "uniforms", "[0, 1)", "torch.rand"),
    "mixing above 1": (lambda: mixed(1.01), "mixing", "[0, 1]", "forward KL"),
    "mixing below 0": (lambda: mixed(-0.01), "mixing", "[0, 1]", "forward KL"),
    "mixing NaN": (lambda: mixed(NAN), "mixing", "[0, 1]", "forward KL"),
    "blending above 1": (lambda: blended(1.01), "blending", "[0, 1]", "0 the teacher"),
    "blending below 0": (lambda: blended(-0.01), "blending", "[0, 1]", "0 the teacher"),
    "blending NaN": (lambda: blended(NAN), "blending", "[0, 1]", "0 the teacher"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_values(case, backend, call, device):
    make, *words = VALUES[case]
    with torch.device(device):
        refused(lambda: call(**make(), backend=backend), ValueError, *words)


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_tokens_that_do_not_count_may_hold_anything(case, backend, call, device):
    with torch.device(device):
        changes = VALUES[case][0]() | dict(backend=backend)
        if case.startswith("label"):
            changes["token_weight"] = filled(0.0)
        else:
            changes["labels"] = filled(-100)
        assert call(**changes).loss == 0


@pytest.mark.parametrize("beside", [7.0, NAN])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_that_rounding_or_padding_puts_above_0(backend, beside, device):
    """Half a step of bf16 between 32 and 64, and whatever stands beside an id that is none."""
    with torch.device(device):
        ids, log_probs = torch.arange(K).repeat(*SHAPE, 1), filled(0.125, (*SHAPE, K))
        ids[..., 0], log_probs[..., 0] = -1, beside
        ids[..., 1], log_probs[..., 1] = V, INF
        teacher = top_k_teacher(ids=ids, log_probs=log_probs, label_log_probs=filled(0.125))
        found = head_loss(teacher=teacher, backend=backend, old_log_probs=filled(0.125))
        assert found.loss.isfinite()


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "bias", "labels"])
@pytest.mark.parametrize("call", [head_loss, log_probs])
def test_a_head_on_another_device(name, call):
    """Without the error, log-probs come out of memory that nobody wrote."""
    elsewhere = dict(weight=of(V, H), bias=of(V), labels=labels())[name].to("meta")
    refused(lambda: call(**{name: elsewhere}), ValueError, name, "meta", "cpu", "move")


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        (lambda: hidden_teacher(weight=of(V, G, device="meta")), "teacher weight"),
        (lambda: hidden_teacher(hidden=of(*SHAPE, G, device="meta")), "teacher hidden"),
        (lambda: hidden_teacher(bias=of(V, device="meta")), "teacher bias"),
        (lambda: LogitsTeacher(of(*SHAPE, V, device="meta")), "teacher logits"),
        (lambda: SampledTeacher(of(*SHAPE, device="meta")), "teacher label_log_probs"),
        (lambda: top_k_teacher(log_probs=of(*SHAPE, K, device="meta")), "teacher log_probs"),
    ],
)
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_a_teacher_on_another_device(call, teacher, name):
    refused(lambda: call(teacher=teacher()), ValueError, name, "meta", "cpu", "move")


# --- backends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [head_loss, logits_loss, log_probs])
def test_triton_needs_a_gpu_or_the_interpreter(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = "backend='triton'", "cpu", "needs a GPU", "TRITON_INTERPRET=1", "before triton"
    refused(lambda: choose_backend("triton", torch.device("cpu")), RuntimeError, *words)
    refused(lambda: call(backend="triton"), RuntimeError, *words)
    assert "TRITON_INTERPRET" in available_backends("cpu")["triton"]
    assert choose_backend(None, torch.device("cpu")) != "triton"


def test_triton_has_no_kernels_for_other_devices():
    meta = torch.device("meta")
    refused(lambda: choose_backend("triton", meta), RuntimeError, "'triton'", "kernels for meta")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_triton_is_not_installed(kind, monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    refused(
        lambda: choose_backend("triton", torch.device(kind)),
        RuntimeError, "'triton'", "not installed", "pip install triton",
    )  # fmt: skip
    monkeypatch.setattr(backends.native, "WHY_NOT", "not built")
    assert choose_backend(None, torch.device(kind)) == "torch"


def test_native_is_not_built(monkeypatch):
    monkeypatch.setattr(backends.native, "WHY_NOT", "csrc/ is not built")
    cpu = torch.device("cpu")
    words = "backend='native'", "cpu", "csrc/ is not built"
    refused(lambda: choose_backend("native", cpu), RuntimeError, *words)
    refused(lambda: head_loss(backend="native"), RuntimeError, *words)
    assert available_backends("cpu")["native"] == "csrc/ is not built"
    assert choose_backend(None, cpu) == "torch"


def test_native_runs_on_a_cpu_only():
    refused(lambda: choose_backend("native", torch.device("cuda")), RuntimeError, "CPU only")
