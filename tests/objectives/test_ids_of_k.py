"""Whose ids K holds: the teacher's top-k, the student's own, or those of the call."""

import math
from dataclasses import replace

import pytest
import torch
from problems import (
    assert_stats_agree,
    loss_and_gradient,
    make_problem,
    relative_error,
    with_everything,
)
from test_reverse_kl_on_k import formula

from tropd_kernels import (
    MOPD,
    Divergence,
    LogitsTeacher,
    TokenRule,
    TopKTeacher,
    distillation_loss,
    linear_distillation_loss,
)
from tropd_kernels.objectives import TAILS

BACKENDS = ("torch", "native", "triton")
all_backends = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
K = 4


def rule(tail="raw", whose="student", name="reverse_kl"):
    return Divergence(name, top_k=None if whose == "given" else K, top_k_tail=tail, top_k_ids=whose)


def ids_of(z, whose):
    """(n, V): the set K."""
    if whose == "student":
        return z >= z.topk(K, dim=-1).values[:, -1:]
    on_k = torch.zeros_like(z, dtype=torch.bool)
    return on_k.scatter(-1, GIVEN[: len(z)].clamp_min(0).to(z.device), True)


#: The ids of five tokens, with padding.
GIVEN = torch.tensor([[3, 1, 0, -1], [0, -1, -1, -1], [9, 8, 0, 2], [0, 4, 5, 6], [7, 0, -1, 36]])


def call(whose, z, t, objective, backend, **more):
    options = {"reduction": "none"} | more
    if whose == "given":
        options["ids"] = GIVEN[: len(z)].to(z.device)
    labels = torch.arange(len(z), device=z.device)
    return loss_and_gradient(z, labels, LogitsTeacher(t), objective, backend, **options)


@all_backends
@pytest.mark.parametrize("whose", ["student", "given"])
@pytest.mark.parametrize("tail", TAILS)
def test_each_tail_is_its_formula(tail, whose, backend, device):
    z, t = torch.randn(2, 5, 37, device=device).mul(2)
    loss, gradient, stats = call(whose, z, t, rule(tail, whose), backend)
    exact_z = z.double().requires_grad_()
    log_p, log_q = exact_z.log_softmax(-1), t.double().log_softmax(-1)
    on_k = ids_of(z, whose)
    exact = torch.stack([formula(*row, tail) for row in zip(log_p, log_q, on_k, strict=True)])
    assert relative_error(loss, exact.detach()) < 2e-6
    assert relative_error(gradient, torch.autograd.grad(exact.sum(), exact_z)[0]) < 2e-6
    mass = torch.where(on_k, log_p.detach().exp(), 0).sum(-1)
    torch.testing.assert_close(stats.student_topk_mass, mass.float())
    torch.testing.assert_close(  # of the whole distribution, as with any dense teacher
        stats.reverse_kl, (log_p.exp() * (log_p - log_q)).sum(-1).detach().float()
    )


#: By hand: p = (1/2, 1/4, 1/8, 1/8), q = (1/4, 1/8, 1/2, 1/8), K the first two ids, which are the
#: student's top 2 and not the teacher's. sum_K p log(p/q) = 3/4 log 2; off K p has 1/4 and q 5/8;
#: renormalised on K both are (2/3, 1/3).
BY_HAND = {
    "raw": 0.5198603854,
    "bucket": 0.5198603854 + 1 / 4 * math.log(2 / 5),
    "renormalize_teacher": 0.5198603854 + 3 / 4 * math.log(3 / 8),
    "renormalize_both": 0.0,
}


@all_backends
@pytest.mark.parametrize("whose", ["student", "given"])
@pytest.mark.parametrize("tail", TAILS)
def test_values_by_hand(tail, whose, backend, device):
    z, t = (
        torch.tensor([row], dtype=torch.float64, device=device).log()
        for row in ([1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 4, 1 / 8, 1 / 2, 1 / 8])
    )
    two = {"top_k": 2} if whose == "student" else {}
    more = {} if two else {"ids": torch.tensor([[1, 0, -1]], device=device)}
    objective = Divergence("reverse_kl", top_k_tail=tail, top_k_ids=whose, **two)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    loss, _, stats = loss_and_gradient(z, label, LogitsTeacher(t), objective, backend, **more)
    assert loss.item() == pytest.approx(BY_HAND[tail], abs=1e-10)
    assert stats.teacher_topk_mass.item() == pytest.approx(3 / 8)


