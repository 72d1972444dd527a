"""The call's `blending`: each token's own weight of the target that stands in for the teacher."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from calls import BACKENDS, head_loss, refused
from problems import (
    OBJECTIVES,
    K,
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
    DemoPSD,
    Divergence,
    LogitsTeacher,
    Veto,
    linear_distillation_loss,
)
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss import target
from tropd_kernels.objectives.registry import OBJECTIVES as BY_NAME
from tropd_kernels.objectives.registry import check_objective

F64 = torch.float64
POWERS = dict(teacher_power=1.25, student_power=0.3, reference_power=-0.25)
#: One of each kind of pass, and of each tail and kind of ids.
RULES = {name: OBJECTIVES[name] for name in (
    "tropd_expected", "tropd_bucket", "tropd_renormalize_both", "tropd_renormalize_teacher", "opd",
    "gkd", "reverse_kl", "akl", "mopd", "todi", "lsm", "topk_reverse_kl_bucket", "student_top_k",
    "entropy_opd", "gkd_selected",
)}  # fmt: skip
every_backend = pytest.mark.parametrize("backend", BACKENDS)
fast = pytest.mark.parametrize("backend", BACKENDS[1:])


def weights(problem):
    """From the teacher's 0 to the rule's 1, without an order."""
    n = len(problem.labels)
    return torch.linspace(0, 1, n, dtype=F64).roll(n // 2).to(problem.labels.device)


# --- by hand --------------------------------------------------------------------------------------


@every_backend
def test_a_weight_by_hand(backend, device):
    """p = (1/4, 3/4), q = (3/4, 1/4), w = 1/2: q p^(1/2) is proportional to (3, sqrt 3)."""
    z, t = (torch.tensor([row], dtype=F64, device=device) for row in
            ([0.0, math.log(3.0)], [math.log(3.0), 0.0]))  # fmt: skip
    label, w = torch.zeros(1, dtype=torch.int64, device=device), torch.full_like(z[:, 0], 0.5)
    loss, gradient, _ = loss_and_gradient(
        z, label, LogitsTeacher(t), Veto(student_power=1.0), backend, blending=w
    )
    first = 3 / (3 + math.sqrt(3))
    kl = first * math.log(first / 0.25) + (1 - first) * math.log((1 - first) / 0.75)
    assert float(loss) == pytest.approx(kl, abs=1e-12)
    assert gradient[0].tolist() == pytest.approx([0.25 - first, first - 0.25], abs=1e-12)


@every_backend
def test_demopsd_by_its_equations(backend, device):
    """(7) to (12) of 2607.02502, with the weights that `DemoPSD` says, from the losses of GKD."""
    z, t = torch.randn(2, 5, 11, dtype=F64, device=device)
    labels, beta = torch.arange(5, device=device), 25.0
    call = dict(labels=labels, teacher=LogitsTeacher(t), backend=backend, reduction="none")
    apart, _, _ = loss_and_gradient(z, objective=GKD(), **call)
    blending = 2 * torch.sigmoid(beta * apart) - 1
    loss, gradient, _ = loss_and_gradient(z, objective=DemoPSD(), blending=blending, **call)

    twin = z.clone().requires_grad_()
    log_p, log_q = twin.log_softmax(-1), t.log_softmax(-1)
    fixed = log_p.detach()
    middle = ((fixed.exp() + log_q.exp()) / 2).log()
    d = sum((each.exp() * (each - middle)).sum(-1) for each in (fixed, log_q)) / 2
    alpha = ((torch.sigmoid(beta * d) - 0.5) * 2 * 0.15).unsqueeze(-1)
    log_target = ((1 - alpha) * log_q + alpha * fixed).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_target)).sum(-1)
    expected.sum().backward()
    assert 0.01 < alpha.min() < alpha.max() < 0.15
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, twin.grad, rtol=1e-10, atol=1e-12)

    # An average of the student as the reference teacher, here the student itself.
    averaged = replace(DemoPSD(), student_power=0.0, reference_power=0.15)
    again, _, _ = loss_and_gradient(
        z, objective=averaged, blending=blending, reference_teacher=LogitsTeacher(z), **call
    )
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=1e-12)


# --- against the reference, and against rules -----------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", ["one", "several"])
@fast
def test_as_the_reference(name, form, reduction, chunks, backend, device, monkeypatch):
    """With ignored tokens, biases, scales and soft caps. Several chunks, and blocks of one row, are
    to find each token's own weight."""
    if chunks == "several":
        monkeypatch.setattr(chunking, "MULTIPLE", 2)
        monkeypatch.setattr(chunking, "FIXED_SIZES", (2, 4))
        monkeypatch.setattr(target, "BLOCK_ELEMENTS", {"cpu": 41})
    problem = with_everything(make_problem(11, 37, 41, device=device))
    rule = replace(RULES[name], **POWERS)
    incoming = None if reduction == "mean" else torch.linspace(-1, 2, 11, device=device)
    call = partial(
        problem.call, rule, form, dtype=F64, reduction=reduction, incoming=incoming,
        reference_teacher=reference_of(problem, form, F64),
    )  # fmt: skip
    truth = call(backend="reference", blending=weights(problem))
    found = call(backend=backend, blending=weights(problem))
    assert relative_error(found[0], truth[0]) < 1e-10
    for key, gradient in truth[1].items():
        assert relative_error(found[1][key], gradient) < 1e-10, key
    assert_stats_agree(found[2], truth[2], 1e-9)
    assert relative_error(call(backend="reference")[0], truth[0]) > 1e-3  # the weights matter here


