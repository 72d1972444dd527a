"""Gradients of `gradient_tolerance` and `gradient_sampling` are those of the ids that are kept."""

import pytest
import torch
from gradient_samples import (  # noqa: F401
    ALL,
    BACKENDS,
    CHUNK,
    HALF,
    SAMPLES,
    SAMPLING,
    TIGHT,
    TOLERANCE,
    agrees,
    asked_fixture,
    call,
    chunk_of,
    counted,
    one_thread,
    peaked_problem,
    sample,
    small_chunks_fixture,
    squared_sizes,
    token_gradients,
)
from problems import OBJECTIVES, relative_error
from sharding import arguments

from tropd_kernels import GKD, linear_distillation_loss, native, plan_chunks
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss import sampling


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_changes_no_bit(backend, device):
    problem = peaked_problem(tokens=12, vocab_size=37, device=device)
    rule = OBJECTIVES["tropd"]
    out, gradients = call(problem, rule, backend, torch.float32)
    off, same = call(
        problem, rule, backend, torch.float32, gradient_tolerance=0.0, gradient_sampling=None,
        seed=4,
    )  # fmt: skip
    assert torch.equal(out.loss, off.loss)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    for each in (out, off):
        assert each.gradient_error is None and each.gradient_share is None


def samples():
    # reopold_2 divides its loss by the tokens that it keeps; the divergences need the teacher.
    for name in ("tropd", "entropy_opd", "mask_outlier", "reopold_2", "gkd"):
        for options in ({"gradient_tolerance": 0.3}, {"gradient_sampling": 0.1}):
            yield from (("torch", name, options), ("native", name, options))
    # A uniform term is on every id, however little of the gradient it is.
    yield from (
        ("torch", "gkd_cross_entropy", SAMPLING),
        ("native", "gkd_cross_entropy", TOLERANCE),
    )
    yield ("torch", "tropd", {"gradient_tolerance": 0.05})
    yield ("torch", "tropd", {"gradient_tolerance": 0.95})
    yield ("native", "tropd", {"gradient_sampling": 0.01})
    yield from (("triton", "tropd", SAMPLING), ("triton", "gkd", {"gradient_tolerance": 0.5}))


@pytest.mark.parametrize(("backend", "name", "options"), list(samples()), ids=str)
def test_gradients_are_those_of_the_ids_that_are_kept(backend, name, options, device, small_chunks):
    """By the documented formula; the bias's gradient, the loss and the statistics are of all."""
    tokens, v = (12, 150) if backend == "triton" else (36, 301)  # the interpreter is slow
    problem, rule = peaked_problem(tokens, v, device=device), OBJECTIVES[name]
    options = {"seed": 4} | options
    out, gradients = call(problem, rule, backend, **options)
    whole, complete = call(problem, rule, backend)
    chunk, left_out = chunk_of(problem, backend), whole.stats.trust.isnan()
    d_logits = token_gradients(problem, rule)
    truth = sample(problem, d_logits, options, chunk, left_out=left_out)
    agrees(out, gradients, truth, 1e-10)
    assert 0 < truth.error and truth.share < 0.6, "the sample is a real one"

    assert torch.equal(out.loss, whole.loss)
    assert torch.equal(gradients["bias"], complete["bias"])
    for statistic, value in vars(whole.stats).items():
        assert value is None or torch.equal(
            value.nan_to_num(), getattr(out.stats, statistic).nan_to_num()
        )
    never = ~torch.stack(truth.kept).any(0)
    assert (gradients["weight"][never] == 0).all()
    assert never.any() or options.get("gradient_sampling") != 0.01
    of_none = torch.ones(len(problem.labels), dtype=torch.bool, device=device)
    of_none[counted(problem)] = False
    assert of_none.any() and (gradients["hidden"][of_none] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "native"])
