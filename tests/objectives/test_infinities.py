"""What is infinite, next to nothing, or NaN: ids that one side excludes, buckets that are nearly
empty, rewards without a bound. Numbers are those of the field's defects, as in `test_numbers`."""

import math

import pytest
import torch
from problems import OBJECTIVES, loss_and_gradient, relative_error

from tropd_kernels import (
    OPD,
    Divergence,
    LogitsTeacher,
    SampledTeacher,
    TopKTeacher,
    TrOPD,
)
from tropd_kernels.objectives import TAILS

BACKENDS = ("torch", "native", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)
all_backends = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


@all_backends
@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"sft"}))
def test_excluded_ids_never_make_nan(name, backend, device):
    """5. Ids with logit -inf: of a teacher truncated by top-p, of both sides, of the student."""
    if backend == "triton" and name not in (
        "tropd", "tropd_expected", "tropd_bucket", "tropd_renormalize_both", "gkd", "akl",
        "jeffreys", "skew_reverse", "todi", "mopd", "chi2", "eopd", "topk_reverse_kl_bucket",
        "lsm", "student_top_k",
    ):  # fmt: skip
        pytest.skip("a dozen objectives reach every branch of the kernels; the interpreter is slow")
    z, t = torch.randn(3, 4, 23, device=device).mul(3)[:2]
    labels = torch.arange(4, device=device)
    both_exclude, teacher_excludes, student_excludes = 20, 21, 22
    t[:, [both_exclude, teacher_excludes]] = -math.inf
    t[0, 3:] = -math.inf  # fewer ids left than top_k
    z[:, both_exclude] = -math.inf
    z[1, student_excludes] = -math.inf
    z, t = (torch.where(x.isnan(), 0, x) for x in (z, t))
    loss, gradient, _stats = loss_and_gradient(
        z, labels, LogitsTeacher(t), OBJECTIVES[name], backend, reduction="none",
        uniforms=torch.full((4,), 0.5, device=device),
    )  # fmt: skip
    assert not loss.isnan().any()
    assert gradient.isfinite().all()


@all_backends
def test_infinite_reverse_kl_and_rejected_reward(backend, device):
    """5. p > 0 where q = 0: the exact reverse KL is infinite and its row's gradient 0; the K1
    reward is -inf, and the trust gate rejects it for a finite outlier term."""
    z = torch.zeros(2, 5, device=device)
    t = torch.tensor([[0.0, 0, 0, 0, -math.inf], [0.0, 1, 2, 3, 4]], device=device)
    labels = torch.tensor([4, 4], device=device)
    teacher = LogitsTeacher(t)
    loss, gradient, _ = loss_and_gradient(
        z, labels, teacher, Divergence("reverse_kl"), backend, reduction="none"
    )
    assert loss[0] == math.inf
    assert loss[1].isfinite()
    assert not gradient[0].any()
    assert gradient[1].any()
    loss, gradient, stats = loss_and_gradient(
        z, labels, teacher, TrOPD(top_k=2), backend, reduction="none",
        uniforms=torch.zeros(2, device=device),
    )  # fmt: skip
    assert stats.reward[0] == -math.inf
    assert stats.trust.tolist() == [0, 1]
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0].any()


@all_backends
@pytest.mark.parametrize("lead", [6.0, 16.0, 25.0, 30.0])
def test_a_bucket_that_the_student_leaves_next_to_empty(lead, backend, device):
    """On K the coefficients q_tail / p_tail would cancel to nothing, and 1 - p(K) has no digits."""
    z, t = torch.randn(2, 4, 50, dtype=torch.float64, device=device)
    t[:, :3] += 4
    z[:, :3] += lead
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    rule = Divergence("forward_kl", top_k=3, top_k_tail="bucket")
    loss, gradient, _ = loss_and_gradient(z, labels, LogitsTeacher(t), rule, "reference")
    log_p, q = z.log_softmax(-1), t.softmax(-1)
    tail, log_tail = q[:, 3:].sum(-1), log_p[:, 3:].logsumexp(-1)
    exact = (q * (q.log() - log_p))[:, :3].sum(-1) + tail * (tail.log() - log_tail)
    torch.testing.assert_close(loss, exact.mean())
    ours, d, _ = loss_and_gradient(
        z.float(), labels, LogitsTeacher(t.float()), rule, backend, reduction="mean"
    )
    torch.testing.assert_close(ours, loss.float(), rtol=1e-5, atol=0)
    assert relative_error(d, gradient) < 2e-5