@pytest.mark.pairs
@every_backend
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("name", ["tropd_expected", "jeffreys"])
@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_equal_weights_are_a_rule_to_the_bit(weight, name, form, dtype, backend, device):
    """... that has those powers for all tokens."""
    problem = with_everything(make_problem(7, 211, device=device))
    blending = torch.full((7,), weight, dtype=dtype, device=device)
    w = float(blending[0])
    powers = {key: w * power for key, power in POWERS.items()}
    powers["teacher_power"] += 1 - w
    beside = dict(reference_teacher=reference_of(problem, "hidden", dtype))
    call = partial(problem.call, form=form, backend=backend, dtype=dtype, **beside)
    rule = OBJECTIVES[name]
    loss, gradients, stats = call(replace(rule, **POWERS), blending=blending)
    alone, expected, theirs = call(replace(rule, **powers))
    assert torch.equal(loss, alone) and torch.equal(stats.token_loss, theirs.token_loss)
    for key in expected:
        assert torch.equal(gradients[key], expected[key]), key


@fast
@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("name", ["tropd_expected", "jeffreys"])
def test_a_weight_of_0_is_the_teacher_to_the_bit(name, form, backend, device):
    problem = make_problem(tokens=7, vocab_size=211, device=device)
    problem.options["temperature"] = 1.3
    rule = replace(OBJECTIVES[name], teacher_power=0.85, student_power=0.4)
    loss, gradients, _ = problem.call(OBJECTIVES[name], form, backend)
    none = torch.zeros(7, device=device)
    again, found, _ = problem.call(rule, form, backend, blending=none)
    assert torch.equal(again, loss)
    assert all(torch.equal(found[key], gradients[key]) for key in gradients)


@every_backend
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_ids_that_one_side_excludes(signs, backend, device):
    """... are excluded where its power is not 0; at a weight of 0 nothing is, but by the teacher:
    no 0 * inf."""
    z, t, r = torch.randn(3, 6, 9, dtype=F64, device=device)
    z[:, 3] = t[:, [4, 6]] = r[:, [5, 6]] = -math.inf
    z[:, 7] = r[:, 7] = -math.inf
    w = torch.tensor([0.0, 0.5, 1.0] * 2, dtype=F64, device=device)
    rule = replace(GKD(), student_power=0.4 * signs[0], reference_power=0.5 * signs[1])
    labels = torch.arange(6, device=device) % 3
    loss, gradient, stats = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule, backend, blending=w, reduction="none",
        reference_teacher=LogitsTeacher(r),
    )  # fmt: skip
    expected = (t + w[:, None] * (0.4 * signs[0] * z + 0.5 * signs[1] * r))[:, [0, 1, 2, 8]]
    logits = torch.full_like(t, -math.inf)
    logits[:, [0, 1, 2, 8]] = expected
    logits[w == 0] = t[w == 0]
    plain, by_plain, theirs = loss_and_gradient(
        z, labels, LogitsTeacher(logits), GKD(), "reference", reduction="none"
    )
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, by_plain)
    torch.testing.assert_close(stats.teacher_entropy, theirs.teacher_entropy)
    assert loss.isfinite().all()