OBJECTIVES = {
    "reverse_bucket": rule("bucket"),
    "reverse_both": rule("renormalize_both"),
    "forward_raw": rule("raw", name="forward_kl"),
    "forward_bucket": rule("bucket", name="forward_kl"),
    "forward_teacher": rule("renormalize_teacher", name="forward_kl"),
    "forward_both": rule("renormalize_both", name="forward_kl"),
    "tropd": TokenRule(
        gate="bernoulli", outlier="forward_kl", top_k=K, top_k_ids="student", prefix_weight=0.1,
        entropy_coef=0.05, divergence="topk_reverse_kl", top_k_tail="bucket", nll_weight=0.1,
        label_smoothing=0.1,
        z_loss=0.01,
    ),
    "selected": TokenRule(
        policy_gradient=0.0, divergence="topk_reverse_kl", top_k=K, top_k_ids="student",
        select_by="reverse_kl", select_fraction=0.5, top_k_tail="renormalize_teacher",
    ),
    "mopd": TokenRule(policy_gradient=0.0, divergence="mopd", top_k=K, top_k_ids="student"),
    "entropy": TokenRule(
        divergence="topk_jsd", policy_gradient=0.5, top_k=K, top_k_ids="student",
        entropy_top_fraction=0.5,
    ),
}  # fmt: skip


@pytest.mark.pairs
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("whose", ["student", "given"])
@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_as_the_reference(name, whose, form, reduction, backend, device):
    objective = OBJECTIVES[name]
    problem = with_everything(make_problem(tokens=7, device=device))
    if whose == "given":
        fields = {f: getattr(objective, f) for f in TokenRule.__match_args__}
        objective = TokenRule(**fields | {"top_k": None, "top_k_ids": "given"})
        ids = torch.stack([torch.randperm(37)[:6] for _ in range(7)])
        problem.options["ids"] = torch.where(torch.rand(7, 6) < 0.2, -1, ids).to(device)
    incoming = torch.linspace(-1, 2, 7, device=device) if reduction == "none" else None
    options = dict(incoming=incoming, reduction=reduction)
    truth = problem.call(objective, form, "reference", torch.float64, **options)
    found = problem.call(objective, form, backend, **options)
    # Relative to the tokens' losses: their mean may be near 0 by cancelling.
    size = max(truth[0].norm(), truth[2].token_loss.nan_to_num().abs().mean())
    assert (found[0] - truth[0]).norm() < 1e-5 * size
    for key, gradient in truth[1].items():
        assert relative_error(found[1][key], gradient) < 1e-5, key
    assert_stats_agree(found[2], truth[2], 2e-4)


@all_backends
@pytest.mark.parametrize("tail", TAILS)
def test_a_served_teacher_that_was_asked_for_the_student_s_ids(tail, backend, device):
    """They are its own; what it cannot know is its mass off K but as a difference from 1."""
    z, t = torch.randn(2, 5, 37, device=device)
    ids = z.topk(K, dim=-1).indices
    log_q, labels = t.log_softmax(-1), torch.arange(5, device=device)
    served = TopKTeacher(ids, log_q.gather(-1, ids), log_q.gather(-1, labels[:, None])[:, 0])
    dense = call("student", z, t, rule(tail), backend)
    asked = loss_and_gradient(z, labels, served, rule(tail, "teacher"), backend, reduction="none")
    torch.testing.assert_close(asked[:2], dense[:2], rtol=1e-5, atol=1e-6)


@all_backends
@pytest.mark.parametrize("tail", TAILS)
def test_the_teacher_s_own_ids_given_are_its_top_k(tail, backend, device):
    z, t = torch.randn(2, 5, 37, device=device)
    labels, ids = torch.arange(5, device=device), t.topk(K, dim=-1).indices.int()
    for name in ("forward_kl", "reverse_kl"):
        found = loss_and_gradient(
            z, labels, LogitsTeacher(t), rule(tail, "given", name), backend, ids=ids
        )
        own = loss_and_gradient(z, labels, LogitsTeacher(t), rule(tail, "teacher", name), backend)
        torch.testing.assert_close(found[:2], own[:2], rtol=1e-5, atol=1e-6)


