"""Sampled gradients of NaN, of huge and of excluded rows, and of chunks that keep no id or all."""

import math

import pytest
import torch
from gradient_samples import (  # noqa: F401
    ALL,
    BACKENDS,
    CHUNK,
    HALF,
    SAMPLES,
    SAMPLING,
    TOLERANCE,
    agrees,
    asked_fixture,
    call,
    chunk_of,
    one_thread,
    peaked_problem,
    sample,
    small_chunks_fixture,
    token_gradients,
)
from problems import OBJECTIVES, make_problem, relative_error

from tropd_kernels import SFT, native
from tropd_kernels.backends import engine_for
from tropd_kernels.loss import sampling
from tropd_kernels.loss.sampling import GradientSampling


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING, SAMPLING | {"seed": 5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_is_never_left_out(dtype, options, backend, device, small_chunks, asked):
    problem, rule = peaked_problem(device=device, full=False), OBJECTIVES["reverse_kl"]
    problem.hidden[11] = math.nan
    _, gradients = call(problem, rule, backend, dtype, **options)
    assert gradients["hidden"][11].isnan().all() and gradients["weight"].isnan().all()
    others = torch.arange(36) != 11
    assert gradients["hidden"][others].isfinite().all()
    chunk = 11 // chunk_of(problem, backend, dtype)
    for i, (_, pi) in enumerate(asked):
        assert (pi == 1).all() if i == chunk else (pi < 1).any()


@pytest.mark.parametrize("backend", ["torch", "native"])
@SAMPLES
def test_a_row_of_the_head_too_large_to_square(options, backend):
    """Its id has probability 0; how far off the others are is said as ever."""
    problem = peaked_problem(full=False)
    problem.hidden[:, 0] = 1.0
    problem.weight[5] = 0.0
    problem.weight[5, 0] = -1e25
    problem.labels[problem.labels == 5] = 6
    out, gradients = call(problem, SFT(), backend, torch.float32, **options)
    assert 0 < out.gradient_error < 1 and 0 < out.gradient_share < 0.5
    assert (gradients["weight"][5] == 0).all() and gradients["hidden"].isfinite().all()
    _, complete = call(problem, SFT(), backend, torch.float32)
    assert 0 < relative_error(gradients["weight"], complete["weight"]) < 0.5


def test_float16_does_not_overflow_when_it_is_scaled():
    """Columns of the head so small that their ids would be kept next to never."""
    g = torch.full((4, 300), 2.0**-10).half()
    g[:, 7] = 3e3
    head = torch.ones(300, 8)
    head[7] = 1e-8
    kept = 0
    for seed in range(600):
        drawn = GradientSampling(0.0, 0.2, torch.tensor(seed))
        blocks = sampling.ColumnSampler(
            drawn, engine_for("torch"), head, False, torch.empty(())
        ).choose(g, g[:, :8], 0)
        for ids, weights in blocks:
            kept += int((ids == 7).sum())
            assert g.index_select(1, ids).mul_(weights).isfinite().all()
    assert 0 < kept < 600


@SAMPLES
def test_nothing_to_learn(options, small_chunks):
    """A student that is its teacher: every gradient is 0, and so is what is left out."""
    problem = peaked_problem(full=False)
    problem.teacher_hidden, problem.teacher_weight = problem.hidden, problem.weight
    out, gradients = call(problem, OBJECTIVES["reverse_kl"], "torch", **options)
    assert float(out.gradient_error) == 0 and float(out.gradient_share) == 1
    assert all((g == 0).all() for g in gradients.values() if g is not None)


@SAMPLES
@pytest.mark.parametrize("tokens", [0, 7])
def test_no_token_counts(tokens, options):
    problem = make_problem(tokens)
    problem.labels = torch.full_like(problem.labels, -100)
    out, gradients = call(problem, OBJECTIVES["tropd"], "torch", **options)
    assert float(out.gradient_error) == 0 and float(out.loss.detach()) == 0
    assert float(out.gradient_share) == 1
    assert (gradients["weight"] == 0).all() and gradients["hidden"].shape == (tokens, 16)


@SAMPLES
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_one_id(backend, options, device):
    """Its gradient is 0, or what rounding leaves of it."""
    problem = make_problem(3, 1, device=device)
    out, gradients = call(problem, OBJECTIVES["gkd"], backend, **options)
    assert float(out.gradient_share) in (0, 1)
    assert all(gradients[name].abs().max() < 1e-15 for name in ("hidden", "weight"))


@pytest.mark.parametrize("backend", ["torch", "native"])
@SAMPLES
def test_excluded_ids(options, backend):
    """Of probability 0 on both sides: none is kept. Sampling asks for more ids than are left."""
    problem, rule = peaked_problem(full=False), OBJECTIVES["gkd"]
    problem.bias = torch.full((301,), -math.inf, dtype=torch.float64)
    problem.bias[::10] = 0.0
    problem.teacher_bias = problem.bias
    problem.labels = problem.labels // 10 * 10
    out, gradients = call(problem, rule, backend, trained=ALL[:2], **options)
    _, complete = call(problem, rule, backend, trained=ALL[:2])
    assert 0 < float(out.gradient_share) <= 31 / 301
    assert (gradients["weight"][problem.bias < 0] == 0).all()
    for name in ("hidden", "weight"):
        error = relative_error(gradients[name], complete[name])
        assert error < 1e-12 if options is SAMPLING else 0.1 < error < 0.6


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 32])
def test_super_chunks_that_keep_nothing(dtype, width, small_chunks, poisoned, asked):
    """d_weight is made by the first product that there is, and is 0 where there is none."""
    assert torch.empty(3).isnan().all(), "the poison works"
    backend = "torch" if dtype == torch.float64 or native.WHY_NOT else "native"
    rule = OBJECTIVES["reverse_kl"]
    problem = make_problem(24, width=width)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(problem, name, getattr(problem, name).to(dtype).double())
    d_logits, chunk = token_gradients(problem, rule), chunk_of(problem, backend, dtype)
    seen = set()
    for seed in range(40):
        options = {"gradient_sampling": 0.02, "seed": seed}
        asked.clear()
        out, gradients = call(problem, rule, backend, dtype, **options)
        truth = sample(problem, d_logits, options, chunk, given=[pi for _, pi in asked])
        kept = [bool(each.any()) for each in truth.kept]
        if any(kept):
            agrees(out, gradients, truth, 1e-10 if dtype == torch.float64 else 0.1, ALL[:2])
        else:
            assert all((gradients[name] == 0).all() for name in ALL[:2])
            assert float(out.gradient_share) == 0
        seen.add((kept[0], any(kept), kept[-1]))
    assert (False, False, False) in seen, "the seeds cover it"
    if len(kept) > 1:
        assert {(False, True, True), (True, True, False)} <= seen, "the seeds cover both"