@SAMPLES
def test_ids_that_the_teacher_lacks(options, backend, small_chunks):
    """They take no part, and are no share of the ids."""
    problem, rule = peaked_problem(full=False, teacher_vocab_size=250), OBJECTIVES["reverse_kl"]
    problem.labels %= 250
    out, gradients = call(problem, rule, backend, **options)
    truth = sample(problem, token_gradients(problem, rule), options)
    agrees(out, gradients, truth, 1e-10)
    assert truth.error and (gradients["weight"][250:] == 0).all()


def dtypes():
    """(dtype, bound, backend, width); a bf16 head of width 32 is made by one product alone, where
    the products round."""
    for backend in ("torch", "native"):
        yield from ((torch.float32, 1e-5, backend, 16), (torch.float16, HALF, backend, 16))
        yield from ((torch.bfloat16, HALF, backend, 8), (torch.bfloat16, HALF, backend, 32))


@pytest.mark.parametrize(("dtype", "bound", "backend", "width"), list(dtypes()), ids=str)
@SAMPLES
def test_every_dtype(options, dtype, bound, backend, width, device, small_chunks, asked):
    """float16 with a loss so small that its gradient would be lost in float16."""
    problem, rule = peaked_problem(device=device, width=width), OBJECTIVES["tropd"]
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        setattr(problem, name, getattr(problem, name).to(dtype).double())
    small = dtype == torch.float16
    normalizer, factor = (3e6, 2.0**16) if small else (20.0, 1.0)
    out, gradients = call(
        problem, rule, backend, dtype, factor=factor, normalizer=normalizer, **options
    )
    d_logits = token_gradients(problem, rule, normalizer=normalizer)
    chunk = chunk_of(problem, backend, dtype)
    truth = sample(problem, d_logits, options, chunk, given=[pi for _, pi in asked])
    truth.gradients = {name: value * factor for name, value in truth.gradients.items()}
    agrees(out, gradients, truth, bound)
    assert truth.error and gradients["weight"].dtype == dtype
    for tokens, (sizes, _) in zip(counted(problem).split(chunk), asked, strict=True):
        expected = squared_sizes(d_logits[tokens], problem.hidden[tokens], problem.weight, ALL)
        assert relative_error(sizes, expected.sqrt()) < bound


@pytest.mark.skipif(not native.BF16_PRODUCTS, reason="this CPU's products round no d_weight")
@pytest.mark.parametrize("width", [8, 32])
def test_d_weight_that_products_round(width, small_chunks):
    """In the test above: one super-chunk where the head's width is 32, two where it is 8; more
    where d_logits overwrite the logits."""
    problem = peaked_problem(width=width)
    plan = plan_chunks(
        len(counted(problem)), 301, width, dtype=torch.bfloat16, device="cpu", backend="native",
        samples_gradient=True,
    )  # fmt: skip
    expected = CHUNK if plan.in_place else 32 if width == 32 else 16
    assert plan.rounds_d_weight and plan.super_rows == expected


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "bias")], ids=str)
@SAMPLES
def test_a_frozen_side(options, trained, small_chunks):
    """The ids are chosen for the gradients that are asked for."""
    problem, rule = peaked_problem(), OBJECTIVES["gkd"]
    out, gradients = call(problem, rule, "torch", trained=trained, **options)
    truth = sample(problem, token_gradients(problem, rule), options, trained=trained)
    agrees(out, gradients, truth, 1e-10, trained)
    assert truth.error
    assert all((gradients[name] is None) == (name not in trained) for name in ALL)