@all_backends
@pytest.mark.parametrize("tail", TAILS)
def test_ids_of_k_that_the_teacher_excludes(tail, backend, device):
    """p > 0 where q = 0: an infinite reverse KL, with gradient 0; the forward KL takes it for 0."""
    z, t = torch.randn(2, 3, 37, device=device)
    t[0, z[0].argmax()] = -math.inf
    t[2, ids_of(z, "student")[2]] = -math.inf  # all of K
    loss, gradient, _ = call("student", z, t, rule(tail), backend)
    assert loss.isinf().tolist() == [True, False, True]
    assert gradient.any(-1).tolist() == [False, True, False]
    found = call("student", z, t, rule(tail, name="forward_kl"), backend)
    truth = call("student", z.double(), t.double(), rule(tail, name="forward_kl"), "reference")
    torch.testing.assert_close(found[:2], tuple(x.float() for x in truth[:2]), rtol=1e-5, atol=1e-6)


@all_backends
@pytest.mark.parametrize("tail", TAILS)
def test_a_given_id_that_both_sides_exclude(tail, backend, device):
    """K is as it is without the id: 0 log 0/0 = 0."""
    z, t = torch.randn(2, 1, 9, device=device)
    z[0, 1] = t[0, 1] = -math.inf
    found = call("given", z, t, rule(tail, "given"), backend)
    without = loss_and_gradient(
        z, GIVEN[:1, 2].to(device), LogitsTeacher(t), rule(tail, "given"), backend,
        reduction="none", ids=GIVEN[:1, [0, 2]].to(device),
    )  # fmt: skip
    assert found[0].isfinite()
    torch.testing.assert_close(found[:2], without[:2])


@all_backends
@pytest.mark.parametrize("whose", ["student", "given"])
def test_both_buckets_are_summed(whose, backend, device):
    """A difference from 1 would lose the digits of the mass that either side has off K."""
    z, t = torch.randn(2, 5, 211, dtype=torch.float64, device=device)
    on_k = ids_of(z, whose)
    z, t = (x + 14.0 * on_k for x in (z, t))
    assert t.softmax(-1)[~on_k].sum() < 1e-2
    found = call(whose, z.float(), t.float(), rule("bucket", whose), backend)
    exact_z = z.float().double().requires_grad_()
    log_p, log_q = exact_z.log_softmax(-1), t.float().double().log_softmax(-1)
    exact = torch.stack([formula(*row, "bucket") for row in zip(log_p, log_q, on_k, strict=True)])
    gradient = torch.autograd.grad(exact.sum(), exact_z)[0]
    assert relative_error(found[0], exact.detach()) < 2e-6
    assert relative_error(found[1], gradient) < 2e-6
    assert relative_error(found[1][~on_k], gradient[~on_k]) < 1e-5  # where the tails are


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_teacher_whose_mass_on_k_underflows(tail, backend, device):
    """Of e^-200 there is no q to renormalise: infinite, with gradient 0, not a loss of 0."""
    z, t = torch.randn(2, 2, 37, device=device)
    t[0, ids_of(z, "student")[0]] -= 200
    loss, gradient, _ = call("student", z, t, rule(tail), backend)
    if tail.startswith("renormalize"):
        assert loss.isinf().tolist() == [True, False]
        assert gradient.any(-1).tolist() == [False, True]
    else:
        assert loss[0] > 50 and gradient[0].any()


@all_backends
def test_ids_that_the_student_excludes_are_not_its_own(backend, device):
    """Fewer than k are left, or a forward KL would be infinite."""
    z, t = torch.randn(2, 2, 9, device=device)
    z[0, 2:] = -math.inf
    loss, gradient, stats = call("student", z, t, rule("raw", name="forward_kl"), backend)
    assert loss.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(stats.teacher_topk_mass[0], t[0].softmax(-1)[:2].sum())


@all_backends
@pytest.mark.parametrize("vocab", [37, 700])  # 700: a CPU looks in blocks of 64
def test_of_ids_that_tie_for_the_last_places_the_first_are_taken(vocab, backend):
    z = torch.zeros(2, vocab)
    z[1, ::2] = -1.0
    z[:, -1] = 1.0
    t = torch.randn(2, vocab)
    _, _, stats = call("student", z, t, rule(), backend)
    for row, ids in enumerate(([vocab - 1, 0, 1, 2], [vocab - 1, 1, 3, 5])):
        torch.testing.assert_close(stats.teacher_topk_mass[row], t[row].softmax(-1)[ids].sum())