@pytest.mark.parametrize("order", ["all some", "some all", "all some all", "some all some"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_super_chunks_that_keep_all(dtype, order, small_chunks, poisoned, asked):
    """Those of flat distributions, between others that are sampled."""
    backend = "torch" if dtype == torch.float64 or native.WHY_NOT else "native"
    rule, kinds = OBJECTIVES["sft"], order.split()
    problem = make_problem(2 * CHUNK * len(kinds), 301, spread=4, width=8)
    chunk = chunk_of(problem, backend, dtype)
    for i, kind in enumerate(kinds):
        if kind == "all":
            problem.hidden[i * 2 * CHUNK : (i + 1) * 2 * CHUNK] *= 1e-3
    for name in ("hidden", "weight"):
        setattr(problem, name, getattr(problem, name).to(dtype).double())
    # d_logits of flat distributions are of one size but for the labels'.
    out, gradients = call(problem, rule, backend, dtype, gradient_tolerance=0.05, seed=4)
    truth = sample(
        problem, token_gradients(problem, rule), {"gradient_tolerance": 0.05, "seed": 4}, chunk,
        given=[pi for _, pi in asked],
    )  # fmt: skip
    agrees(out, gradients, truth, 1e-10 if dtype == torch.float64 else HALF, ALL[:2])
    for i, pi in enumerate(truth.probabilities):
        assert (pi == 1).all() == (kinds[i * chunk // (2 * CHUNK)] == "all")
