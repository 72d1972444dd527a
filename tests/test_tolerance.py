"""Rows left out of the gradient products: `gradient_tolerance` and `gradient_sampling`.

The truth is each token's own gradient in float64, from the reference on logits that exist: what a
call leaves out, what it keeps and what it says about both is compared with that.
"""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from problems import OBJECTIVES, make_problem, relative_error, with_everything
from sharding import arguments, bare, everything, mine, run, shard_of
from test_compile import op_arguments
from test_memory import LargestTensor, ResidentPeak
from test_parallel import compare

from tropd_kernels import (
    GKD,
    HiddenTeacher,
    LinearDistillationLoss,
    buffers,
    chunking,
    distillation_loss,
    linear_distillation_loss,
    native,
    ops,
    plan_chunks,
)
from tropd_kernels.draws import sampling_uniforms, uniforms_like
from tropd_kernels.linear_loss import Needs, Problem, Side, forward
from tropd_kernels.rows.layout import LogitTransform, RowOptions
from tropd_kernels.selection import Selection, probabilities, weighed_sum, within_tolerance

BACKENDS = ("torch", "native", "triton")
TOLERANCE = {"gradient_tolerance": 0.2}
SAMPLING = {"gradient_sampling": 0.5, "seed": 4}
HALF = 2**-6  # of bf16 results and operands, in sums of a few dozen terms
CHUNK = 8


@pytest.fixture
def small_chunks(monkeypatch):
    """Super-chunks of 8 tokens, in float64; of 16 with sub-chunks of 8 in half precision."""
    monkeypatch.setattr(chunking, "MULTIPLE", CHUNK)
    for name, rows in (("ROWS", 1), ("CPU_ROWS", 1), ("SUPER_ROWS", 2), ("CPU_SUPER_ROWS", 2)):
        monkeypatch.setattr(chunking, name, rows * CHUNK)


def spread_problem(tokens=36, full=True, device="cpu", **sizes):
    """Gradients whose norms differ by orders of magnitude, as on-policy tokens' do."""
    problem = make_problem(tokens, device=device, **sizes)
    problem = with_everything(problem) if full else problem
    weights = 10 ** (-3 * torch.rand(tokens, dtype=torch.float64)).to(device)
    if full:
        weights[1] = 0.0
    problem.options["token_weight"] = weights
    return problem


def call(problem, rule, backend, dtype=torch.float64, trained=("hidden", "weight", "bias"), **more):
    """(output, gradients by name)"""
    leaves = {
        name: tensor.to(dtype).clone().requires_grad_(name in trained)
        for name in ("hidden", "weight", "bias")
        if (tensor := getattr(problem, name)) is not None
    }
    teacher, options = arguments(problem, rule, "hidden", dtype)
    out = linear_distillation_loss(
        leaves["hidden"], leaves["weight"], problem.labels, teacher, rule,
        bias=leaves.get("bias"), backend=backend, **(options | more),
    )  # fmt: skip
    out.loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def token_gradients(problem, rule, **more):
    """Of every token, in float64: d(loss)/d(logits before bias and transform) (N, V)."""
    shift = 0 if problem.bias is None else problem.bias
    raw = (problem.hidden @ problem.weight.T + shift).requires_grad_()
    head = problem.student_head
    logits = raw * head.get("logit_scale", 1.0)
    if "softcap" in head:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    teacher, options = arguments(problem, rule, "logits", torch.float64)
    options = {k: v for k, v in (options | more).items() if k not in head}
    v = min(len(problem.weight), len(problem.teacher_weight))
    out = distillation_loss(
        logits[:, :v], problem.labels, teacher, rule, backend="reference", **options
    )
    out.loss.backward()
    return raw.grad


def expected(problem, d_logits, weights):
    """Gradients by name of the tokens' shares, so weighed."""
    kept = d_logits * weights[:, None]
    found = {"hidden": kept @ problem.weight, "weight": kept.T @ problem.hidden}
    return found | {"bias": kept.sum(0) if problem.bias is not None else None}


def counted(problem):
    """Indices of the tokens that count, in super-chunks."""
    weight = problem.options.get("token_weight", torch.ones(len(problem.labels)))
    return ((problem.labels >= 0) & (weight != 0)).nonzero()[:, 0].split(CHUNK)


