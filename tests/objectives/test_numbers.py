"""The numerical defects that this field has shipped. Each test names one and fails without its
cure."""

import math

import pytest
import torch
from problems import OBJECTIVES, loss_and_gradient, make_problem, relative_error

from tropd_kernels import (
    GKD,
    OPD,
    Divergence,
    EntropyOPD,
    HiddenTeacher,
    LogitsTeacher,
    SampledTeacher,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)
from tropd_kernels.loss import plan as chunking

BACKENDS = ("torch", "native", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)
all_backends = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


def test_logits_are_not_rounded_to_bf16(device):
    """1. bf16 logits cost 4 to 65 % of the gradient where the distributions are close. The GEMM's
    float32 result has to reach the softmax, so the loss of bf16 inputs is that of exact
    products."""
    backend = "triton" if device == "cuda" else "torch"
    problem = make_problem(tokens=64, vocab_size=600, width=64, teacher_width=64, device=device)
    problem.teacher_hidden = problem.hidden + 0.03 * torch.randn_like(problem.hidden)
    problem.teacher_weight = problem.weight
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(problem, name, getattr(problem, name).bfloat16().double())
    rule = Divergence("reverse_kl")
    truth, _, _ = problem.call(rule, "hidden", "reference", torch.float64)
    found, _, _ = problem.call(rule, "hidden", backend, torch.bfloat16)
    assert 1e-4 < truth < 1e-1  # close, as a student late in training is
    assert relative_error(found, truth) < 1e-3
    student = (problem.hidden @ problem.weight.T).bfloat16().double()
    teacher = (problem.teacher_hidden @ problem.teacher_weight.T).bfloat16().double()
    rounded, _, _ = loss_and_gradient(
        student, problem.labels, LogitsTeacher(teacher), rule, "reference"
    )
    assert relative_error(rounded, truth) > 1e-2  # the defect is visible on this problem


def test_head_gradient_accumulates_in_float32(device, monkeypatch):
    """2. With a bf16 accumulator the error grows with the number of chunks; it must not move."""
    backend = "triton" if device == "cuda" else "torch"
    problem = make_problem(tokens=1024, vocab_size=64, device=device)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(problem, name, getattr(problem, name).bfloat16().double())
    _, exact, _ = problem.call(GKD(), "hidden", "reference", torch.float64)

    def error(rows):
        monkeypatch.setattr(chunking, "MULTIPLE", rows)
        monkeypatch.setattr(chunking, "FIXED_SIZES", (rows, rows))
        _, found, _ = problem.call(GKD(), "hidden", backend, torch.bfloat16)
        return relative_error(found["weight"], exact["weight"])

    assert error(4) < 1.05 * error(1024)