@both
@pytest.mark.parametrize("form", ["dense", "top_k"])
@pytest.mark.parametrize("lead", [12.0, 16.0, 20.0, 28.0, 60.0])
def test_an_empty_bucket_does_not_blow_up(lead, form, backend, device):
    """Where 1 - p(K) has no digits, or none are left at all, the loss is bounded; the gradient off
    K, times q(off K) over next to nothing, has to be."""
    z, t = torch.randn(2, 8, 4000, dtype=torch.float64, device=device)
    t[:, :8] += 8
    z[:, :8] += lead
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    rule = Divergence("forward_kl", top_k=8, top_k_tail="bucket")
    top = t.log_softmax(-1)[:, :8]

    def teacher(dtype):
        if form == "dense":
            return LogitsTeacher(t.to(dtype))
        ids = torch.arange(8, device=device).expand(8, 8)
        return TopKTeacher(ids, top.to(dtype), top[:, 0].to(dtype))

    loss, gradient, _ = loss_and_gradient(z, labels, teacher(torch.float64), rule, "reference")
    ours, d, _ = loss_and_gradient(z.float(), labels, teacher(torch.float32), rule, backend)
    assert ours < 1.1 * loss
    assert d.norm() < 1.05 * gradient.norm()
    assert relative_error(d[:, :8], gradient[:, :8]) < 1e-4


@all_backends
def test_a_label_that_the_student_excludes(backend, device):
    """5. Its reward is inf, and has no gradient either."""
    z = torch.tensor([[0.0, 1, -math.inf], [0.0, 1, 2]], device=device)
    labels = torch.tensor([2, 2], device=device)
    for rule in (OPD(), OPD(clip_ratio_low=0.2, clip_ratio_high=0.2)):
        loss, gradient, stats = loss_and_gradient(
            z, labels, LogitsTeacher(torch.zeros_like(z)), rule, backend, reduction="none"
        )
        assert loss[0] == -math.inf and stats.trust.tolist() == [1, 1]
        assert not gradient[0].any() and gradient[1].any()


def label_that_both_exclude(name, backend, device):
    """(losses, gradient, statistics): of two tokens, the first one's reward is inf - inf."""
    z, t = torch.randn(2, 2, 9, device=device)
    z[0, 5] = t[0, 5] = -math.inf
    return loss_and_gradient(
        z, torch.tensor([5, 6], device=device), LogitsTeacher(t), OBJECTIVES[name], backend,
        reduction="none", uniforms=torch.full((2,), 0.01, device=device),
    )  # fmt: skip


@all_backends
@pytest.mark.parametrize("name", ["tropd", "tropd_mask", "aopd"])
def test_a_label_that_both_exclude(name, backend, device):
    """5. min(q/p, 1) is 0/0 there: not 1, or its reward would be trusted."""
    loss, gradient, stats = label_that_both_exclude(name, backend, device)
    assert stats.trust[0] == 0
    assert loss.isfinite().all() and gradient.isfinite().all()


@all_backends
@pytest.mark.parametrize("name", ["clip_outlier", "opd"])
def test_a_clip_does_not_hide_an_undefined_reward(name, backend, device):
    """Where no gate rejects its token it is NaN, and no bound."""
    loss, _, _ = label_that_both_exclude(name, backend, device)
    assert loss.isnan().tolist() == [True, False]


@all_backends
def test_an_infinite_reward_has_no_gradient(backend, device):
    """5. The reward of a label that the teacher excludes, where no gate rejects it."""
    z = torch.zeros(2, 5, device=device)
    t = torch.tensor([[0.0, 0, 0, 0, -math.inf], [0.0, 1, 2, 3, 4]], device=device)
    labels = torch.tensor([4, 4], device=device)
    loss, gradient, stats = loss_and_gradient(
        z, labels, LogitsTeacher(t), OPD(), backend, reduction="none"
    )
    assert stats.reward[0] == -math.inf and loss[0] == math.inf
    assert not gradient[0].any()
    assert loss[1].isfinite() and gradient[1].any()


@all_backends
@pytest.mark.parametrize("name", ["tropd", "mopd", "reverse_kl", "akl", "gkd", "forward_kl_top_k"])
def test_a_row_that_holds_nan_says_so(name, backend, device):
    """The comparisons of gates and sets would pass it by; other rows are as they were."""
    clean, t = torch.randn(2, 3, 50, device=device)
    labels = torch.tensor([1, 2, 3], device=device)
    options = dict(reduction="none", uniforms=torch.full((3,), 0.5, device=device))

    def run(z, t):
        return loss_and_gradient(z, labels, LogitsTeacher(t), OBJECTIVES[name], backend, **options)

    expected = run(clean, t)
    for side in ("student", "teacher"):
        pair = {"student": clean.clone(), "teacher": t.clone()}
        pair[side][1, 7] = math.nan
        loss, gradient, _ = run(pair["student"], pair["teacher"])
        assert loss[1].isnan() and gradient[1].isnan().any()
        assert torch.equal(loss[[0, 2]], expected[0][[0, 2]])
        assert torch.equal(gradient[[0, 2]], expected[1][[0, 2]])