# --- a tolerance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_changes_no_bit(backend, device):
    problem = spread_problem(device=device)
    rule = OBJECTIVES["tropd"]
    out, gradients = call(problem, rule, backend, torch.float32)
    off, same = call(
        problem, rule, backend, torch.float32, gradient_tolerance=0.0, gradient_sampling=None
    )
    assert torch.equal(out.loss, off.loss)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert off.gradient_error is None
    assert off.stats.gradient_norm is None and off.stats.gradient_weight is None


def guarantees():
    # reopold_2 divides its loss by the tokens that it keeps.
    for name in ("tropd", "entropy_opd", "mask_outlier", "reopold_2", "gkd"):
        for tolerance in (1e-3, 0.03, 0.3, 0.95):
            yield from (("torch", name, tolerance), ("native", name, tolerance))
    yield from (("triton", "tropd", 0.3), ("triton", "gkd", 0.03))


@pytest.mark.parametrize(("backend", "name", "tolerance"), list(guarantees()))
def test_what_is_left_out_stays_below_the_tolerance(backend, name, tolerance, device, small_chunks):
    problem, rule = spread_problem(device=device), OBJECTIVES[name]
    out, gradients = call(problem, rule, backend, gradient_tolerance=tolerance)
    exact, _ = call(problem, rule, backend)
    d_logits = token_gradients(problem, rule)
    norms = d_logits.norm(dim=1) * problem.hidden.norm(dim=1)
    torch.testing.assert_close(out.stats.gradient_norm, norms, rtol=1e-10, atol=1e-14)
    assert torch.equal(out.loss, exact.loss), "the loss itself is of all tokens"

    left_out = out.stats.gradient_weight == 0
    assert (out.stats.gradient_weight[~left_out] == 1).all()
    for tokens in counted(problem):
        square, gone = norms[tokens] ** 2, left_out[tokens]
        lost = square[gone].sum()
        assert lost <= tolerance**2 * square.sum()
        # No other set of rows is larger: with one more, even the smallest, it is too much.
        if square.sum() > 0:
            assert lost + square[~gone].min() > tolerance**2 * square.sum() * (1 - 1e-12)
            assert not gone.any() or square[gone].max() <= square[~gone].min()
    reached = math.sqrt((norms[left_out] ** 2).sum() / (norms**2).sum())
    assert reached <= tolerance
    assert abs(float(out.gradient_error) - reached) < 1e-10
    if tolerance >= 0.03:
        assert left_out[torch.cat(counted(problem))].any(), "the test leaves something out"

    for what, truth in expected(problem, d_logits, (~left_out).double()).items():
        assert relative_error(gradients[what], truth) < 1e-11, what
    assert (gradients["hidden"][left_out] == 0).all()
    whole = expected(problem, d_logits, torch.ones_like(norms))["weight"]
    error = (gradients["weight"] - whole).norm()
    assert error <= out.stats.gradient_norm[left_out].sum() + 1e-13 * whole.norm()


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, HALF), (torch.float16, HALF)]
)
@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
def test_every_dtype(options, dtype, bound, backend, device, small_chunks):
    """float16 with a loss so small that its gradient would be lost in float16."""
    problem, rule = spread_problem(device=device), OBJECTIVES["gkd"]
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        setattr(problem, name, getattr(problem, name).to(dtype).double())
    options = options | {"normalizer": 3e6 if dtype == torch.float16 else 20.0}
    out, gradients = call(problem, rule, backend, dtype, **options)
    d_logits = token_gradients(problem, rule, normalizer=options["normalizer"])
    norms = d_logits.norm(dim=1) * problem.hidden.norm(dim=1)
    assert relative_error(out.stats.gradient_norm, norms) < bound
    weights = out.stats.gradient_weight.double()
    assert 0 < (weights == 0).sum() < len(weights)
    truth = expected(problem, d_logits, weights)
    if dtype == torch.float16:
        # .grad is float16, which holds no gradient this small: one scale for all, as in training.
        leaves = [getattr(problem, n).to(dtype).requires_grad_() for n in truth]
        teacher, more = arguments(problem, rule, "hidden", dtype)
        scaled = linear_distillation_loss(
            leaves[0], leaves[1], problem.labels, teacher, rule, bias=leaves[2], backend=backend,
            **(more | options),
        )  # fmt: skip
        gradients = dict(zip(truth, torch.autograd.grad(scaled.loss * 2**16, leaves)))
        truth = {name: value * 2**16 for name, value in truth.items()}
    for what, value in truth.items():
        assert relative_error(gradients[what], value) < bound, what


