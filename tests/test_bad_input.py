"""What is an error, and what is not.

Every error names the argument, as the caller spelt it, and says what was expected or what to do. A
batch in which no token counts is no error: its loss is 0 and its gradients are zeros that hang on
the graph, for a constant without grad hangs a data-parallel run.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from problems import OBJECTIVES

from tropd_kernels import (
    AOPD,
    EOPD,
    GKD,
    MOPD,
    OPD,
    REOPOLD,
    SFT,
    ClipOutlier,
    DistillationLoss,
    Divergence,
    EntropyOPD,
    HiddenTeacher,
    LinearDistillationLoss,
    LinearLogProbs,
    LogitsTeacher,
    MaskOutlier,
    SampledTeacher,
    TokenRule,
    TopKJSD,
    TopKTeacher,
    TrOPD,
    available_backends,
    backends,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
    plan_chunks,
)
from tropd_kernels.backends import choose_backend
from tropd_kernels.objectives import decode_rule

BACKENDS = ["reference", "torch", "native", "triton"]
#: Batch, vocabulary, width of student and teacher.
SHAPE, V, H, G, K = (2, 3), 7, 4, 5, 3
INF, NAN = math.inf, math.nan
# Where a value of the wrong type may be called either.
WRONG = (TypeError, ValueError)


def refused(call, error, *words):
    """The error, of exactly one of these types, with all of these words in its message."""
    with pytest.raises(error) as caught:
        call()
    errors = error if isinstance(error, tuple) else (error,)
    assert caught.type in errors, caught.value
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1500  # nobody reads an argument of a megabyte


def of(*size, **more):
    return torch.randn(size, **more)


def filled(value, shape=SHAPE, **more):
    return torch.full(shape, value, **more)


def labels(*shape):
    return torch.zeros(shape or SHAPE, dtype=torch.int64)


def hidden_teacher(**changes):
    return HiddenTeacher(**(dict(hidden=of(*SHAPE, G), weight=of(V, G)) | changes))


def top_k_teacher(**changes):
    ids = torch.arange(K).expand(*SHAPE, K)
    given = dict(ids=ids, log_probs=of(*SHAPE, K) - 9, label_log_probs=of(*SHAPE) - 9)
    return TopKTeacher(**(given | changes))


def sampled_teacher():
    return SampledTeacher(of(*SHAPE) - 9)


def head_loss(**changes):
    """A call in which nothing is wrong but the changes."""
    given = dict(
        hidden=of(*SHAPE, H), weight=of(V, H), labels=labels(), teacher=hidden_teacher(),
        objective=OPD(), backend="torch",
    )  # fmt: skip
    return linear_distillation_loss(**(given | changes))


def logits_loss(**changes):
    given = dict(
        logits=of(*SHAPE, V), labels=labels(), teacher=hidden_teacher(), objective=OPD(),
        backend="torch",
    )  # fmt: skip
    return distillation_loss(**(given | changes))


def log_probs(**changes):
    given = dict(hidden=of(*SHAPE, H), weight=of(V, H), labels=labels(), backend="torch")
    return linear_log_probs(**(given | changes))


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
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(case):
    changes, *words = PLANS[case]
    given = dict(tokens=100, vocab_size=V, hidden_size=H) | changes
    refused(lambda: plan_chunks(**given), ValueError, *words)


@pytest.mark.parametrize("module", [LinearDistillationLoss, DistillationLoss, LinearLogProbs])
def test_modules_are_refused_before_their_first_call(module):
    refused(lambda: module(temprature=2.0), TypeError, module.__name__, "mean 'temperature'")
    refused(lambda: module(labels=labels()), TypeError, module.__name__, "'labels'")
    if module is LinearLogProbs:
        refused(lambda: module(objective=GKD()), TypeError, "'objective'")
    else:
        refused(lambda: module("tropd"), TypeError, "objective", "TokenRule", "'tropd'")
        refused(lambda: module(""), TypeError, "objective", "TokenRule")


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

PER_TOKEN = ["old_log_probs", "advantages", "token_weight", "uniforms", "teacher_prefix"]


@pytest.mark.parametrize("name", PER_TOKEN)
@pytest.mark.parametrize("call", [head_loss, logits_loss])
def test_per_token_tensors(name, call):
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
    "old log-prob infinite": (
        lambda: dict(old_log_probs=filled(-INF)), "old_log_probs", "not finite",
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
        assert head_loss(teacher=teacher, backend=backend).loss.isfinite()


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


# --- teachers -----------------------------------------------------------------------------------

TEACHERS = {
    "hidden is no tensor": (lambda: hidden_teacher(hidden=None), TypeError, "teacher hidden"),
    "weight is no tensor": (lambda: hidden_teacher(weight=[1.0]), TypeError, "teacher weight"),
    "hidden of another width": (
        lambda: hidden_teacher(hidden=of(*SHAPE, G + 1)), ValueError, "teacher hidden", "(*, 5)",
    ),
    "an empty head": (
        lambda: hidden_teacher(weight=of(0, G)), ValueError, "teacher weight", "0 rows", "gather",
    ),
    "weight of three dimensions": (
        lambda: hidden_teacher(weight=of(1, V, G)), ValueError, "teacher weight", "(V, H)",
    ),
    "bias of another height": (
        lambda: hidden_teacher(bias=of(V - 1)), ValueError, "teacher bias", "(7,)", "(6,)",
    ),
    "scale 0": (lambda: hidden_teacher(logit_scale=0), ValueError, "teacher logit_scale", "not 0"),
    "cap 0": (lambda: hidden_teacher(softcap=0), ValueError, "teacher softcap", "positive"),
    "hidden requires grad": (
        lambda: hidden_teacher(hidden=of(*SHAPE, G, requires_grad=True)),
        ValueError, "teacher hidden requires grad", "no_grad", "detach",
    ),
    "weight requires grad": (
        lambda: hidden_teacher(weight=of(V, G, requires_grad=True)),
        ValueError, "teacher weight requires grad", "no_grad", "detach",
    ),
    "bias requires grad": (
        lambda: hidden_teacher(bias=of(V, requires_grad=True)),
        ValueError, "teacher bias requires grad", "no_grad", "detach",
    ),
    "no logits": (lambda: LogitsTeacher(None), TypeError, "teacher logits"),
    "logits of integers": (lambda: LogitsTeacher(labels()), TypeError, "teacher logits", "float"),
    "logits of no ids": (lambda: LogitsTeacher(of(2, 0)), ValueError, "teacher logits", "(*, V)"),
    "logits require grad": (
        lambda: LogitsTeacher(of(2, V, requires_grad=True)),
        ValueError, "teacher logits requires grad", "no_grad", "detach",
    ),
    "ids are no tensor": (lambda: top_k_teacher(ids=[[0]]), TypeError, "teacher ids"),
    "ids of floats": (
        lambda: top_k_teacher(ids=of(*SHAPE, K)), ValueError, "teacher ids", "int64", "float32",
    ),
    "ids without log-probs": (
        lambda: top_k_teacher(log_probs=of(*SHAPE, K + 1)),
        ValueError, "teacher ids and log_probs", "(2, 3, 3)", "(2, 3, 4)",
    ),
    "no ids": (
        lambda: top_k_teacher(ids=labels(*SHAPE, 0), log_probs=of(*SHAPE, 0)),
        ValueError, "teacher ids", "at least one",
    ),
    "no label log-probs": (
        lambda: top_k_teacher(label_log_probs=None), TypeError, "teacher label_log_probs",
    ),
    "label log-probs of other tokens": (
        lambda: top_k_teacher(label_log_probs=of(6)),
        ValueError, "teacher label_log_probs", "(2, 3)", "(6,)",
    ),
    "entropy of other tokens": (
        lambda: top_k_teacher(entropy=of(*SHAPE, 1)), ValueError, "teacher entropy", "(2, 3)",
    ),
    "log-probs require grad": (
        lambda: top_k_teacher(log_probs=of(*SHAPE, K, requires_grad=True)),
        ValueError, "teacher log_probs requires grad", "detach",
    ),
    "nothing sampled": (lambda: SampledTeacher(None), TypeError, "teacher label_log_probs"),
    "sampled requires grad": (
        lambda: SampledTeacher(of(*SHAPE, requires_grad=True)),
        ValueError, "teacher label_log_probs requires grad", "detach",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers(case):
    make, error, *words = TEACHERS[case]
    refused(make, error, *words)


SAMPLED_NEEDS = [TrOPD(), TrOPD(outlier="forward_kl_reward"), AOPD(), EOPD(), MOPD(), TopKJSD(),
                 Divergence("forward_kl", top_k=2)]  # fmt: skip
DENSE_NEEDS = [
    TrOPD(top_k=None),
    *(Divergence(name) for name in ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_forward",
                                    "skew_reverse", "alpha", "chi2", "total_variation", "todi",
                                    "akl")),
]  # fmt: skip


@pytest.mark.parametrize("rule", SAMPLED_NEEDS, ids=repr)
def test_a_sampled_teacher_cannot_give_a_top_k(rule):
    refused(
        lambda: head_loss(teacher=sampled_teacher(), objective=rule, seed=0),
        ValueError, "TokenRule(", "top-k", "SampledTeacher", "use a TopKTeacher", "HiddenTeacher",
        "LogitsTeacher", "OPD",
    )  # fmt: skip


@pytest.mark.parametrize("rule", DENSE_NEEDS, ids=repr)
@pytest.mark.parametrize("teacher", [sampled_teacher, top_k_teacher])
def test_a_sparse_teacher_cannot_give_a_distribution(rule, teacher):
    form = "SampledTeacher" if teacher is sampled_teacher else "TopKTeacher"
    words = ["TokenRule(", "whole distribution", form, "use a HiddenTeacher or LogitsTeacher"]
    if rule.uses_forward_kl and not rule.uses_reverse_kl:
        words.append("set top_k")
    refused(lambda: head_loss(teacher=teacher(), objective=rule, seed=0), ValueError, *words)


def test_a_top_k_teacher_with_too_few_ids():
    refused(
        lambda: head_loss(teacher=top_k_teacher(), objective=TrOPD(top_k=K + 1), seed=0),
        ValueError, "top_k=4", "holds 3 ids", "ask the teacher for more", "set top_k=3",
    )  # fmt: skip
    assert head_loss(teacher=top_k_teacher(), objective=TrOPD(top_k=K), seed=0).loss.isfinite()


# --- objectives ---------------------------------------------------------------------------------

RULES = {
    "gate": (lambda: TrOPD(gate="coin"), ValueError, "gate", "'bernoulli'", "'coin'"),
    "outlier": (lambda: TrOPD(outlier="drop"), ValueError, "outlier", "'mask'", "'drop'"),
    "tail": (lambda: TrOPD(top_k_tail="lump"), ValueError, "top_k_tail", "'bucket'", "'lump'"),
    "divergence": (lambda: TokenRule(divergence="kl"), ValueError, "divergence", "'akl'", "'kl'"),
    "divergence by name": (lambda: Divergence("kl"), ValueError, "name", "'forward_kl'", "'kl'"),
    "normalize": (lambda: TokenRule(normalize="all"), ValueError, "normalize", "'kept'"),
    "no term": (
        lambda: TokenRule(policy_gradient=0.0, top_k=8), ValueError, "no term", "policy_gradient",
    ),
    "no term outside the gate": (
        lambda: TokenRule(policy_gradient=0.0, gate="bernoulli"), ValueError, "no term",
        "forward_kl",
    ),
    "top_k 0": (lambda: TrOPD(top_k=0), ValueError, "top_k", "at least 1", "None"),
    "top_k below 0": (lambda: MOPD(top_k=-64), ValueError, "top_k", "at least 1", "None"),
    "top_k of a fraction": (lambda: TrOPD(top_k=64.0), TypeError, "top_k", "int or None", "64.0"),
    "top_k of a bool": (lambda: TrOPD(top_k=True), TypeError, "top_k", "int or None", "True"),
    "tail of nothing": (
        lambda: TrOPD(top_k=None, top_k_tail="bucket"), ValueError, "top_k_tail", "needs a top_k",
    ),
    "akl with top_k": (
        lambda: TokenRule(divergence="akl", top_k=8), ValueError, "akl", "leave top_k None",
    ),
    "akl with outliers' forward KL": (
        lambda: TokenRule(divergence="akl", gate="bernoulli", outlier="forward_kl"), ValueError,
        "akl", "outlier='forward_kl'",
    ),
    "akl with the forward KL of unsure teachers": (
        lambda: TokenRule(divergence="akl", forward_kl_entropy=1.0), ValueError, "akl",
        "forward_kl_entropy",
    ),
    "jsd with outliers' top_k": (
        lambda: TokenRule(divergence="jsd", gate="threshold", outlier="forward_kl", top_k=8),
        ValueError, "jsd", "top_k=8", "leave top_k None",
    ),
    "mopd without top_k": (lambda: MOPD(top_k=None), ValueError, "give a top_k"),
    "jsd with top_k": (
        lambda: Divergence("jsd", top_k=8), ValueError, "top_k", "'forward_kl'", "TopKJSD", "MOPD",
    ),
    "clip floor": (lambda: ClipOutlier(threshold=0.1), ValueError, "threshold", "0]", "0.1"),
    "mask threshold": (lambda: MaskOutlier(threshold=1), ValueError, "threshold", "0]", "1"),
    "threshold NaN": (lambda: TrOPD(threshold=NAN), ValueError, "threshold", "nan"),
    "threshold None": (lambda: TrOPD(threshold=None), TypeError, "threshold", "number", "None"),
    "beta above 1": (lambda: GKD(1.1), ValueError, "beta", "[0, 1]", "1.1"),
    "beta below 0": (lambda: GKD(-0.1), ValueError, "beta", "[0, 1]", "-0.1"),
    "beta NaN": (lambda: GKD(NAN), ValueError, "beta", "[0, 1]", "nan"),
    "beta of text": (lambda: GKD("0.5"), TypeError, "beta", "number", "'0.5'"),
    "top-k beta 0": (lambda: TopKJSD(beta=0), ValueError, "beta", "strictly between"),
    "top-k beta above 1": (lambda: TopKJSD(beta=2.0), ValueError, "beta", "[0, 1]", "2.0"),
    "top-k beta of text": (lambda: TopKJSD(beta="x"), TypeError, "beta", "number", "'x'"),
    "alpha at a limit": (
        lambda: Divergence("skew_forward", alpha=0), ValueError, "alpha", "strictly between",
    ),
    "alpha NaN": (lambda: Divergence("alpha", alpha=NAN), ValueError, "alpha", "finite", "nan"),
    "alpha to a jsd": (lambda: Divergence("jsd", alpha=0.5), ValueError, "alpha", "takes no"),
    "head mass": (lambda: Divergence("akl", head_mass=2), ValueError, "head_mass", "[0, 1]"),
    "prefix weight": (lambda: TrOPD(prefix_weight=-1), ValueError, "prefix_weight", "-1"),
    "clip low above 1": (
        lambda: TrOPD(clip_ratio_low=1.5), ValueError, "clip_ratio_low", "[0, 1]", "1.5",
    ),
    "clip high below 0": (lambda: TrOPD(clip_ratio_high=-1), ValueError, "clip_ratio_high", "-1"),
    "kl penalty": (lambda: OPD(kl_penalty_coef="1"), TypeError, "kl_penalty_coef", "number"),
    "entropy coef": (lambda: TrOPD(entropy_coef=NAN), ValueError, "entropy_coef", "finite"),
    "entropy threshold": (lambda: EOPD(entropy_threshold=-1), ValueError, "entropy_threshold"),
    "clip ratio": (lambda: EOPD(clip_ratio=-1), ValueError, "clip_ratio ", "-1"),
    "top fraction 0": (lambda: EntropyOPD(top_fraction=0), ValueError, "top_fraction", "above 0"),
    "top fraction": (lambda: EntropyOPD(top_fraction=1.5), ValueError, "top_fraction", "[0, 1]"),
    "stage": (lambda: REOPOLD(stage=3), ValueError, "stage", "1 or 2", "3"),
    "mixing 0": (lambda: REOPOLD(mixing=0), ValueError, "mixing", "above 0"),
    "mixing": (lambda: REOPOLD(mixing=0.6), ValueError, "mixing", "[0, 0.5]", "0.6"),
    "entropy quantile": (
        lambda: REOPOLD(stage=2, entropy_quantile=1), ValueError, "entropy_quantile", "below 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_objectives(case):
    make, error, *words = RULES[case]
    refused(make, error, *words)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rules_are_frozen_and_can_be_pasted_back(name):
    rule = OBJECTIVES[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.gate = "always"
    assert eval(repr(rule)) == rule
    assert TokenRule(**json.loads(json.dumps(dataclasses.asdict(rule)))) == rule
    assert decode_rule(rule.key) == rule
    assert hash(rule) == hash(decode_rule(rule.key))
    # The key is the whole rule: it is all that the op is told of it.
    other = dataclasses.replace(rule, entropy_coef=rule.entropy_coef + 0.25)
    assert other != rule and other.key != rule.key and decode_rule(other.key) == other


def test_numbers_of_numpy_are_numbers():
    """np.float64 is a float, but is not written like one."""
    np = pytest.importorskip("numpy")
    rule = ClipOutlier(threshold=np.log(0.25))
    assert rule == ClipOutlier(threshold=math.log(0.25))
    assert decode_rule(rule.key) == rule == eval(repr(rule))


# --- no error -----------------------------------------------------------------------------------

NOTHING = {
    "no tokens": dict(shape=(0,)),
    "no tokens in two rows": dict(shape=(2, 0)),
    "all ignored": dict(labels=-100),
    "all of weight 0": dict(token_weight=0.0),
}
# One of each kind of pass: K1, top-k, generator, batch entropy and its own divisor, exact KLs, NLL.
PASSES = ["opd", "tropd", "gkd", "reopold_2", "jeffreys", "sft"]


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PASSES)
def test_a_batch_in_which_no_token_counts(name, backend, reduction, case, device):
    rule, what = OBJECTIVES[name], NOTHING[case]
    shape = what.get("shape", SHAPE)
    leaves = [of(*size, device=device).requires_grad_() for size in ((*shape, H), (V, H), (V,))]
    logits = of(*shape, V, device=device).requires_grad_()
    common = dict(
        labels=filled(what.get("labels", 1), shape, device=device),
        teacher=LogitsTeacher(of(*shape, V, device=device)) if rule.uses_teacher else None,
        objective=rule, reduction=reduction, backend=backend, seed=3,
    )  # fmt: skip
    if "token_weight" in what:
        common["token_weight"] = filled(0.0, shape, device=device)
    hidden, weight, bias = leaves
    for out, inputs in (
        (linear_distillation_loss(hidden, weight, bias=bias, **common), leaves),
        (distillation_loss(logits, **common), [logits]),
    ):
        assert out.loss.shape == (shape if reduction == "none" else ())
        assert out.loss.requires_grad
        assert (out.loss == 0).all()
        gradients = torch.autograd.grad(out.loss.sum(), inputs)  # raises if one is not connected
        for gradient, leaf in zip(gradients, inputs, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))
        for stat in vars(out.stats).values():
            assert stat is None or (stat.shape == shape and (stat == 0).all())


@pytest.mark.parametrize("case", ["all ignored", "all of weight 0", "... and none is dropped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_normalizer_that_counted_no_token(backend, case, device):
    """A count of tokens that stays on the GPU: 0 / 0 would be a NaN in every parameter."""
    with torch.device(device):
        leaves = [of(*size).requires_grad_() for size in ((*SHAPE, H), (V, H), (*SHAPE, V))]
        common = dict(
            labels=filled(-100 if case == "all ignored" else 1),
            token_weight=filled(1.0 if case == "all ignored" else 0.0),
            ignore_index=None if case == "... and none is dropped" else -100,
            objective=GKD(), normalizer=torch.tensor(0), backend=backend,
        )  # fmt: skip
        losses = (
            head_loss(hidden=leaves[0], weight=leaves[1], **common).loss,
            logits_loss(logits=leaves[2], **common).loss,
        )
    assert losses[0] == losses[1] == 0
    for gradient in torch.autograd.grad(sum(losses), leaves):
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), SHAPE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_of_no_token(backend, shape, device):
    leaves = [of(*size, device=device).requires_grad_() for size in ((*shape, H), (V, H))]
    targets = filled(-100, shape, device=device)
    both = linear_log_probs(*leaves, targets, return_entropy=True, backend=backend)
    for values in both:
        assert torch.equal(values, torch.zeros(shape, device=device))
    for gradient in torch.autograd.grad(both[0].sum() + both[1].sum(), leaves):
        assert (gradient == 0).all()


@pytest.mark.parametrize("teacher", [hidden_teacher, top_k_teacher, sampled_teacher])
def test_sft_takes_a_teacher_it_does_not_need(teacher):
    assert head_loss(objective=SFT(), teacher=teacher()).loss > 0