def test_a_gate_that_rejects_nothing_needs_no_outlier_term(device):
    """A sampled teacher could not give its KL. Nor are there masses of a K that no rule reads."""
    z, labels = torch.randn(2, 5, device=device), torch.tensor([0, 1], device=device)
    rule = TrOPD(gate="always")
    assert rule == OPD()
    teacher = SampledTeacher(torch.tensor([-1.0, -2.0], device=device))
    loss, gradient, _ = loss_and_gradient(z, labels, teacher, rule, "reference")
    ours, d, _ = loss_and_gradient(z, labels, teacher, rule, "torch")
    torch.testing.assert_close((loss, gradient), (ours, d))
    _, _, stats = loss_and_gradient(z, labels, LogitsTeacher(z), OPD(), "reference")
    assert stats.teacher_topk_mass.isnan().all()


@all_backends
def test_tail_of_a_teacher_whose_ids_hold_all_its_mass(backend, device):
    """6. log(1 - sum) where the given probabilities sum to 1 or a little more."""
    z = torch.randn(2, 9, device=device)
    ids = torch.tensor([[0, 1], [2, 3]], device=device)
    log_probs = torch.tensor([[0.5, 0.5], [0.6, 0.4000003]], device=device).log()
    teacher = TopKTeacher(ids, log_probs, log_probs[:, 0])
    rule = Divergence("forward_kl", top_k=2, top_k_tail="bucket")
    labels = torch.tensor([0, 2], device=device)
    loss, gradient, _ = loss_and_gradient(z, labels, teacher, rule, backend)
    raw, _, _ = loss_and_gradient(z, labels, teacher, Divergence("forward_kl", top_k=2), backend)
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss, raw, rtol=1e-5, atol=1e-6)  # an empty tail adds nothing


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gkd", "skew_forward", "skew_reverse", "topk_jsd"])
def test_probabilities_that_the_mixture_rounds_to_0(name, dtype, backend, device):
    """The smallest subnormal numbers: a half of p and of q is 0 while they are not."""
    low = -745.0 if dtype == torch.float64 else -103.5
    lp, lq = (low + torch.linspace(-1.0, 3.0, n, dtype=torch.float64) for n in (9, 11))
    grid = torch.cartesian_prod(lp, lq).to(device, dtype)
    z, t = (torch.cat([torch.zeros_like(grid[:1, i]), grid[:, i]])[None] for i in (0, 1))
    t[0, 0] = 0.5
    label = torch.zeros(1, dtype=torch.long, device=device)
    out = loss_and_gradient(z, label, LogitsTeacher(t), OBJECTIVES[name], backend)
    truth = loss_and_gradient(
        z.double(), label, LogitsTeacher(t.double()), OBJECTIVES[name], "reference"
    )
    assert out[0].item() == pytest.approx(truth[0].item(), abs=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(out[1].double(), truth[1], rtol=0, atol=8 * torch.finfo(dtype).eps)


@all_backends
def test_no_weight_on_an_infinite_loss(backend, device):
    """Not 0 * inf, where the caller says that every token counts."""
    z, t = torch.zeros(2, 4, 5, device=device)
    t[0, 1] = -math.inf
    label = torch.ones(4, dtype=torch.long, device=device)
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0], device=device)
    loss, gradient, _ = loss_and_gradient(
        z, label, LogitsTeacher(t), OPD(), backend, token_weight=weight, ignore_index=None
    )
    assert loss.isfinite() and gradient.isfinite().all()


@all_backends
@pytest.mark.parametrize("clip", [None, 0.2])
def test_an_infinite_reward_under_a_ratio_of_0(clip, backend, device):
    """exp(-200 + 1) is 0 in float32; the loss is infinite all the same."""
    z = torch.tensor([[-200.0, 0.0, 0.0]], device=device)
    t = torch.tensor([[-math.inf, 0.0, 0.0]], device=device)
    loss, gradient, _ = loss_and_gradient(
        z, torch.tensor([0], device=device), LogitsTeacher(t),
        OPD(clip_ratio_low=clip, clip_ratio_high=clip), backend,
        old_log_probs=torch.tensor([-1.0], device=device),
    )  # fmt: skip
    assert loss == math.inf and not gradient.any()


@all_backends
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_token_of_which_the_teacher_gave_no_id(name, tail, backend, device):
    """Padding alone: no loss and no gradient, and the token beside it is as it would be alone."""
    z = torch.randn(2, 6, device=device)
    ids = torch.tensor([[-1, -1], [1, 2]], device=device)
    log_q = torch.tensor([[-math.inf, -math.inf], [-1.0, -2.0]], device=device)
    known = torch.tensor([-1.0, -1.0], device=device)
    label = torch.tensor([0, 1], device=device)
    rule = Divergence(name, top_k=2, top_k_tail=tail)
    loss, gradient, _ = loss_and_gradient(
        z, label, TopKTeacher(ids, log_q, known), rule, backend, reduction="none"
    )
    _, alone, _ = loss_and_gradient(
        z[1:], label[1:], TopKTeacher(ids[1:], log_q[1:], known[1:]), rule, backend,
        reduction="none",
    )  # fmt: skip
    assert loss[0].abs() <= 1e-6 and gradient[0].abs().max() <= 1e-6
    torch.testing.assert_close(gradient[1:], alone)