@pytest.mark.skipif(not native.BF16_PRODUCTS, reason="this CPU's products round no d_weight")
@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
def test_one_product_that_rounds_d_weight(options):
    problem, rule = spread_problem(tokens=30, width=16), OBJECTIVES["gkd"]
    plan = plan_chunks(
        30, 37, 16, dtype=torch.bfloat16, device="cpu", backend="native", selects_rows=True
    )
    assert plan.rounds_d_weight
    out, gradients = call(problem, rule, "native", torch.bfloat16, **options)
    other, accumulated = call(problem, rule, "torch", torch.bfloat16, **options)
    assert torch.equal(out.stats.gradient_weight == 0, other.stats.gradient_weight == 0)
    for what, truth in accumulated.items():
        assert relative_error(gradients[what], truth) < HALF, what


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
def test_a_frozen_side(options, trained, small_chunks):
    """Without the head's gradient a row's norm is that of d_logits alone."""
    problem, rule = spread_problem(), OBJECTIVES["gkd"]
    out, gradients = call(problem, rule, "torch", trained=trained, **options)
    d_logits = token_gradients(problem, rule)
    norms = d_logits.norm(dim=1)
    if "weight" in trained:
        norms = norms * problem.hidden.norm(dim=1)
    torch.testing.assert_close(out.stats.gradient_norm, norms, rtol=1e-10, atol=1e-14)
    for what, truth in expected(problem, d_logits, out.stats.gradient_weight).items():
        if what in trained:
            assert relative_error(gradients[what], truth) < 1e-11, what
        else:
            assert gradients[what] is None


def test_no_gradient_no_selection():
    problem = spread_problem()
    teacher, options = arguments(problem, GKD(), "hidden", torch.float64)
    out = linear_distillation_loss(
        problem.hidden, problem.weight, problem.labels, teacher, GKD(), bias=problem.bias,
        backend="torch", **options, **TOLERANCE,
    )  # fmt: skip
    assert out.gradient_error is None and out.stats.gradient_norm is None


def test_tolerance_of_numbers_that_are_none():
    norms = torch.tensor([1e-6, math.nan, 1.0, math.inf, 1e-7, 0.0])
    assert within_tolerance(norms, 1e-3).tolist() == [False, True, True, True, False, False]
    assert within_tolerance(torch.zeros(3), 0.5).all(), "float32 squares may have been lost"
    assert within_tolerance(torch.full((4,), math.nan), 0.5).all()
    assert within_tolerance(torch.empty(0), 0.5).shape == (0,)
    huge = torch.tensor([1e300, 1e295], dtype=torch.float64)  # squares overflow
    assert within_tolerance(huge, 0.5).all()


# --- a sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.999, 1.0])
def test_probabilities_are_proportional_and_sum_up(fraction):
    norms = torch.rand(200, dtype=torch.float64) ** 8 + 1e-10
    pi = probabilities(norms, fraction)
    assert abs(float(pi.sum()) - fraction * 200) < 1e-9
    assert ((pi > 0) & (pi <= 1)).all()
    sampled = pi < 1
    if sampled.any():
        ratio = (pi / norms)[sampled]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
        assert (norms[~sampled] * ratio[0] >= 1 - 1e-12).all()
    assert sampled.any() == (fraction < 1)


def test_probabilities_of_few_and_of_no_numbers():
    norms = torch.tensor([0.0, math.nan, 2.0, 0.0, math.inf, 1.0])
    # 0.5 of the four finite rows: the two that are not 0.
    assert probabilities(norms, 0.5).tolist() == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(
        probabilities(norms, 0.25).float(), torch.tensor([0.0, 1.0, 2 / 3, 0.0, 1.0, 1 / 3])
    )
    assert (probabilities(torch.zeros(3), 0.5) == 1).all()
    assert (probabilities(torch.full((3,), 7.0), 1 / 3) - 1 / 3).abs().max() < 1e-12
    one = probabilities(torch.tensor([5.0, 1e-30]), 0.5)  # 1 place: all but all to the first
    assert one[0] == 1 and one[1] <= 1e-15


