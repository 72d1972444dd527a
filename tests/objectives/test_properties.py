"""Properties that hold for every objective, teacher and batch, on inputs that Hypothesis picks.

The torch backend, and the Triton kernels in few and small examples, against the reference in
float64; and what any loss of this package obeys whatever its formula: reductions agree, rows do not
see each other, softmax does not see a constant, two runs are bitwise equal.

Hypothesis draws the structure (shapes, spreads, masks, options) and a seed for the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import OBJECTIVES, TEACHERS, K, inputs_of, serves
from torch.testing import assert_close

from tropd_kernels import (
    Divergence,
    HiddenTeacher,
    LogitsTeacher,
    SampledTeacher,
    TopKTeacher,
    distillation_loss,
    linear_distillation_loss,
)
from tropd_kernels.objectives import TAILS

SHAPES = [(1,), (9,), (4,), (2, 3), (), (0,), (3, 1, 2), (2, 0)]
REDUCTIONS = ("mean", "sum", "none")
F64 = torch.float64
#: Offsets of 1e4 cost 1e-12 of every log-prob; a KL that is 0 in truth shows that much.
FLOOR = 1e-10


def few(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """One call. `student` and `teacher` hold logits (*, V), or hidden states and a head."""

    name: str
    form: str
    student: tuple
    teacher: tuple
    labels: torch.Tensor
    options: dict = field(default_factory=dict)

    @property
    def rule(self):
        return OBJECTIVES[self.name]

    @property
    def linear(self) -> bool:
        return len(self.student) > 1


@st.composite
def cases(draw, names=tuple(OBJECTIVES), shapes=SHAPES, vocab=70, linear=None, student_masks=True):
    """A case whose values are finite wherever the mathematics says so: see the comments."""
    name = draw(st.sampled_from(names))
    rule = OBJECTIVES[name]
    form = draw(st.sampled_from([form for form in TEACHERS if serves(form, name)]))
    shape = draw(st.sampled_from(shapes))
    sizes = [draw(st.integers(1, vocab)) for _ in range(2)]
    if draw(st.booleans()):
        sizes[1] = sizes[0]
    linear = draw(st.booleans()) if linear is None else linear
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*size):
        return torch.randn(size, generator=rng, dtype=F64)

    def uniform(*size):
        return torch.rand(size, generator=rng, dtype=F64)

    # With less than e^-80 of the student's mass on K, its own renormalised p on K is left out.
    # The mass that a top-k teacher leaves off K, of which a reverse KL takes the logarithm, is a
    # difference from 1: next to nothing has no digits.
    narrow = rule.top_k_tail == "renormalize_both" or name == "topk_reverse_kl_bucket"
    spreads = [3.0, 0.1] if narrow else [3.0, 0.1, 30.0]

    def head(v):
        width = draw(st.integers(1, 6))
        spread = draw(st.sampled_from(spreads)) / width**0.5
        bias = normal(v) if draw(st.booleans()) else None
        return normal(*shape, width), normal(v, width) * spread, bias

    def logits(v):
        spread = draw(st.sampled_from(spreads))
        offset = draw(st.sampled_from([0.0, 1.0, 1e4]))
        z = normal(*shape, v) * spread + normal(*shape, 1) * offset
        return z.bfloat16().to(F64) if draw(st.booleans()) else z  # bf16 has ties

    v = min(sizes)
    labels = torch.randint(v, shape, generator=rng)

    def exclude(z, label_too):
        """-inf at ids that a model never utters, in half of the rows; one id at least stays."""
        gone = (uniform(*z.shape) < 0.3) & (uniform(*shape, 1) < 0.5)
        keep = labels if not label_too else (labels + 1) % v
        gone.scatter_(-1, keep.unsqueeze(-1), False)
        return z.masked_fill(gone, -math.inf)

    options = dict(inputs_of(rule, labels))
    if draw(st.booleans()):
        options["teacher_prefix"] = uniform(*shape) < 0.3
    # A label of teacher probability 0 has the reward -inf. A gate rejects it; without one, and on a
    # prefix, minus infinity is the answer.
    gated = rule.gate != "always" and "teacher_prefix" not in options
    student = head(sizes[0]) if linear else (logits(sizes[0]),)
    # Minus an infinite KL as a reward is minus infinity again.
    student_masks = student_masks and rule.outlier != "forward_kl_reward"
    if not linear and student_masks and draw(st.booleans()):
        student = (exclude(student[0], label_too=False),)
    teacher = head(sizes[1]) if form == "hidden" else (logits(sizes[1]),)
    if form != "hidden" and draw(st.booleans()):
        teacher = (exclude(teacher[0], label_too=gated and draw(st.booleans())),)

    if draw(st.booleans()):
        labels = torch.where(uniform(*shape) < 0.3, -100, labels)
    if draw(st.booleans()):
        # Not negative: two infinite losses would meet as inf - inf.
        options["token_weight"] = 2 * uniform(*shape) * (uniform(*shape) < 0.8)
    if draw(st.booleans()):
        options["old_log_probs"] = -4 * uniform(*shape)
    if draw(st.booleans()) and rule.reads_advantages:
        options["advantages"] = normal(*shape)
    if draw(st.booleans()):
        options["temperature"] = 1.7
    if linear and draw(st.booleans()):
        options |= {"logit_scale": -0.6, "softcap": 11.0}
    if rule.gate == "bernoulli":
        options["uniforms"] = uniform(*shape)
    return Case(name, form, student, teacher, labels, options)


def make_teacher(case: Case, dtype=F64, shift: torch.Tensor | float = 0.0):
    """In the case's form. `shift` (*, 1) is added to the logits, where there are any."""
    if not case.rule.uses_teacher:
        return None
    if case.form == "hidden":
        return HiddenTeacher(*(None if t is None else t.to(DEVICE, dtype) for t in case.teacher))
    z = case.teacher[0] + shift
    if case.form == "logits":
        return LogitsTeacher(z.to(DEVICE, dtype))
    # Log-probs over the ids that both models have, at the temperature of the call.
    v = min(z.shape[-1], vocab_size(case))
    log_q = (z[..., :v] / case.options.get("temperature", 1.0)).log_softmax(-1)
    label = log_q.gather(-1, case.labels.clamp(0).unsqueeze(-1)).squeeze(-1).to(DEVICE, dtype)
    if case.form == "sampled":
        return SampledTeacher(label)
    # Two ids more than asked for, and padding where the vocabulary is smaller than that.
    top = log_q.topk(min(K + 2, v), -1)
    pad = (0, K + 2 - top.values.shape[-1])
    ids = torch.nn.functional.pad(top.indices, pad, value=-1)
    log_probs = torch.nn.functional.pad(top.values, pad, value=-math.inf)
    return TopKTeacher(ids.to(DEVICE), log_probs.to(DEVICE, dtype), label)


