"""The numerical defects that this field has shipped. Each test names one and fails without its
cure."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import (
    OBJECTIVES,
    K,
    loss_and_gradient,
    make_problem,
    relative_error,
    with_everything,
)

from tropd_kernels import (
    GKD,
    OPD,
    SFT,
    Divergence,
    EntropyOPD,
    HiddenTeacher,
    LogitsTeacher,
    SampledTeacher,
    TopKTeacher,
    TrOPD,
    distillation_loss,
    functional,
    linear_distillation_loss,
    linear_log_probs,
)
from tropd_kernels.loss import plan as chunking
from tropd_kernels.rows.layout import Stat

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
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_nothing_to_learn_from(backend, reduction, tokens, device):
    """8. A fully masked or empty batch: loss 0, gradients 0 and connected to the graph."""
    hidden = torch.randn(tokens, 8, device=device, requires_grad=True)
    weight = torch.randn(13, 8, device=device, requires_grad=True)
    labels = torch.full((tokens,), -100, device=device)
    frozen = (torch.randn(n, 4, device=device) for n in (tokens, 13))
    teacher = HiddenTeacher(*frozen)
    for objective in (TrOPD(top_k=K), OBJECTIVES["entropy_opd"], OBJECTIVES["reopold_1"]):
        loss = linear_distillation_loss(
            hidden, weight, labels, teacher, objective, seed=0, backend=backend, reduction=reduction
        ).loss
        assert loss.shape == (labels.shape if reduction == "none" else ())
        assert not loss.any()
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert [g.shape for g in gradients] == [hidden.shape, weight.shape]
        assert not any(g.any() for g in gradients)


def test_more_rows_than_a_grid_axis_holds(device):
    """8. 65,536 rows and more lie on grid axis 0. On a CPU only the torch backend can be asked."""
    backend = "triton" if device == "cuda" else "torch"
    n = 65_537
    hidden = torch.randn(n, 4, device=device, requires_grad=True)
    weight = torch.randn(8, 4, device=device)
    labels = torch.randint(8, (n,), device=device)
    loss = linear_distillation_loss(hidden, weight, labels, None, SFT(), backend=backend).loss
    loss.backward()
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T), labels)
    assert relative_error(loss.detach(), expected.detach()) < 1e-5
    assert hidden.grad[-1].any()


def test_row_offsets_are_64_bit():
    """8. N * V beyond 2^31 overflows 32-bit offsets: every kernel makes its row index 64-bit before
    it multiplies. Read from the source, since no test machine holds the matrix."""
    from tropd_kernels.rows import triton_kernels

    (folder,) = triton_kernels.__path__
    source = "".join(path.read_text() for path in Path(folder).glob("*.py"))
    assert source.count("tl.program_id(0)") >= 6
    assert source.count("tl.program_id(0)") == source.count("tl.program_id(0).to(tl.int64)")
    # Axis 1 counts parts of a row, whose ids are below V.
    assert source.count("program_id(1)") == len(re.findall(r"\bpart = .*program_id\(1\)", source))
    assert not re.search(r"\bpart\b.*stride", source)


@both
def test_label_outside_the_vocabulary(backend, device):
    """9. An error where it can be seen without a sync; otherwise NaN in that row, and in no
    other."""
    hidden = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.randn(13, 8, device=device)
    labels = torch.tensor([0, 13, 2], device=device)
    with pytest.raises(ValueError, match="label 13 lies outside the vocabulary of 13 ids"):
        linear_distillation_loss(hidden, weight, labels, None, SFT(), backend=backend)
    from tropd_kernels.backends import engine_for
    from tropd_kernels.rows.layout import Coef, LogitTransform, RowBatch, RowOptions, Stat

    # With ignore_index=None on a GPU nobody looks: the engine itself must not read elsewhere.
    plain = LogitTransform()
    logits = (hidden @ weight.T).detach()
    for wrong in (13, -1, -(2**62), 2**62):
        batch = RowBatch(logits, None, torch.tensor([0, wrong, 2], device=device))
        options = RowOptions(SFT(), plain, plain)
        stats, coefs = engine_for(backend).forward(batch, options)
        assert stats[Stat.TOKEN_LOSS].isnan().tolist() == [False, True, False]
        assert coefs[Coef.P].isnan().tolist() == [False, True, False]
        out = torch.zeros_like(logits)
        engine_for(backend).gradient(batch, coefs, options, out)
        assert out.isnan().any(1).tolist() == [False, True, False]


@all_backends
def test_ids_outside_the_vocabulary_are_padding(backend, device):
    """9. ... and a top-k teacher's ids never read or write outside a row."""
    z = torch.randn(2, 7, device=device)
    ids = torch.tensor([[1, 2, -1, 7], [3, 4, 5, 2**40]], device=device)
    log_probs = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log().expand(2, 4).contiguous()
    labels = torch.tensor([1, 3], device=device)
    rule = Divergence("forward_kl", top_k=4)
    ours = loss_and_gradient(z, labels, TopKTeacher(ids, log_probs, log_probs[:, 0]), rule, backend)
    clean = log_probs.masked_fill((ids < 0) | (ids >= 7), -math.inf)
    expected = loss_and_gradient(
        z.double(), labels,
        TopKTeacher(ids.clamp(0, 6), clean.double(), clean[:, 0].double()), rule, "reference",
    )  # fmt: skip
    assert relative_error(ours[0], expected[0]) < 1e-5
    assert relative_error(ours[1], expected[1]) < 1e-5