def test_sampled_gradients_are_unbiased_and_vary_as_stated(small_chunks):
    problem, rule = spread_problem(tokens=20, vocab_size=11, width=4), OBJECTIVES["gkd"]
    d_logits = token_gradients(problem, rule)
    exact = expected(problem, d_logits, torch.ones(20, dtype=torch.float64))
    norms = d_logits.norm(dim=1) * problem.hidden.norm(dim=1)
    runs = 400
    sums = {name: torch.zeros_like(value) for name, value in exact.items()}
    squares, kept = [], []
    for seed in range(runs):
        out, gradients = call(problem, rule, "torch", gradient_sampling=0.5, seed=seed)
        for name, total in sums.items():
            total += gradients[name] / runs
        squares.append((gradients["weight"] - exact["weight"]).square().sum())
        kept.append((out.stats.gradient_weight != 0).sum())
        for name, truth in expected(problem, d_logits, out.stats.gradient_weight).items():
            assert relative_error(gradients[name], truth) < 1e-11, name
    stated = (out.gradient_error * norms.norm()) ** 2
    assert stated > 0.01 * norms.square().sum(), "the sample is a real one"
    squares = torch.stack(squares)
    spread = squares.std() / runs**0.5
    assert (squares.mean() - stated).abs() < 4 * spread
    # The mean's squared error is chi-square-like around stated / runs.
    assert (sums["weight"] - exact["weight"]).square().sum() < 4 * stated / runs
    for name in ("hidden", "bias"):
        assert relative_error(sums[name], exact[name]) < 0.2, name
    kept = torch.stack(kept).double()
    count = sum(len(tokens) for tokens in counted(problem))
    assert (kept.mean() - count / 2).abs() < 4 * kept.std() / runs**0.5


def test_a_full_sample_is_exact():
    problem, rule = spread_problem(), OBJECTIVES["tropd"]
    out, gradients = call(problem, rule, "torch", torch.float32, gradient_sampling=1.0, seed=0)
    _, exact = call(problem, rule, "torch", torch.float32)
    weight = out.stats.gradient_weight
    assert torch.equal(weight, (out.stats.gradient_norm > 0).float())
    assert all(relative_error(gradients[name], exact[name]) < 1e-6 for name in exact)
    assert float(out.gradient_error) == 0


@pytest.mark.parametrize("chunk", [8, 16, 64])
def test_draws_go_with_seed_and_token_alone(chunk, monkeypatch):
    """In every super-chunk the same draws are compared with its probabilities."""
    for name in ("MULTIPLE", "ROWS", "SUPER_ROWS"):
        monkeypatch.setattr(chunking, name, chunk)
    problem, rule = spread_problem(tokens=40, full=False), OBJECTIVES["gkd"]
    problem.labels[::3] = -100
    out, _ = call(problem, rule, "torch", gradient_sampling=0.4, seed=9)
    draws = sampling_uniforms(problem.labels, 9)
    tokens = (problem.labels >= 0).nonzero()[:, 0]
    for some in tokens.split(chunk):
        pi = probabilities(out.stats.gradient_norm[some], 0.4)
        weight = torch.where(draws[some] < pi, 1 / pi, 0.0)
        torch.testing.assert_close(out.stats.gradient_weight[some], weight)
    assert (out.stats.gradient_weight[problem.labels < 0] == 0).all()


def test_budget_cuts_chunks_and_leaves_the_draws():
    problem, rule = spread_problem(tokens=300, full=False, width=4), OBJECTIVES["gkd"]
    budget = plan_chunks(
        128, 37, 4, 24, dtype=torch.float64, device="cpu", backend="torch", selects_rows=True,
        needs_hidden_grad=True,
    ).workspace_bytes + 20_000 * 8  # fmt: skip
    draws = sampling_uniforms(problem.labels, 3)
    for more in ({}, {"max_workspace_bytes": budget}):
        out, _ = call(problem, rule, "torch", gradient_sampling=0.4, seed=3, **more)
        kept = out.stats.gradient_weight > 0
        assert (draws[kept] < 1 / out.stats.gradient_weight[kept]).all()
        certain = out.stats.gradient_weight == 1
        assert certain.any() and (draws[~kept] > 0).all()