def vocab_size(case: Case) -> int:
    return case.student[1].shape[0] if case.linear else case.student[0].shape[-1]


def run(case: Case, backend: str, reduction="mean", incoming=None, dtype=F64, shift=0.0):
    """(loss, gradients, stats); `incoming` is the gradient of a loss that is not a scalar."""
    leaves = [
        t if t is None else t.detach().to(DEVICE, dtype, copy=True).requires_grad_()
        for t in case.student
    ]
    options = {
        k: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for k, t in case.options.items()
    }
    options |= {"reduction": reduction, "backend": backend}
    args = (case.labels.to(DEVICE), make_teacher(case, dtype, shift), case.rule)
    if case.linear:
        hidden, weight, bias = leaves
        out = linear_distillation_loss(hidden, weight, *args, bias=bias, **options)
    else:
        out = distillation_loss(leaves[0], *args, **options)
    out.loss.backward(None if incoming is None else incoming.to(DEVICE, out.loss.dtype))
    return out.loss.detach(), [t.grad for t in leaves if t is not None], out.stats


def close(value, truth, cancelled=0.0):
    """To a relative error of 1e-8; NaN nowhere; an entry of a gradient against the largest.

    cancelled: a gradient p g - p sum(p g) is the difference of numbers as large as the loss.
    """
    assert not value.isnan().any() and not truth.isnan().any()
    atol = 1e-8 * largest(truth) + 1e-12 * cancelled + FLOOR
    assert_close(value, truth, rtol=1e-8, atol=atol)


