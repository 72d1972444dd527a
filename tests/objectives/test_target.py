"""The target q^a sg(p)^b r^c that stands in for the teacher, with a reference teacher r."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from calls import (
    BACKENDS,
    NAN,
    G,
    V,
    head_loss,
    hidden_teacher,
    of,
    refused,
    sampled_teacher,
    top_k_teacher,
)
from problems import (
    OBJECTIVES,
    assert_stats_agree,
    loss_and_gradient,
    make_problem,
    reference_of,
    relative_error,
    with_everything,
)

from tropd_kernels import (
    GKD,
    OPD,
    SFT,
    Divergence,
    ExOPD,
    LogitsTeacher,
    TokenRule,
    TopKJSD,
    Veto,
    distillation_loss,
    linear_distillation_loss,
)
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss import target
from tropd_kernels.objectives.registry import check_objective
from tropd_kernels.rows.layout import LogitTransform

FAST = BACKENDS[1:]
F64 = torch.float64
#: One of each kind of pass.
RULES = [
    "tropd_expected", "tropd_bucket", "opd", "gkd", "reverse_kl", "akl", "mopd", "topk_jsd", "eopd",
    "todi", "entropy_opd",
]  # fmt: skip
POWERS = dict(teacher_power=1.25, student_power=0.3, reference_power=-0.25)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
fast = pytest.mark.parametrize("backend", FAST)


def close(found, truth, bound):
    assert relative_error(found[0], truth[0]) <= bound, "loss"
    for key, gradient in truth[1].items():
        assert relative_error(found[1][key], gradient) <= bound, f"d_{key}"
    assert_stats_agree(found[2], truth[2], 20 * bound)


# --- by hand --------------------------------------------------------------------------------------


@every_backend
def test_veto_by_hand(backend, device):
    """p = (1/4, 3/4), q = (3/4, 1/4): q p, renormalised, is q' = (1/2, 1/2) (Veto, 2601.07155).
    KL(q'||p) = log(4/3) / 2; its gradient, p - q', has no part that flows through the target."""
    z, t = (torch.tensor([row], dtype=F64, device=device) for row in
            ([0.0, math.log(3.0)], [math.log(3.0), 0.0]))  # fmt: skip
    label = torch.zeros(1, dtype=torch.int64, device=device)
    rule = Veto(student_power=1.0)
    loss, gradient, stats = loss_and_gradient(z, label, LogitsTeacher(t), rule, backend)
    assert float(loss) == pytest.approx(0.143841036, abs=1e-9)
    assert gradient[0].tolist() == pytest.approx([-0.25, 0.25], abs=1e-12)
    assert float(stats.teacher_entropy) == pytest.approx(math.log(2.0), abs=1e-12)


@every_backend
def test_exopd_by_hand(backend, device):
    """q = (3/4, 1/4), r = (2/3, 1/3), lambda = 2: q^2 / r, renormalised, is (9/11, 2/11) (ExOPD,
    2602.12125: lambda log(q/r) + log r). With p = (1/2, 1/2) and the label 0 the loss is -R =
    log(11/18), its gradient R (p - 1[v = 0])."""
    z = torch.zeros(1, 2, dtype=F64, device=device)
    t, r = (torch.tensor([row], dtype=F64, device=device).log() for row in
            ([3.0, 1.0], [2.0, 1.0]))  # fmt: skip
    label = torch.zeros(1, dtype=torch.int64, device=device)
    loss, gradient, stats = loss_and_gradient(
        z, label, LogitsTeacher(t), ExOPD(extrapolation=2.0), backend,
        reference_teacher=LogitsTeacher(r),
    )  # fmt: skip
    assert float(loss) == pytest.approx(-0.492476485, abs=1e-9)
    assert gradient[0].tolist() == pytest.approx([-0.246238243, 0.246238243], abs=1e-9)
    assert float(stats.teacher_log_probs) == pytest.approx(math.log(9 / 11), abs=1e-12)


# --- against the reference ------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("beside", ["hidden", "logits"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@fast
def test_every_kind_of_rule(name, form, beside, reduction, backend, device):
    """Biases, scales and soft caps on all three sides, a temperature, three vocabularies."""
    problem = with_everything(make_problem(7, 37, 41, device=device))
    rule = replace(OBJECTIVES[name], **POWERS)
    incoming = None if reduction == "mean" else torch.linspace(-1, 2, 7, device=device)
    call = dict(reduction=reduction, incoming=incoming)
    for field in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        setattr(problem, field, getattr(problem, field).float().double())
    given = reference_of(problem, beside, torch.float32)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in fields(given).items()}
    exact = type(given)(**wide)
    if form == "logits":  # rounded as the backend sees them
        whole = problem.teacher
        problem.teacher = lambda *a: LogitsTeacher(whole(*a).logits.float().to(a[1]))
    truth = problem.call(rule, form, "reference", F64, reference_teacher=exact, **call)
    close(problem.call(rule, form, backend, reference_teacher=given, **call), truth, 1e-5)
    others = problem.call(OBJECTIVES[name], form, "reference", F64, **call)
    assert relative_error(others[0], truth[0]) > 1e-3  # the powers matter here


def fields(teacher):
    return {name: getattr(teacher, name) for name in teacher.__match_args__}


@fast
@pytest.mark.parametrize("sizes", [(37, 45, 41), (45, 37, 41), (45, 41, 37)])
def test_the_ids_that_all_three_have(sizes, backend, device):
    ours, theirs, other = sizes
    problem = make_problem(6, ours, theirs, device=device)
    problem.labels = problem.labels % 37
    r = of(6, other, dtype=F64, device=device).float()
    rule = replace(OBJECTIVES["jeffreys"], **POWERS)
    found = problem.call(rule, "hidden", backend, reference_teacher=LogitsTeacher(r))
    problem.weight, problem.teacher_weight = problem.weight[:37], problem.teacher_weight[:37]
    exact = LogitsTeacher(r[:, :37].double())
    truth = problem.call(rule, "hidden", "reference", F64, reference_teacher=exact)
    assert relative_error(found[0], truth[0]) < 1e-5
    assert relative_error(found[1]["weight"][:37], truth[1]["weight"]) < 1e-5
    assert not found[1]["weight"][37:].any()


@fast
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_the_result_does_not_depend_on_the_chunks(form, backend, device, monkeypatch):
    """In several chunks, of which the last is short; the backward makes each target again."""
    problem = with_everything(make_problem(11, 67, device=device))
    rule = replace(OBJECTIVES["tropd_expected"], **POWERS)
    call = partial(
        problem.call,
        rule,
        form,
        backend,
        reference_teacher=reference_of(problem, form, torch.float32),
    )
    whole = [call(), call(reduction="none", incoming=torch.ones(11, device=device))]
    monkeypatch.setattr(chunking, "MULTIPLE", 2)
    monkeypatch.setattr(chunking, "FIXED_SIZES", (2, 4))
    monkeypatch.setattr(target, "BLOCK_ELEMENTS", {"cpu": 67})  # blocks of one row
    pieces = [call(), call(reduction="none", incoming=torch.ones(11, device=device))]
    for (loss, gradients, _), (again, found, _) in zip(whole, pieces, strict=True):
        torch.testing.assert_close(again, loss)
        for key in gradients:
            assert relative_error(found[key], gradients[key]) < 1e-5


@fast
def test_without_the_other_powers_it_is_the_teacher_to_the_bit(backend, device):
    """A power of 1e-30 makes the target by the same pass, of which nothing is left in float32."""
    problem = make_problem(tokens=7, vocab_size=211, device=device)
    problem.options["temperature"] = 1.3
    for form in ("hidden", "logits"):
        for name in ("tropd_expected", "jeffreys"):
            plain = OBJECTIVES[name]
            loss, gradients, _ = problem.call(plain, form, backend)
            again, found, _ = problem.call(replace(plain, student_power=1e-30), form, backend)
            assert torch.equal(again, loss)
            assert all(torch.equal(found[key], gradients[key]) for key in gradients)


def test_plain_rules_make_no_target(device, monkeypatch):
    monkeypatch.setattr("tropd_kernels.loss.loop.write_target", None)
    problem = make_problem(device=device)
    assert problem.call(GKD(), "hidden", "torch")[0] > 0
    with pytest.raises(TypeError):
        problem.call(OBJECTIVES["veto"], "hidden", "torch")


@fast
@pytest.mark.parametrize("blended", [False, True])
def test_gradcheck(blended, backend, device):
    """Finite differences of the forward in float64, of a target that does not read the student."""
    problem = with_everything(make_problem(3, 11, width=4, device=device))
    problem.labels = problem.labels.clamp_min(0)
    rule = TokenRule(policy_gradient=0.0, divergence="jeffreys", teacher_power=1.25,
                     reference_power=-0.25)  # fmt: skip
    teacher = problem.teacher("hidden", F64)
    given = dict(
        backend=backend, reduction="none", **problem.student_head,
        reference_teacher=reference_of(problem, "hidden", F64), temperature=1.2,
        blending=torch.tensor([0.0, 0.5, 1.0], dtype=F64, device=device) if blended else None,
    )  # fmt: skip

    def loss(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, problem.labels, teacher, rule, bias=bias, **given
        ).loss

    leaves = [t.clone().requires_grad_() for t in (problem.hidden, problem.weight, problem.bias)]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


# --- values ---------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_ids_that_one_side_excludes(signs, backend, device):
    """Their probability is 0, whatever the sign of the power: no inf - inf."""
    z, t, r = torch.randn(3, 4, 9, dtype=F64, device=device)
    z[:, 3] = t[:, [4, 6]] = r[:, [5, 6]] = -math.inf
    z[:, 7] = r[:, 7] = -math.inf
    rule = replace(GKD(), student_power=0.4 * signs[0], reference_power=0.5 * signs[1])
    labels = torch.arange(4, device=device)
    beside = dict(reference_teacher=LogitsTeacher(r), reduction="none")
    loss, gradient, stats = loss_and_gradient(z, labels, LogitsTeacher(t), rule, backend, **beside)
    kept = [0, 1, 2, 8]
    p = z.log_softmax(-1)
    q = (t + 0.4 * signs[0] * z + 0.5 * signs[1] * r)[:, kept].log_softmax(-1)
    expected = torch.full_like(t, -math.inf)
    expected[:, kept] = q
    plain, by_plain, theirs = loss_and_gradient(
        z, labels, LogitsTeacher(expected), GKD(), "reference", reduction="none"
    )
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, by_plain)
    torch.testing.assert_close(stats.teacher_log_probs, theirs.teacher_log_probs)
    assert p[:, 4].isfinite().all() and stats.teacher_log_probs[3] == -math.inf


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_a_caller_gave_are_not_overwritten(dtype, backend, device):
    """... nor is the target rounded to their dtype."""
    z, t, r = (3 * torch.randn(3, 6, 50, device=device)).to(dtype)
    kept = [each.clone() for each in (z, t, r)]
    rule = replace(Divergence("reverse_kl"), **POWERS)
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    labels[2] = -100

    def run(z, t, r, backend):
        return loss_and_gradient(
            z, labels, LogitsTeacher(t), rule, backend, reference_teacher=LogitsTeacher(r)
        )[:2]

    loss, gradient = run(z, t, r, backend)
    assert all(map(torch.equal, (z, t, r), kept))
    exact, expected = run(z.double(), t.double(), r.double(), "reference")
    assert relative_error(loss, exact) < 1e-5
    assert relative_error(gradient, expected) < max(1e-5, torch.finfo(dtype).eps)


def test_the_error_of_a_float32_sum(device):
    """What the docstring of `target` says of log q' at these powers: two roundings of numbers up to
    45, one of a quarter of 30, and as much in the normaliser."""
    t, r = (torch.randn(2, 64, 5000, dtype=F64, device=device) * 8).clamp(-30, 30)

    def log_q(dtype, stored=None):
        out = t.to(dtype, copy=True)
        plain = LogitTransform()
        target.write_target(out, (1.25, out, plain), (-0.25, r.to(dtype), plain))
        return (out if stored is None else out.to(stored)).double().log_softmax(-1)

    exact = (1.25 * t.float().double() - 0.25 * r.float().double()).log_softmax(-1)
    assert 1e-7 < (log_q(torch.float32) - exact).abs().max() < 8e-6
    assert (log_q(torch.float32, torch.bfloat16) - exact).abs().max() > 0.05
    torch.testing.assert_close(log_q(F64), (1.25 * t - 0.25 * r).log_softmax(-1))


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_and_under_torch_func(reduction, device):
    problem = with_everything(make_problem(7, device=device))
    hidden, weight = problem.hidden.float(), problem.weight.float()
    teacher, r = (
        problem.teacher("hidden", torch.float32),
        reference_of(problem, "hidden", torch.float32),
    )

    def loss(hidden):
        return linear_distillation_loss(
            hidden, weight, problem.labels, teacher, replace(GKD(), **POWERS), reduction=reduction,
            reference_teacher=r,
        ).loss.sum()  # fmt: skip

    leaf = hidden.clone().requires_grad_()
    loss(leaf).backward()
    compiled = hidden.clone().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()
    assert torch.equal(compiled.grad, leaf.grad)
    assert torch.equal(torch.func.grad(loss)(hidden), leaf.grad)


RULE = ExOPD()
BAD = {
    "no reference teacher": (
        lambda: head_loss(objective=RULE), ValueError, "reference_power=-0.25",
        "reference_teacher=<a HiddenTeacher or LogitsTeacher>",
    ),
    "one that is not asked for": (
        lambda: head_loss(reference_teacher=hidden_teacher()), ValueError, "reference_teacher",
        "no effect",
    ),
    "a sparse one": (
        lambda: head_loss(objective=RULE, reference_teacher=top_k_teacher()), TypeError,
        "reference_teacher", "HiddenTeacher", "TopKTeacher",
    ),
    "of other tokens": (
        lambda: head_loss(objective=RULE, reference_teacher=LogitsTeacher(of(2, 4, V))), ValueError,
        "reference_teacher", "(2, 4)", "labels are (2, 3)",
    ),
    "of another precision": (
        lambda: head_loss(objective=RULE, reference_teacher=hidden_teacher(
            hidden=of(2, 3, G).double(), weight=of(V, G).double())),
        TypeError, "reference_teacher hidden", "float64",
    ),
    "on another device": (
        lambda: head_loss(objective=RULE, reference_teacher=LogitsTeacher(
            of(2, 3, V, device="meta"))),
        ValueError, "reference_teacher logits", "meta",
    ),
    "a sampled teacher": (
        lambda: head_loss(objective=Veto(student_power=0.5),
                          teacher=sampled_teacher()),
        ValueError, "SampledTeacher", "HiddenTeacher or LogitsTeacher", "renormalises over the",
    ),
    "a top-k teacher": (
        lambda: head_loss(objective=replace(TopKJSD(top_k=2), teacher_power=2.0),
                          teacher=top_k_teacher()),
        ValueError, "TopKTeacher", "HiddenTeacher or LogitsTeacher", "renormalises over the",
    ),
    "teacher_power 0": (
        lambda: TokenRule(teacher_power=0.0), ValueError, "teacher_power", "above 0",
    ),
    "student_power NaN": (
        lambda: TokenRule(student_power=NAN), ValueError, "student_power", "finite",
    ),
    "reference_power of text": (
        lambda: TokenRule(reference_power="1"), TypeError, "reference_power", "number",
    ),
    "powers of nothing": (
        lambda: replace(SFT(), student_power=0.5), ValueError, "student_power", "0.5", "no term",
    ),
    "Veto against the student": (
        lambda: Veto(student_power=-1.0), ValueError, "student_power",
    ),
    "extrapolation 1": (lambda: ExOPD(extrapolation=1.0), ValueError, "extrapolation", "use OPD()"),
    "extrapolation 0": (lambda: ExOPD(extrapolation=0.0), ValueError, "extrapolation", "use OPD()"),
    "extrapolation below 0": (lambda: ExOPD(extrapolation=-1), ValueError, "extrapolation"),
    "a config": (lambda: check_objective("exopd"), ValueError, "'exopd'", "reference_teacher="),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case):
    make, error, *words = BAD[case]
    refused(make, error, *words)


def test_presets():
    assert replace(RULE, teacher_power=1.0, reference_power=0.0) == OPD()
    assert Veto(student_power=0.0, divergence="jsd") == GKD()
    out = distillation_loss(
        of(2, 3, V), torch.zeros(2, 3, dtype=torch.int64), hidden_teacher(), RULE,
        reference_teacher=hidden_teacher(), backend="torch",
    )  # fmt: skip
    assert out.loss.isfinite()