def test_draws_are_not_the_gates():
    labels = torch.zeros(100, 100, dtype=torch.int64)
    ours, gates = sampling_uniforms(labels, 7), uniforms_like(labels, 7).double()
    assert ours.dtype == torch.float64 and ((ours >= 0) & (ours < 1)).all()
    both = torch.stack([ours.flatten(), gates.flatten()])
    assert torch.corrcoef(both)[0, 1].abs() < 0.05
    for values in both:
        assert abs(float(values.mean()) - 0.5) < 0.02
        assert abs(float(values.var()) - 1 / 12) < 0.005
    assert torch.equal(ours, sampling_uniforms(labels, torch.tensor(7)))
    assert not torch.equal(ours, sampling_uniforms(labels, 8))
    fine = ours * 2**24
    assert (fine != fine.floor()).any(), "more bits than the gate's float32"


# --- corners -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING, SAMPLING | {"seed": 5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_is_never_left_out(dtype, options, backend, device, small_chunks):
    problem, rule = spread_problem(device=device, full=False), OBJECTIVES["gkd"]
    problem.hidden[11] = math.nan
    out, gradients = call(problem, rule, backend, dtype, **options)
    assert out.stats.gradient_weight[11] == 1
    assert gradients["hidden"][11].isnan().all() and gradients["weight"].isnan().any()
    assert not out.gradient_error.isnan()
    others = torch.arange(36) != 11
    assert gradients["hidden"][others].isfinite().all()
    assert 0 < (out.stats.gradient_weight[others] == 0).sum() < 35


@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
def test_nothing_to_learn(options, small_chunks):
    """A student that is its teacher: every gradient is 0, and so is what is left out."""
    problem = spread_problem(full=False)
    problem.teacher_hidden, problem.teacher_weight = problem.hidden, problem.weight
    out, gradients = call(problem, OBJECTIVES["reverse_kl"], "torch", **options)
    assert float(out.gradient_error) == 0
    assert all((g == 0).all() for g in gradients.values() if g is not None)


@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
@pytest.mark.parametrize("tokens", [0, 7])
def test_no_token_counts(tokens, options):
    problem = make_problem(tokens)
    problem.labels = torch.full_like(problem.labels, -100)
    out, gradients = call(problem, OBJECTIVES["tropd"], "torch", **options)
    assert out.stats.gradient_norm.shape == out.stats.gradient_weight.shape == (tokens,)
    assert float(out.gradient_error) == 0 and float(out.loss.detach()) == 0
    assert (gradients["weight"] == 0).all() and gradients["hidden"].shape == (tokens, 16)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_first_chunks_that_keep_nothing(dtype, small_chunks, poisoned):
    """d_weight is made by the first product that there is, and is 0 where there is none."""
    assert torch.empty(3).isnan().all(), "the poison works"
    rule = OBJECTIVES["gkd"]
    problem = make_problem(40)
    chunk = 16 if dtype == torch.bfloat16 else CHUNK
    d_logits = token_gradients(problem, rule)
    seen = set()
    for seed in range(60):
        out, gradients = call(problem, rule, "torch", dtype, gradient_sampling=0.05, seed=seed)
        weights = out.stats.gradient_weight.double()
        truth = expected(problem, d_logits, weights)
        for what in ("weight", "hidden"):
            if weights.any():
                assert relative_error(gradients[what], truth[what]) < 0.1, what
            else:
                assert (gradients[what] == 0).all()
        seen.add((bool(weights[:chunk].any()), bool(weights.any())))
    assert {(False, True), (False, False)} <= seen, "the seeds cover both"


def test_weighed_sum_in_blocks(monkeypatch):
    monkeypatch.setattr("tropd_kernels.selection.BLOCK_BYTES", {"cpu": 4 * 50 * 3})
    d_logits = torch.randn(10, 50).bfloat16()
    weights = torch.rand(10)
    truth = weights.double() @ d_logits.double()
    assert relative_error(weighed_sum(d_logits, weights), truth) < 1e-6


@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_of_a_few_rows(dtype, options, monkeypatch):
    """Rows move to the front in blocks that are smaller than a super-chunk."""
    backend = "torch" if dtype == torch.float64 or native.WHY_NOT else "native"
    problem, rule = spread_problem(), OBJECTIVES["gkd"]
    whole = call(problem, rule, backend, dtype, **options)[1]
    monkeypatch.setattr("tropd_kernels.selection.BLOCK_BYTES", {"cpu": 37 * 8 * 3})
    blocks = call(problem, rule, backend, dtype, **options)[1]
    for name, value in whole.items():
        assert relative_error(blocks[name], value) < 1e-6, name