@fast
@pytest.mark.parametrize("by", ["teacher_entropy", "reverse_kl"])
@pytest.mark.parametrize("chunks", ["one", "several"])
@pytest.mark.parametrize("term", ["gkd", "sft"])
def test_a_score_of_the_target(term, chunks, by, backend, device, monkeypatch):
    """The selection's pass gives each token its weight, and so does the pass behind it, which has
    fewer; a rule of which the score alone reads the target makes none there."""
    if chunks == "several":
        monkeypatch.setattr(chunking, "MULTIPLE", 2)
        monkeypatch.setattr(chunking, "FIXED_SIZES", (2, 4))
    problem = with_everything(make_problem(tokens=13, device=device))
    del problem.options["teacher_prefix"]
    rule = replace(
        OBJECTIVES[term], select_by=by, select_fraction=0.4, teacher_power=1.4, student_power=0.6
    )
    call = partial(problem.call, rule, "hidden", dtype=F64, blending=weights(problem))
    truth, found = call(backend="reference"), call(backend=backend)
    assert torch.equal(found[2].kept, truth[2].kept) and 0 < truth[2].kept.sum() < 9
    torch.testing.assert_close(found[2].score, truth[2].score, equal_nan=True)
    for key, gradient in truth[1].items():
        assert relative_error(found[1][key], gradient) < 1e-10, key


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_compiled_graph_for_all_weights_and_torch_func(reduction, device):
    problem = with_everything(make_problem(7, device=device))
    hidden, weight = problem.hidden.float(), problem.weight.float()
    teacher, w = problem.teacher("hidden", torch.float32), weights(problem).float()

    def loss(hidden, blending):
        return linear_distillation_loss(
            hidden, weight, problem.labels, teacher, DemoPSD(), reduction=reduction,
            blending=blending,
        ).loss.sum()  # fmt: skip

    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counted, fullgraph=True)
    for each in (w, 1 - w):
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        for run, leaf in zip((loss, compiled), leaves, strict=True):
            run(leaf, each).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        assert torch.equal(torch.func.grad(loss)(hidden, each), leaves[0].grad)
    assert len(graphs) == 1


def test_ignored_tokens_may_hold_anything(device):
    problem = with_everything(make_problem(tokens=7, device=device))
    blending = weights(problem)
    expected = problem.call(DemoPSD(), "hidden", "torch", blending=blending)
    blending[problem.labels == -100] = math.nan
    found = problem.call(DemoPSD(), "hidden", "torch", blending=blending)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1]["weight"], expected[1]["weight"])


def test_bad_calls():
    ones = torch.ones(2, 3)
    for rule in (OPD(), Divergence("reverse_kl", top_k=K), Veto(student_power=0.0)):
        refused(lambda r=rule: head_loss(objective=r, blending=ones), ValueError, "blending",
                "no effect", "student_power")  # fmt: skip
    assert head_loss(objective=Veto(student_power=0.5), blending=ones).loss.isfinite()
    refused(lambda: check_objective("demopsd"), ValueError, "demopsd", "blending=",
            "linear_distillation_loss")  # fmt: skip
    assert "demopsd" not in BY_NAME
    for power in (0.0, 1.0):
        refused(lambda p=power: DemoPSD(student_power=p), ValueError, "student_power",
                "between 0 and 1")  # fmt: skip
    refused(lambda: DemoPSD(student_power=1.5), ValueError, "student_power", "[0, 1]")