@both
def test_expanded_incoming_gradient(backend, device):
    """10. `.sum().backward()` hands in a gradient of stride 0."""
    problem = make_problem(tokens=4, device=device)
    _, summed, _ = problem.call(GKD(), "hidden", backend, reduction="sum")
    _, expanded, _ = problem.call(
        GKD(), "hidden", backend, reduction="none", incoming=torch.ones((), device=device)
    )
    for key in summed:
        torch.testing.assert_close(expanded[key], summed[key], rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("form", ["hidden", "top_k"])
def test_inputs_may_be_views_of_any_stride(form, backend, device):
    """10. ... and per-token inputs columns of something wider."""
    problem = with_everything(make_problem(tokens=12, device=device))
    _, expected, _ = problem.call(OBJECTIVES["tropd"], form, backend)

    def column(t):
        return torch.stack([t, torch.roll(t, 1)], dim=-1)[..., 0]

    problem.labels = column(problem.labels)
    for name in ("bias", "teacher_bias"):
        setattr(problem, name, column(getattr(problem, name)))
    for name, value in problem.options.items():
        if isinstance(value, torch.Tensor):
            problem.options[name] = column(value)
    strided = problem.teacher(form, torch.float32, problem.options["temperature"])
    if form == "top_k":
        strided = replace(strided, label_log_probs=column(strided.label_log_probs))
    problem.teacher = lambda *_: strided
    # Where no token is dropped nothing else copies them.
    problem.labels = problem.labels.clamp_min(0)
    problem.options["token_weight"] = column(problem.options["token_weight"] + 0.1)
    _, found, _ = problem.call(OBJECTIVES["tropd"], form, backend)
    for name in ("labels", "bias", "teacher_bias"):
        setattr(problem, name, getattr(problem, name).contiguous())
    problem.options = {
        k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()
    }
    _, expected, _ = problem.call(OBJECTIVES["tropd"], form, backend)
    for key in expected:
        assert torch.equal(found[key], expected[key])


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_be_one_row_many_times(dtype, backend, device):
    """expand(): hidden states, heads and logits of both sides."""
    hidden, head, teacher = (torch.randn(n, 16, device=device).to(dtype) for n in (4, 40, 4))
    labels = torch.arange(4, device=device)

    def results(hidden, head, teacher):
        logits = hidden @ head.T
        outs = (
            linear_distillation_loss(
                hidden, head, labels, HiddenTeacher(teacher, head), GKD(), backend=backend
            ),
            distillation_loss(
                logits[:1].expand(4, -1) if hidden.stride(0) == 0 else logits, labels,
                LogitsTeacher(logits.flip(1)[:1].expand(4, -1)), GKD(), backend=backend,
            ),
        )  # fmt: skip
        return [out.loss for out in outs]

    for name in ("hidden", "head", "teacher"):
        tensors = dict(hidden=hidden, head=head, teacher=teacher)
        tensors[name] = tensors[name][:1].expand_as(tensors[name])
        copied = {key: tensor.contiguous() for key, tensor in tensors.items()}
        assert results(**tensors)[0] == results(**copied)[0]
    results(hidden[:1].expand(4, -1), head, teacher)


@all_backends
def test_a_bias_wider_than_the_hidden_states(backend, device):
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    head, bias = torch.randn(16, 8, device=device), torch.randn(16, device=device)
    teacher = torch.randn(4, 8, device=device)
    labels = torch.arange(4, device=device)
    found = [
        linear_distillation_loss(
            hidden, head, labels, HiddenTeacher(teacher, head, b), GKD(), bias=b, backend=backend
        ).loss
        for b in (bias, bias.double())
    ]
    torch.testing.assert_close(*found)


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


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_and_options_that_leave_no_input_out(reduction, backend, device):
    """10. Autograd takes a list without a gap for a list of tensors."""
    problem = make_problem(tokens=4, device=device)
    top_k = problem.teacher("top_k", torch.float32)
    whole = replace(top_k, entropy=torch.ones(4, device=device))
    options = dict(
        old_log_probs=torch.full((4,), -3.0, device=device),
        advantages=torch.ones(4, device=device), token_weight=torch.ones(4, device=device),
        teacher_prefix=torch.zeros(4, dtype=torch.bool, device=device),
        uniforms=torch.full((4,), 0.5, device=device), backend=backend, reduction=reduction,
    )  # fmt: skip

    def gradient(teacher, **more):
        hidden = problem.hidden.float().requires_grad_()
        out = linear_distillation_loss(
            hidden,
            problem.weight.float(),
            problem.labels,
            teacher,
            TrOPD(top_k=K),
            **options | more,
        )
        out.loss.sum().backward()
        return hidden.grad

    assert torch.equal(gradient(whole), gradient(top_k))


@both
@pytest.mark.parametrize("form", ["logits", "top_k"])
@pytest.mark.parametrize("name", ["tropd", "tropd_bucket", "tropd_renormalize_both", "mopd"])
def test_the_label_s_log_prob_carries_a_gradient_beside_the_loss(
    name, form, backend, device, monkeypatch
):
    """The op's statistics are differentiable, on K and off it; the public calls detach them."""
    problem, kept = make_problem(tokens=6, device=device), {}
    found = functional._found

    def keeping(*arguments, **more):
        result = found(*arguments, **more)
        kept["log_probs"] = result[0][2][Stat.LOG_PROB]
        return result

    monkeypatch.setattr(functional, "_found", keeping)

    def gradient(backend):
        hidden = problem.hidden.clone().requires_grad_()
        loss = linear_distillation_loss(
            hidden, problem.weight, problem.labels, problem.teacher(form, torch.float64),
            OBJECTIVES[name], backend=backend, reduction="none", **problem.options,
        ).loss  # fmt: skip
        (loss.sum() + 0.7 * kept["log_probs"].sum()).backward()
        return hidden.grad

    assert relative_error(gradient(backend), gradient("reference")) < 1e-14


def test_second_derivative_raises(device):
    """10. The gradients are constants of the forward: a penalty on them would be silently dropped
    from a sum in which other terms have a graph."""
    problem = make_problem(tokens=4, device=device)
    hidden = problem.hidden.float().requires_grad_()
    teacher = problem.teacher("hidden", torch.float32)
    for reduction in ("mean", "none"):
        loss = linear_distillation_loss(
            hidden, problem.weight.float(), problem.labels, teacher, GKD(), reduction=reduction,
            backend="torch",
        ).loss.sum()  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated once.*backend='reference'"):
            torch.autograd.grad(gradient.sum() + hidden.square().sum(), hidden)


def test_second_derivative_of_the_reference(device):
    """What the error recommends, against differences of the gradient."""
    problem = make_problem(tokens=4, device=device)
    teacher, step = problem.teacher("hidden", torch.float64), 1e-6

    def gradient(hidden, **more):
        loss = linear_distillation_loss(
            hidden, problem.weight, problem.labels, teacher, GKD(), backend="reference"
        ).loss
        return torch.autograd.grad(loss, hidden, **more)[0]

    hidden = problem.hidden.clone().requires_grad_()
    along = torch.randn_like(hidden)
    (product,) = torch.autograd.grad(gradient(hidden, create_graph=True), hidden, along)
    with torch.no_grad():
        ends = [(hidden + s * along).requires_grad_() for s in (step, -step)]
    difference = (gradient(ends[0]) - gradient(ends[1])) / (2 * step)
    assert relative_error(product, difference) < 1e-6


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


def test_entropies_are_ranked_in_the_loop_s_own_chunks(monkeypatch):
    """13. A product of another height rounds otherwise: the entropy at the quantile would miss
    itself."""
    from tropd_kernels.rows import torch_rows

    seen = {"entropy": [], "forward": []}
    for name, heights in seen.items():
        whole = getattr(torch_rows, name)
        monkeypatch.setattr(
            torch_rows, name,
            lambda batch, *a, whole=whole, heights=heights: (
                heights.append(len(batch.labels)) or whole(batch, *a)
            ),
        )  # fmt: skip
    plan = chunking.plan_chunks
    monkeypatch.setattr(
        "tropd_kernels.loss.loop.plan_chunks",
        lambda *a, **k: replace(plan(*a, **k), rows=4, super_rows=6),
    )
    problem = make_problem(tokens=13)
    with torch.no_grad():
        linear_distillation_loss(
            problem.hidden.float(), problem.weight.float(), problem.labels,
            problem.teacher("hidden", torch.float32), OBJECTIVES["entropy_opd"], backend="torch",
        )  # fmt: skip
    assert seen["entropy"] == seen["forward"] == [4, 2, 4, 2, 1]


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


@all_backends
def test_log_probs_and_entropy_are_differentiable(backend, device):
    problem = make_problem(tokens=4, device=device)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    labels = problem.labels.clone()
    labels[2] = -100
    log_probs, entropy = linear_log_probs(
        hidden, weight, labels, temperature=0.9, return_entropy=True, backend=backend
    )
    incoming = torch.arange(1.0, 5, device=device, dtype=torch.float64)
    found = torch.autograd.grad((incoming * (log_probs - 2 * entropy)).sum(), (hidden, weight))
    log_p = (hidden @ weight.T / 0.9).log_softmax(-1)
    counts = (labels != -100).double()
    lp = log_p.gather(-1, labels.clamp_min(0)[:, None])[:, 0] * counts
    h = -(log_p.exp() * log_p).sum(-1) * counts
    expected = torch.autograd.grad((incoming * (lp - 2 * h)).sum(), (hidden, weight))
    torch.testing.assert_close(log_probs, lp)
    torch.testing.assert_close(entropy, h)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert log_probs[2] == 0


@both
@pytest.mark.parametrize(
    ("rule", "error"),
    [
        (GKD(0.5), 1e-4),
        (GKD(0.1), 5e-4),
        (Divergence("skew_forward", alpha=0.1), 1e-4),
        (Divergence("skew_reverse", alpha=0.1), 3e-3),  # and 0.1 at 0.01: TokenRule says so
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