# --- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [Selection(0.3), Selection(0.0, 0.5)])
def test_no_tensor_of_tokens_times_vocabulary(selection, monkeypatch):
    for name in ("MULTIPLE", "ROWS", "SUPER_ROWS"):
        monkeypatch.setattr(chunking, name, 16)
    monkeypatch.setattr("tropd_kernels.rows.torch_rows.BLOCK_ELEMENTS", {"cpu": 4 * 3001})
    tokens, v = 256, 3001
    problem = make_problem(tokens, v, width=4, teacher_width=4)
    selection = Selection(selection.tolerance, selection.sampling, torch.rand(tokens).double())
    flat = Problem(
        Side(problem.hidden.float(), problem.weight.float()),
        Side(problem.teacher_hidden.float(), problem.teacher_weight.float()),
        problem.labels, {}, RowOptions(GKD(), LogitTransform(), LogitTransform()), "torch", -100,
        None, selection=selection,
    )  # fmt: skip
    with LargestTensor() as seen:
        result = forward(flat, Needs(student=True, weight=True), torch.ones(()))
    assert 0 < (result.shares[2] == 0).sum() < tokens
    assert seen.elements <= tokens * v / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
def test_workspace_is_what_the_plan_says(options, dtype):
    backend = "torch" if native.WHY_NOT else "native"
    tokens, v, h = 1024, 50_000, 64
    hidden = torch.randn(tokens, h).to(dtype).requires_grad_()
    weight = torch.randn(v, h).to(dtype).requires_grad_()
    teacher = HiddenTeacher(torch.randn(tokens, h).to(dtype), torch.randn(v, h).to(dtype))
    labels = torch.randint(v, (tokens,))

    def step():
        out = linear_distillation_loss(
            hidden, weight, labels, teacher, GKD(), backend=backend, **options
        )
        out.loss.backward()
        hidden.grad = weight.grad = None
        return out

    assert 0 < (step().stats.gradient_weight == 0).sum() < tokens
    returned = sum(t.numel() * t.element_size() for t in (hidden, weight))
    buffers.release()
    with ResidentPeak() as peak:
        step()
    plan = plan_chunks(
        tokens, v, h, h, dtype=dtype, device="cpu", backend=backend, selects_rows=True
    )
    used = peak.delta - returned
    assert 0.5 * plan.workspace_bytes <= used <= 1.1 * plan.workspace_bytes, f"{used}\n{plan}"
    without = plan_chunks(tokens, v, h, h, dtype=dtype, device="cpu", backend=backend)
    more = plan.workspace_bytes - without.workspace_bytes
    assert 2 * 2**22 <= more <= 2**24 and plan.rows == without.rows


# --- torch.compile, modules, errors --------------------------------------------------------------


@pytest.mark.parametrize("more", [(0.3,), (0.0, 0.5)])
@pytest.mark.parametrize("needs", [[True, True, False, False], [False] * 4])
def test_opcheck(needs, more, device):
    draws = torch.rand(5, dtype=torch.float64, device=device)
    arguments = (*op_arguments("torch", device, needs), *more)
    if len(more) == 2:
        arguments += (draws,)
    torch.library.opcheck(ops.distill, arguments)


@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING])
def test_compile_without_a_graph_break(options):
    problem = spread_problem(full=False)
    module = LinearDistillationLoss(GKD(), backend="torch", **options)
    weight, labels = problem.weight.float(), problem.labels
    teacher = HiddenTeacher(problem.teacher_hidden.float(), problem.teacher_weight.float())

    def step(hidden):
        out = module(hidden, weight, labels, teacher)
        return out.loss, out.gradient_error, out.stats.gradient_weight

    results = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden = problem.hidden.float().requires_grad_()
        found = function(hidden)
        found[0].backward()
        results.append((*(t.detach() for t in found), hidden.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (results[0][2] == 0).any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(gradient_tolerance=-0.1), ValueError, "gradient_tolerance must be .*got -0.1"),
        (dict(gradient_tolerance=1.0), ValueError, "gradient_tolerance must be .*got 1.0"),
        (dict(gradient_tolerance=math.nan), ValueError, "gradient_tolerance must be .*got nan"),
        (dict(gradient_tolerance=None), ValueError, "gradient_tolerance must be .*got None"),
        (dict(gradient_tolerance=True), ValueError, "gradient_tolerance must be .*got True"),
        (dict(gradient_sampling=0.0, seed=1), ValueError, "gradient_sampling must be .*got 0.0"),
        (dict(gradient_sampling=1.5, seed=1), ValueError, "gradient_sampling must be .*got 1.5"),
        (dict(gradient_sampling="all"), ValueError, "gradient_sampling must be .*got 'all'"),
        (dict(gradient_sampling=0.5), ValueError, "pass seed="),
        (TOLERANCE | SAMPLING, ValueError, "pass one of them"),
        (TOLERANCE | dict(reduction="none"), NotImplementedError, "gradient_tolerance .*'none'"),
        (SAMPLING | dict(reduction="none"), NotImplementedError, "gradient_sampling .*'none'"),
        (TOLERANCE | dict(backend="reference"), NotImplementedError, "'reference' takes no"),
    ],
)
def test_bad_input(options, error, message):
    problem = make_problem()
    teacher = problem.teacher("hidden", torch.float32)
    with pytest.raises(error, match=message):
        linear_distillation_loss(
            problem.hidden.float(), problem.weight.float(), problem.labels, teacher, GKD(),
            **({"backend": "torch"} | options),
        )  # fmt: skip