@both
def test_logits_with_a_large_offset(backend, device):
    """3. (m + log l) - z_y loses everything when all logits are offset by 2^20."""
    z = torch.randn(4, 50, device=device).mul(8).round().div(8)  # exact next to 2^20
    labels = torch.arange(4, device=device)
    teacher = LogitsTeacher(torch.randn(4, 50, device=device).mul(8).round().div(8))
    plain = loss_and_gradient(z, labels, teacher, OPD(), backend)
    moved = loss_and_gradient(
        z + 2.0**20, labels, LogitsTeacher(teacher.logits - 2.0**20), OPD(), backend
    )
    torch.testing.assert_close(moved[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved[1], plain[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved[2].entropy, plain[2].entropy, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("softcap", [None, 40.0])
def test_padded_columns_are_not_logits_of_zero(backend, softcap, device):
    """4. Rows of all-negative logits with V not a multiple of the block, with a soft cap too, which
    would lift a padded -inf to -cap."""
    hidden = torch.ones(3, 1, device=device)
    weight = -torch.rand(37, 1, device=device) - 20
    labels = torch.tensor([0, 5, 36], device=device)
    ours = linear_log_probs(hidden, weight, labels, softcap=softcap, backend=backend)
    logits = hidden.double() @ weight.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("name", ["tropd", "reverse_kl", "gkd", "sft"])
def test_a_negative_scale_of_the_logits(name, backend, device):
    """3. ... nor of infinity, which a scale below 0 would make of them."""
    problem = make_problem(tokens=5, vocab_size=300, device=device)
    form = None if name == "sft" else "hidden"
    problem.student_head, problem.teacher_head = {"logit_scale": -1.0}, {"logit_scale": -0.5}
    exact, gradients, _ = problem.call(OBJECTIVES[name], form, "reference", torch.float64)
    loss, found, _ = problem.call(OBJECTIVES[name], form, backend)
    assert relative_error(loss, exact) < 1e-5
    assert relative_error(found["hidden"], gradients["hidden"]) < 1e-5


@all_backends
@pytest.mark.parametrize("name", ["akl", "todi", "gkd", "chi2", "jeffreys", "alpha_above_1"])
def test_equal_distributions_have_no_gradient(name, backend, device):
    """6. AKL's 0/0 at p = q."""
    z = torch.randn(3, 17, device=device).mul(4)
    loss, gradient, _ = loss_and_gradient(
        z, torch.zeros(3, dtype=torch.int64, device=device), LogitsTeacher(z.clone()),
        OBJECTIVES[name], backend,
    )  # fmt: skip
    assert abs(loss) < 1e-6
    assert gradient.abs().max() < 1e-6


@both
@pytest.mark.parametrize("gap", [30.0, 200.0])
def test_far_apart_distributions_do_not_overflow(backend, gap, device):
    """6. exp(lq - lp) overflows float32 beyond 88 nats."""
    z = torch.zeros(1, 12, device=device)
    t = torch.zeros(1, 12, device=device)
    z[0, 0], t[0, 1] = gap, gap
    for name in ("gkd", "todi", "skew_forward", "skew_reverse", "tropd_renormalize_both", "akl"):
        loss, gradient, _ = loss_and_gradient(
            z, torch.tensor([0], device=device), LogitsTeacher(t), OBJECTIVES[name], backend,
            uniforms=torch.tensor([0.5], device=device),
        )  # fmt: skip
        assert loss.isfinite(), name
        assert gradient.isfinite().all(), name


@all_backends
def test_truncated_kl_is_not_clamped(backend, device):
    """7. Raw top-k KL may be negative; clamping it at 0 silences its gradient."""
    z = torch.tensor([[5.0, 0, 0, 0]], device=device)
    t = torch.zeros(1, 4, device=device)
    t[0, 0] = 0.1
    rule = Divergence("forward_kl", top_k=1)
    loss, gradient, _ = loss_and_gradient(
        z, torch.tensor([0], device=device), LogitsTeacher(t), rule, backend
    )
    assert loss < 0
    assert gradient.abs().sum() > 0.01


@all_backends
@pytest.mark.parametrize("excluded", [False, True])
def test_every_token_is_in_the_top_fraction_of_1(excluded, backend, device):
    """A token's entropy beside a teacher that excludes ids is, to the bit, the one ranked before,
    or those at the quantile would drop out."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(1 if backend == "triton" else 40):
        z, t = torch.randn(2, 4, 3000, generator=generator, dtype=torch.float64) * 3
        if excluded:
            t = t.masked_fill(torch.rand(4, 3000, generator=generator) < 0.1, -math.inf)
        t[:, 7] = 1
        out = distillation_loss(
            z.to(device), torch.full((4,), 7, device=device), LogitsTeacher(t.to(device)),
            EntropyOPD(top_fraction=1.0), backend=backend,
        )  # fmt: skip
        assert out.stats.kept.sum() == 4, seed


@all_backends
def test_normalizer_counts_what_was_generated(backend, device):
    """11. loss_sum / num_items_in_batch: the count is the caller's where given, else the tokens
    that count; accumulating two halves with the whole's count equals the whole."""
    problem = make_problem(tokens=8, device=device)
    labels = problem.labels.clone()
    labels[::3] = -100
    teacher = problem.teacher("hidden", torch.float32)
    weight, hidden = problem.weight.float(), problem.hidden.float()
    count = int((labels != -100).sum())

    def run(rows, **more):
        part = HiddenTeacher(teacher.hidden[rows], teacher.weight)
        return linear_distillation_loss(
            hidden[rows], weight, labels[rows], part, GKD(), backend=backend, **more
        ).loss

    whole = run(slice(None))
    halves = sum(run(s, normalizer=count) for s in (slice(0, 4), slice(4, 8)))
    torch.testing.assert_close(whole, halves)
    torch.testing.assert_close(whole * count, run(slice(None), reduction="sum"))


@all_backends
def test_reopold_mean_is_over_the_tokens_kept(backend, device):
    problem = make_problem(tokens=9, device=device)
    total, _, stats = problem.call(OBJECTIVES["reopold_1"], "logits", backend, reduction="sum")
    mean, _, _ = problem.call(OBJECTIVES["reopold_1"], "logits", backend)
    assert 0 < stats.kept.sum() < 9
    torch.testing.assert_close(mean, total / stats.kept.sum())


@both
@pytest.mark.parametrize("name", ["tropd", "gkd", "akl"])
def test_two_runs_are_bitwise_equal(name, backend, device):
    """13. No float atomics, fixed order of reductions."""
    problem = make_problem(tokens=5, device=device)
    first, second = (problem.call(OBJECTIVES[name], "hidden", backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


@both
def test_ties_at_the_kth_logit_belong_to_the_set(backend, device):
    """Teacher logits rounded to bf16 tie; which of them an arbitrary sort would keep must not
    matter."""
    t = torch.tensor([[3.0, 2, 2, 2, 1, 0, -1]], device=device)
    z = torch.randn(1, 7, device=device)
    rule = Divergence("forward_kl", top_k=2)
    label = torch.tensor([0], device=device)
    loss, gradient, stats = loss_and_gradient(z, label, LogitsTeacher(t), rule, backend)
    q = t.softmax(-1)
    torch.testing.assert_close(stats.teacher_topk_mass, q[:, :4].sum(-1))
    truth = loss_and_gradient(z.double(), label, LogitsTeacher(t.double()), rule, "reference")
    assert relative_error(loss, truth[0]) < 1e-5
    assert relative_error(gradient, truth[1]) < 1e-5


@both
def test_tokens_that_do_not_count_may_hold_anything(backend, device):
    """NaN in a padded row reaches neither loss nor gradient."""
    z = torch.randn(3, 9, device=device)
    z[1] = math.nan
    labels = torch.tensor([0, -100, 2], device=device)
    teacher = SampledTeacher(torch.tensor([-1.0, math.nan, -2.0], device=device))
    for reduction in ("mean", "none"):
        loss, gradient, _ = loss_and_gradient(
            z, labels, teacher, OPD(), backend, reduction=reduction
        )
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert not gradient[1].any()


@both
@pytest.mark.parametrize(
    ("rule", "error"),
    [
        (GKD(0.5), 1e-4),
        (GKD(0.1), 5e-4),
        (Divergence("skew_forward", alpha=0.1), 1e-4),
        (Divergence("skew_reverse", alpha=0.1), 1e-4),
        (Divergence("skew_reverse", alpha=0.9), 3e-3),  # and 0.1 at 0.99: TokenRule says so
        (Divergence("alpha", alpha=0.1), 1e-4),
        (Divergence("alpha", alpha=0.9), 3e-4),
    ],
    ids=lambda value: value.divergence if hasattr(value, "divergence") else "",
)
def test_divergences_of_models_that_nearly_agree(rule, error, backend, device):
    """A divergence is a sum of small differences of terms that cancel."""
    z = (2 * torch.randn(2, 20_000, device=device)).double()
    t = (z + 0.028 * torch.randn_like(z)).float().double()
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    truth = loss_and_gradient(z, labels, LogitsTeacher(t), rule, "reference")[1]
    found = loss_and_gradient(z.float(), labels, LogitsTeacher(t.float()), rule, backend)[1]
    assert relative_error(found, truth) < error