@all_backends
def test_a_token_without_an_id(backend, device):
    z, t = torch.randn(2, 2, 9, device=device)
    ids = torch.tensor([[-1, -1], [2, 1]], device=device)
    for tail in TAILS:
        for name in ("forward_kl", "reverse_kl"):
            loss, gradient, _ = loss_and_gradient(
                z, ids.new_zeros(2), LogitsTeacher(t), rule(tail, "given", name), backend,
                ids=ids, reduction="none",
            )  # fmt: skip
            assert loss[0].abs() <= 1e-6 and gradient[0].abs().max() <= 1e-6
            assert gradient[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whose", ["student", "given"])
def test_gradcheck(whose, backend, device):
    if backend == "triton" and whose == "given":
        pytest.skip("the interpreter is slow, and the kernels are those of the student's ids")
    t = torch.randn(2, 11, dtype=torch.float64, device=device)
    weight = torch.randn(11, 5, dtype=torch.float64, device=device, requires_grad=True)
    hidden = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    more = {"ids": GIVEN[:2].to(device)} if whose == "given" else {}

    def loss(hidden, weight):
        return sum(
            linear_distillation_loss(
                hidden, weight, torch.arange(2, device=device), LogitsTeacher(t),
                rule(tail, whose), backend=backend, softcap=9.0, **more,
            ).loss
            for tail in (("bucket", "renormalize_both") if backend == "triton" else TAILS)
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)


def test_under_torch_compile(device):
    """One graph, with the ids as an input of it."""
    problem = make_problem(tokens=4, device=device)
    teacher = problem.teacher("hidden", torch.float32)
    ids = GIVEN[:4].to(device)

    def loss(hidden, weight, ids):
        student = linear_distillation_loss(
            hidden, weight, problem.labels, teacher, rule("bucket"), backend="torch"
        )
        return (
            student.loss
            + linear_distillation_loss(
                hidden,
                weight,
                problem.labels,
                teacher,
                rule("raw", "given"),
                backend="torch",
                ids=ids,
            ).loss
        )

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden = problem.hidden.float().requires_grad_()
        value = run(hidden, problem.weight.float(), ids)
        value.backward()
        found.append((value.detach(), hidden.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_sampled_gradient(device):
    """Every id kept: the exact one."""
    problem = make_problem(tokens=4, device=device)
    problem.options.pop("uniforms")
    whole = problem.call(rule("bucket"), "hidden", "torch")
    sampled = problem.call(rule("bucket"), "hidden", "torch", gradient_sampling=1.0, seed=0)
    torch.testing.assert_close(sampled[1], whole[1])


def test_chunks_and_tokens_that_do_not_count(monkeypatch, device):
    """Each chunk has its own ids; masked tokens may hold any."""
    from tropd_kernels.loss import plan

    problem = make_problem(tokens=5, device=device)
    labels = problem.labels.clone()
    labels[1] = -100
    ids = GIVEN.clone().to(device)
    ids[1] = torch.tensor([5, 5, 999, -7])
    teacher, weight = problem.teacher("hidden", torch.float32), problem.weight.float()

    def run(reduction):
        hidden = problem.hidden.float().requires_grad_()
        loss = linear_distillation_loss(
            hidden, weight, labels, teacher, rule("bucket", "given"), ids=ids, backend="torch",
            reduction=reduction,
        ).loss  # fmt: skip
        loss.sum().backward()
        return loss.detach().sum(), hidden.grad

    whole = run("sum"), run("none")
    monkeypatch.setattr(plan, "MULTIPLE", 2)
    monkeypatch.setattr(plan, "FIXED_SIZES", (2, 2))
    torch.testing.assert_close((run("sum"), run("none")), whole)
    torch.testing.assert_close(*whole)


# --- bad input ---------------------------------------------------------------------------------

RULES = {
    "unknown": (dict(top_k_ids="mine"), "top_k_ids must be one of 'teacher', 'student', 'given'"),
    "given and top_k": (
        dict(divergence="topk_reverse_kl", top_k_ids="given", top_k=3), "leave top_k None, got 3"
    ),
    "student without top_k": (
        dict(divergence="topk_reverse_kl", top_k_ids="student"), "'student' needs a top_k"
    ),
    "no term on K": (dict(top_k=3, top_k_ids="student"), "no effect"),
    "a sum over the vocabulary beside": (
        dict(divergence="jeffreys", top_k=3, top_k_ids="student"), "over the whole vocabulary"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), RULES.values(), ids=RULES)
def test_rules_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenRule(**fields)
    with pytest.raises(ValueError, match="covers the whole vocabulary; top_k_ids goes with"):
        Divergence("chi2", top_k_ids="given")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ids_that_are_no_ids(backend, device):
    z, t = torch.randn(2, 3, 9, device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    good = torch.tensor([[0, 1], [2, -1], [3, 4]], device=device)

    def run(ids, objective=rule("raw", "given"), teacher=None):
        return distillation_loss(
            z, labels, teacher or LogitsTeacher(t), objective, ids=ids, backend=backend
        )

    assert run(good).loss.isfinite()
    for ids, error, message in [
        (None, ValueError, r"pass ids=<an int64 tensor of shape \(3, K\)"),
        ([[0, 1]], TypeError, "got list"),
        (good.float(), TypeError, "torch.float32"),
        (good > 0, TypeError, "torch.bool"),
        (good[:2], ValueError, r"got shape \(2, 2\)"),
        (good[:, :0], ValueError, r"got shape \(3, 0\)"),
        (good[:, 0], ValueError, r"got shape \(3,\)"),
        (good.index_fill(1, labels[:1], 9), ValueError, "ids hold 9 at token 0 .*none of the 9"),
        (good.index_fill(1, labels[:1], -2), ValueError, "ids hold -2 at token 0"),
        (good.index_fill(0, labels[:1] + 2, 4), ValueError, "ids hold 4 twice at token 2"),
    ]:
        with pytest.raises(error, match=message):
            run(ids)
    with pytest.raises(ValueError, match="does not read them: leave ids out"):
        run(good, rule("raw", "student"))
    known = torch.full((3, 2), -1.0, device=device)
    for objective, ids in ((rule("raw", "given"), good), (rule("raw", "student"), None)):
        with pytest.raises(ValueError, match="does not score.*pass them as a TopKTeacher's own"):
            run(ids, objective, TopKTeacher(good.clamp_min(0), known, known[:, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_repeated_id_is_nan_where_nobody_looks(backend, device):
    """ignore_index=None on a GPU: the engine marks the row."""
    from tropd_kernels.backends import engine_for
    from tropd_kernels.rows.id_rows import IdRows
    from tropd_kernels.rows.layout import LogitTransform, RowBatch, RowOptions, Stat

    z, t = torch.randn(2, 3, 9, device=device)
    ids = torch.tensor([[0, 1], [2, 2], [-1, -1]], device=device)
    batch = RowBatch(student=z, teacher=t, labels=ids.new_zeros(3), ids=ids)
    options = RowOptions(rule("raw", "given"), LogitTransform(), LogitTransform())
    stats, _ = IdRows(engine_for(backend), None).forward(batch, options)
    assert stats[Stat.TOKEN_LOSS].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("z0", [2.0, -8.0, -60.0])
def test_a_mass_corrected_reverse_kl_on_an_id_that_the_teacher_excludes(z0, backend):
    """Infinite, without a gradient, as every reverse KL; it was 1e11 to 1e38."""
    z = torch.tensor([[z0, 1.0, 0.5, 0.0]], requires_grad=True)
    teacher = LogitsTeacher(torch.tensor([[-math.inf, 0.3, 0.0, 1.0]]))
    rule = replace(MOPD(top_k=4), top_k_ids="student")
    loss = distillation_loss(z, torch.tensor([1]), teacher, rule, backend=backend).loss
    loss.backward()
    assert loss == math.inf
    assert z.grad.abs().max() < 1e-6  # the reference rounds


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("tail", ["renormalize_teacher", "renormalize_both"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_mass_of_the_teacher_whose_inverse_overflows(whose, tail, backend):
    """Subnormal in float32: nothing to renormalise. The gradient was infinite or NaN."""
    z = torch.tensor([[95.0, 0.0, 0.0]], requires_grad=True)
    teacher = LogitsTeacher(torch.tensor([[-95.0, 0.0, 0.0]]))
    if whose == "teacher":  # a served one, that was asked for an id of no mass
        teacher = TopKTeacher(torch.zeros(1, 1).long(), torch.full((1, 1), -95.7), torch.zeros(1))
    rule = Divergence("forward_kl", top_k=1, top_k_tail=tail, top_k_ids=whose)
    loss = distillation_loss(z, torch.tensor([1]), teacher, rule, backend=backend).loss
    loss.backward()
    assert loss.isfinite() and abs(loss) < 1e-3
    assert z.grad.abs().max() < 1e-3