def largest(tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def compare(case: Case, backend: str, reduction: str, incoming):
    loss, gradients, stats = run(case, backend, reduction, incoming)
    true_loss, true_gradients, true_stats = run(case, "reference", reduction, incoming)
    close(loss, true_loss)
    for gradient, truth in zip(gradients, true_gradients, strict=True):
        close(gradient, truth, cancelled=largest(true_stats.token_loss))
    for name, truth in vars(true_stats).items():
        value = getattr(stats, name)
        assert (value is None) == (truth is None), name
        if value is not None:  # NaN where the objective had no need of the number
            known = ~value.isnan()
            assert_close(value[known], truth[known], rtol=1e-8, atol=1e-8, msg=name)
    for name in ("log_probs", "entropy", "token_loss", "kept"):
        assert not getattr(stats, name).isnan().any(), name
    assert case.rule.score is not None or not stats.trust.isnan().any()


def incoming_for(case: Case, reduction: str, seed: int = 0):
    if reduction != "none":
        return None
    return torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_torch_rows_match_the_reference(name):
    @few(8)
    @given(cases(names=(name,)), st.sampled_from(REDUCTIONS))
    def check(case, reduction):
        compare(case, "torch", reduction, incoming_for(case, reduction))

    check()


@few(10)  # slow under the interpreter
@given(cases(shapes=[(3,), (1,), (2, 1), ()], vocab=40), st.sampled_from(REDUCTIONS))
def test_triton_rows_match_the_reference(case, reduction):
    compare(case, "triton", reduction, incoming_for(case, reduction))


@pytest.mark.parametrize(("backend", "seeds"), [("torch", 30), ("native", 30), ("triton", 5)])
def test_the_backward_finds_the_ids_of_the_forward(backend, seeds):
    """Logits that exist and a HiddenTeacher: the backward makes the teacher's logits again. By a
    product of another height they would round otherwise, and the k-th likeliest id drop out of K
    for a last bit."""
    for seed in range(seeds):
        rng = torch.Generator().manual_seed(seed)
        student = torch.randn(4, 40, generator=rng, dtype=F64)
        teacher = [torch.randn(n, 24, generator=rng, dtype=F64) for n in (4, 40)]
        labels = torch.tensor([3, 5, -100, -100])
        case = Case("forward_kl_top_k", "hidden", (student,), (*teacher, None), labels)
        _, (gradient,), _ = run(case, backend, "sum")
        _, (truth,), _ = run(case, "reference", "sum")
        close(gradient, truth)


INFINITE = {
    "forward_kl": Divergence("forward_kl"),
    "reverse_kl": Divergence("reverse_kl"),
    "chi2": Divergence("chi2"),
    "alpha_above_1": Divergence("alpha", alpha=1.5),
    "todi": Divergence("todi"),
    **{tail: Divergence("forward_kl", top_k=2, top_k_tail=tail) for tail in TAILS},
}


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
def test_an_infinite_divergence_has_no_gradient(name, backend):
    """Each side excludes an id that the other likes. The loss says so; the gradient is 0 in that
    row and untouched in the other, at the excluded ids too."""
    z, t = torch.zeros(2, 12, dtype=F64), torch.zeros(2, 12, dtype=F64)
    z[:, 1], t[:, 1], t[:, 2], z[:, 3] = 1.0, 2.0, 3.0, 2.0
    z[0, 2] = t[0, 3] = -math.inf
    z[1, 7] = t[1, 7] = -math.inf  # excluded by both: nothing infinite about it
    z = z.to(DEVICE).requires_grad_()
    out = distillation_loss(
        z, torch.tensor([1, 1], device=DEVICE), LogitsTeacher(t.to(DEVICE)), INFINITE[name],
        reduction="none", backend=backend,
    )  # fmt: skip
    out.loss.sum().backward()
    assert out.loss[0] == math.inf and out.loss[1].isfinite()
    assert torch.equal(z.grad[0], torch.zeros_like(z.grad[0]))
    assert z.grad[1].isfinite().all() and z.grad[1, 7] == 0 and z.grad[1].norm() > 0.01


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
def test_a_student_that_excludes_all_of_k(tail, backend):
    """The log of its mass on K is -inf, and infinite minus infinite would be NaN."""
    z = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]], device=DEVICE, requires_grad=True)
    t = torch.tensor([[-3.0, 1.0, 2.0, 0.0]], device=DEVICE)
    out = distillation_loss(
        z, torch.tensor([0], device=DEVICE), LogitsTeacher(t),
        Divergence("forward_kl", top_k=2, top_k_tail=tail), backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == math.inf and not z.grad.any()


@few(40)
@given(cases(), st.sampled_from(REDUCTIONS))
def test_float32_has_no_nan(case, reduction):
    """With logits that overflow exp() in float32 on their own; +inf is an answer, NaN is not."""
    incoming = incoming_for(case, reduction)
    loss, gradients, stats = run(case, "torch", reduction, incoming, dtype=torch.float32)
    assert not loss.isnan().any() and not stats.token_loss.isnan().any()
    for gradient in gradients:
        assert gradient.isfinite().all()


# --- whatever the formula ----------------------------------------------------------------------


@few(40)
@given(cases(linear=False, student_masks=False), st.sampled_from(REDUCTIONS))
def test_logits_are_hidden_states_of_an_identity_head(case, reduction):
    logits = case.student[0]
    twin = replace(case, student=(logits, torch.eye(logits.shape[-1], dtype=F64), None))
    incoming = incoming_for(case, reduction)
    loss, (gradient,), _ = run(case, "torch", reduction, incoming)
    twin_loss, (d_hidden, _), _ = run(twin, "torch", reduction, incoming)
    close(loss, twin_loss)
    close(gradient, d_hidden)


@few(40)
@given(cases())
def test_reductions_agree(case):
    """none sums to sum, and sum is the mean times the number of tokens that count."""
    none, none_gradients, stats = run(case, "torch", "none", torch.ones(case.labels.shape))
    total, sum_gradients, _ = run(case, "torch", "sum")
    mean, mean_gradients, _ = run(case, "torch", "mean")
    counts = case.labels != -100
    if "token_weight" in case.options:
        counts &= case.options["token_weight"] != 0
    count = stats.kept.sum() if case.rule.normalize == "kept" else counts.sum()
    count = max(1, int(count))
    close(none.sum(), total)
    close(mean * count, total)
    for each, whole, part in zip(none_gradients, sum_gradients, mean_gradients, strict=True):
        close(each, whole)
        close(part * count, whole)


@few(40)
@given(cases(), st.sampled_from(REDUCTIONS), st.integers(-10_000, 10_000))
def test_a_constant_on_a_teacher_row_changes_nothing(case, reduction, constant):
    # Another constant on each row, and an integer, so that ties stay ties.
    rows = torch.arange(case.labels.numel(), dtype=F64).reshape(*case.labels.shape, 1)
    if case.form == "hidden":  # as a bias: the head has no room for a constant per row
        hidden, weight, bias = case.teacher
        bias = constant + (torch.zeros(weight.shape[0], dtype=F64) if bias is None else bias)
        moved, shift = replace(case, teacher=(hidden, weight, bias)), 0.0
    else:
        moved, shift = case, constant + 7 * rows
    incoming = incoming_for(case, reduction)
    loss, gradients, _ = run(case, "torch", reduction, incoming)
    moved_loss, moved_gradients, _ = run(moved, "torch", reduction, incoming, shift=shift)
    close(moved_loss, loss)
    for gradient, truth in zip(moved_gradients, gradients, strict=True):
        close(gradient, truth)


@few(40)
@given(cases(shapes=[(9,), (4,), (1,), (0,)]), st.permutations(range(9)))
def test_tokens_do_not_see_each_other(case, order):
    """Permuted tokens have permuted losses and gradients, and the head the same gradient. (A rule
    that ranks the batch by entropy ranks a set, not a sequence.)"""
    n = case.labels.shape[0]
    order = torch.tensor([i for i in order if i < n], dtype=torch.int64)

    def per_token(t):
        return t[order] if isinstance(t, torch.Tensor) else t

    def side(tensors):
        return (tensors[0][order], *tensors[1:])

    permuted = replace(
        case,
        student=side(case.student),
        teacher=side(case.teacher),
        labels=case.labels[order],
        options={k: per_token(t) for k, t in case.options.items()},
    )
    incoming = incoming_for(case, "none")
    losses, (rows, *head), _ = run(case, "torch", "none", incoming)
    permuted_losses, (permuted_rows, *permuted_head), _ = run(
        permuted, "torch", "none", incoming[order]
    )
    order = order.to(DEVICE)
    close(permuted_losses, losses[order])
    close(permuted_rows, rows[order])
    for gradient, truth in zip(permuted_head, head, strict=True):
        close(gradient, truth)


@pytest.mark.parametrize(("backend", "examples"), [("torch", 40), ("native", 40), ("triton", 3)])
def test_two_runs_are_bitwise_equal(backend, examples):
    small = dict(shapes=[(2,), (2, 1)], vocab=40) if backend == "triton" else {}

    @few(examples)
    @given(cases(**small), st.sampled_from(REDUCTIONS))
    def check(case, reduction):
        incoming = incoming_for(case, reduction)
        first, second = (run(case, backend, reduction, incoming, torch.float32) for _ in range(2))
        assert torch.equal(first[0], second[0])
        for a, b in zip(first[1], second[1], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(vars(first[2]).values(), vars(second[2]).values(), strict=True):
            assert a is b is None or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))

    check()