@SAMPLES
@pytest.mark.parametrize("trained", [(), ("bias",)])
def test_no_product_no_sample(options, trained):
    problem = peaked_problem()
    leaves = [getattr(problem, name).requires_grad_(name in trained) for name in ALL]
    teacher, more = arguments(problem, GKD(), "hidden", torch.float64)
    out = linear_distillation_loss(
        *leaves[:2], problem.labels, teacher, GKD(), bias=leaves[2], backend="torch",
        **more, **options,
    )  # fmt: skip
    assert out.gradient_error is None and out.gradient_share is None


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("options", [TIGHT, SAMPLING | {"gradient_sampling": 1.0}])
def test_where_most_ids_would_be_kept_all_are(options, backend, small_chunks):
    problem, rule = peaked_problem(), OBJECTIVES["gkd"]
    out, gradients = call(problem, rule, backend, torch.float32, **options)
    _, complete = call(problem, rule, backend, torch.float32)
    assert all(torch.equal(gradients[name], complete[name]) for name in ALL)
    assert float(out.gradient_error) == 0 and float(out.gradient_share) == 1


@pytest.mark.parametrize("options", [TOLERANCE, SAMPLING, SAMPLING | {"seed": -7}])
def test_the_same_seed_keeps_the_same_ids(options, small_chunks):
    problem, rule = peaked_problem(), OBJECTIVES["tropd"]
    seed = options["seed"]
    out, first = call(problem, rule, "torch", torch.float32, **options)
    for same in (seed, seed % 2**64, torch.tensor(seed)):
        again, second = call(problem, rule, "torch", torch.float32, **options | {"seed": same})
        assert all(torch.equal(first[name], second[name]) for name in ALL)
        assert torch.equal(out.gradient_error, again.gradient_error)
    _, other = call(problem, rule, "torch", torch.float32, **options | {"seed": seed + 1})
    assert torch.equal(other["bias"], first["bias"])
    for name in ("hidden", "weight"):
        assert relative_error(other[name], first[name]) > 0.05


def test_super_chunks_draw_for_themselves(small_chunks):
    """Of the same tokens over and over each super-chunk keeps other ids."""
    problem, rule = peaked_problem(tokens=CHUNK, full=False), OBJECTIVES["reverse_kl"]
    problem.hidden, problem.teacher_hidden = (
        t.repeat(4, 1) for t in (problem.hidden, problem.teacher_hidden)
    )
    problem.labels, problem.options = problem.labels.repeat(4), {}
    _, gradients = call(problem, rule, "torch", **SAMPLING)
    first, *others = gradients["hidden"].split(CHUNK)
    assert all(relative_error(other, first) > 0.01 for other in others)


def test_a_budget_cuts_chunks(small_chunks):
    problem, rule = peaked_problem(tokens=64, full=False, width=4), OBJECTIVES["reverse_kl"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ROWS", "SUPER_ROWS"):
            patch.setattr(chunking, name, 32)
        budget = plan_chunks(
            64, 301, 4, 24, dtype=torch.float64, device="cpu", backend="torch",
            samples_gradient=True,
        ).workspace_bytes - 1  # fmt: skip
        chunk = chunk_of(problem, max_workspace_bytes=budget)
        assert chunk == 24
        out, gradients = call(problem, rule, "torch", max_workspace_bytes=budget, **SAMPLING)
    agrees(out, gradients, sample(problem, token_gradients(problem, rule), SAMPLING, chunk), 1e-10)


@SAMPLES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_of_a_few_ids(dtype, options, small_chunks, monkeypatch):
    backend = "torch" if dtype == torch.float64 or native.WHY_NOT else "native"
    problem, rule = peaked_problem(), OBJECTIVES["gkd"]
    out, whole = call(problem, rule, backend, dtype, **options)
    monkeypatch.setattr(sampling, "IDS_AT_ONCE", 7)
    again, blocks = call(problem, rule, backend, dtype, **options)
    assert torch.equal(out.gradient_share, again.gradient_share)
    torch.testing.assert_close(out.gradient_error, again.gradient_error)
    assert torch.equal(blocks["bias"], whole["bias"])
    for name in ("hidden", "weight"):
        bound = 1e-12 if dtype == torch.float64 else 1e-3
        assert relative_error(blocks[name], whole[name]) < bound, name