# --- a head sharded over the vocabulary ----------------------------------------------------------


def sharded(ranks):
    for backend in ("torch",) if native.WHY_NOT else ("torch", "native"):
        for name in ("tropd", "gkd", "entropy_opd"):
            case = partial(compare, everything(), name, "hidden", backend)
            for options in (TOLERANCE, SAMPLING):
                yield f"{backend} {name} {options}", partial(case, **options)
            yield (
                f"{backend} {name} float64",
                partial(case, bound=1e-13, dtype=torch.float64, **TOLERANCE),
            )
        yield f"{backend} bf16", partial(case, bound=2**-7, dtype=torch.bfloat16, **TOLERANCE)
        chunks = partial(
            compare, bare(700), "gkd", "hidden", backend,
            max_workspace_bytes=10_000_000, **SAMPLING,
        )  # fmt: skip
        yield f"{backend} chunks", chunks
        yield f"{backend} frozen head", partial(case, trained=("hidden",), **TOLERANCE)
        yield f"{backend} frozen body", partial(case, trained=("weight",), **SAMPLING)
    yield "replicas that differ in a last bit", replicas_differ
    yield "other options", ranks_disagree


def replicas_differ():
    """Which rows are kept is decided once: else ranks would add up different ones."""
    problem = spread_problem(tokens=64, full=False)
    # Pairs of tokens of the same norm, at which a last bit decides.
    for of in (problem.hidden, problem.teacher_hidden, problem.options["token_weight"]):
        of[1::2] = of[::2]
    problem.labels[1::2] = problem.labels[::2]
    noise = 1 + (2e-7 * torch.randn(64, 1) if dist.get_rank() else torch.zeros(64, 1))
    hidden = (problem.hidden.float() * noise).requires_grad_()
    weight = mine(problem.weight.float()).requires_grad_()
    teacher, options = arguments(problem, GKD(), "hidden", torch.float32)
    for selects in [{"gradient_tolerance": t} for t in (0.05, 0.1, 0.2, 0.4)] + [SAMPLING]:
        out = linear_distillation_loss(
            hidden, weight, problem.labels, shard_of(teacher), GKD(), backend="torch",
            process_group=dist.group.WORLD, **(options | selects),
        )  # fmt: skip
        chosen = [torch.empty(64) for _ in range(dist.get_world_size())]
        dist.all_gather(chosen, out.stats.gradient_weight)
        assert all(torch.equal(each, chosen[0]) for each in chosen)
        assert 0 < (chosen[0] == 0).sum() < 64


def ranks_disagree():
    problem = bare()
    teacher, options = arguments(problem, GKD(), "hidden", torch.float32)
    rank = dist.get_rank()
    for more, name in (
        ({"gradient_tolerance": 0.1 * (1 + rank)}, "gradient_tolerance"),
        ({"gradient_sampling": 0.5 + 0.1 * rank, "seed": 1}, "gradient_sampling"),
        ({"gradient_sampling": 0.5, "seed": rank}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"disagree on {name}"):
            linear_distillation_loss(
                problem.hidden.float(), mine(problem.weight.float()), problem.labels,
                shard_of(teacher), GKD(), process_group=dist.group.WORLD, **(options | more),
            )  # fmt: skip


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_ranks_keep_the_same_rows(tmp_path):
    run(2, tmp_path, sharded)
