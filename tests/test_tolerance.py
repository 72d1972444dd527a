"""Gradients made from a sample of the vocabulary: `gradient_tolerance` and `gradient_sampling`.

The truth is each token's own gradient in float64, from the reference on logits that exist: which
ids a call keeps, what it makes of them and what it says of the error is compared with that.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from parallel_agreement import alike, compare
from problems import OBJECTIVES, make_problem, relative_error, with_everything
from sharding import arguments, ends, mine, run, shard_of
from test_compile import op_arguments
from test_memory import LargestTensor, ResidentPeak

from tropd_kernels import (
    GKD,
    SFT,
    HiddenTeacher,
    LinearDistillationLoss,
    buffers,
    distillation_loss,
    linear_distillation_loss,
    native,
    plan_chunks,
)
from tropd_kernels.backends import engine_for
from tropd_kernels.draws import id_uniforms
from tropd_kernels.loss import ops, sampling
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss.loop import Needs, Problem, Side, forward
from tropd_kernels.loss.sampling import Sampled, Selection
from tropd_kernels.rows.layout import LogitTransform, RowOptions

BACKENDS = ("torch", "native", "triton")
ALL = ("hidden", "weight", "bias")
TOLERANCE = {"gradient_tolerance": 0.3, "seed": 4}
SAMPLING = {"gradient_sampling": 0.2, "seed": 4}
SAMPLES = pytest.mark.parametrize("options", [TOLERANCE, SAMPLING], ids=["tolerance", "sampling"])
#: So small a tolerance keeps more than DENSE of the ids.
TIGHT = {"gradient_tolerance": 1e-5, "seed": 4}
HALF = 2**-6  # of bf16 results and operands, in sums of a few dozen terms
CHUNK = 8


@pytest.fixture(autouse=True)
def _one_thread(use_threads):
    """Several would wait for each other over tensors as small as these."""
    use_threads(1)


@contextmanager
def chunks_of_a_few():
    """Super-chunks of 8 tokens, in float64; of 16 with sub-chunks of 8 in half precision."""
    sizes = {"MULTIPLE": 1, "ROWS": 1, "CPU_ROWS": 1, "SUPER_ROWS": 2, "CPU_SUPER_ROWS": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, rows in sizes.items():
            patch.setattr(chunking, name, rows * CHUNK)
        yield


@pytest.fixture
def small_chunks():
    with chunks_of_a_few():
        yield


@pytest.fixture
def asked(monkeypatch):
    """(sizes, probabilities) of every super-chunk."""
    seen, ask = [], Selection.probabilities

    def watched(self, sizes):
        seen.append((sizes, ask(self, sizes)))
        return seen[-1][1]

    monkeypatch.setattr(Selection, "probabilities", watched)
    return seen


def peaked_problem(tokens=36, vocab_size=301, full=True, device="cpu", spread=4.0, **sizes):
    """Most of a token's gradient lies on few ids; tokens differ by orders of magnitude."""
    problem = make_problem(tokens, vocab_size, device=device, spread=spread, **sizes)
    problem = with_everything(problem) if full else problem
    weights = 10 ** (-3 * torch.rand(tokens, dtype=torch.float64)).to(device)
    if full:
        weights[1] = 0.0
    problem.options["token_weight"] = weights
    return problem


def call(problem, rule, backend, dtype=torch.float64, trained=ALL, factor=1.0, **more):
    """(output, gradients by name) of the loss times this factor."""
    leaves = {
        name: tensor.to(dtype).clone().requires_grad_(name in trained)
        for name in ALL
        if (tensor := getattr(problem, name)) is not None
    }
    teacher, options = arguments(problem, rule, "hidden", dtype)
    out = linear_distillation_loss(
        leaves["hidden"], leaves["weight"], problem.labels, teacher, rule,
        bias=leaves.get("bias"), backend=backend, **(options | more),
    )  # fmt: skip
    (out.loss * factor).backward()
    return out, dict.fromkeys(ALL) | {name: leaf.grad for name, leaf in leaves.items()}


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


def counted(problem):
    """Indices of the tokens that count."""
    weight = problem.options.get("token_weight", torch.ones_like(problem.labels))
    return ((problem.labels >= 0) & (weight != 0)).nonzero()[:, 0]


def chunk_of(problem, backend="torch", dtype=torch.float64, trained=ALL, **more):
    """Tokens of a super-chunk."""
    v = min(len(problem.weight), len(problem.teacher_weight))
    return plan_chunks(
        len(counted(problem)), v, problem.weight.shape[1], problem.teacher_weight.shape[1],
        dtype=dtype, device=problem.hidden.device, backend=backend, samples_gradient=True,
        needs_hidden_grad="hidden" in trained, needs_weight_grad="weight" in trained, **more,
    ).super_rows  # fmt: skip


def squared_sizes(g, hidden, weight, trained):
    """(V,): what each id adds to the squares of the gradients, relative to their sums. g (n, V):
    d_logits of a super-chunk."""
    parts = []
    if "hidden" in trained:
        parts.append(g.square().sum(0) * weight.square().sum(1))
    if "weight" in trained:
        mean = hidden.sum(0) / hidden.sum(0).norm()
        along = hidden @ mean
        apart = hidden.square().sum(1) - along.square()
        parts.append(apart @ g.square() + (along @ g).square())
    return sum(part / part.sum() for part in parts)


@dataclass
class Sample:
    """Gradients by name; what the output says of them; E ||error||^2 by name; of every super-chunk
    the probabilities, and which ids were kept."""

    gradients: dict
    share: float
    error: float
    variance: dict
    probabilities: list
    kept: list


def sample(problem, d_logits, options, chunk=CHUNK, trained=ALL, cuts=None, given=None):
    """As documented, in float64, from every token's d_logits (N, V). cuts: first ids of shards,
    and V. given: every super-chunk's probabilities, for calls in which a last bit may decide."""
    seed = torch.tensor(options["seed"])
    selects = Selection(options.get("gradient_tolerance", 0.0), options.get("gradient_sampling"))
    v = min(len(problem.weight), len(problem.teacher_weight))
    weight, shards = problem.weight[:v], list(pairwise(cuts or (0, v)))
    d_hidden, d_weight = torch.zeros_like(problem.hidden), torch.zeros_like(problem.weight)
    stated, variance = ({"hidden": 0.0, "weight": 0.0} for _ in range(2))
    probabilities, kept, seen = [], [], 0
    for i, tokens in enumerate(counted(problem).split(chunk)):
        g, hidden = d_logits[tokens, :v], problem.hidden[tokens]
        if given is None:
            parts = [(g[:, low:high], hidden, weight[low:high]) for low, high in shards]
            sizes = [squared_sizes(*part, trained).sqrt() for part in parts]
            pi = torch.cat([selects.probabilities(each) for each in sizes])
        else:
            pi = given[i]
        here = id_uniforms(seed, i * chunk, 0, v, g.device) < pi
        g = g * torch.where(here, 1 / pi, 0.0)
        rows = g.T @ hidden
        d_hidden[tokens] = g @ weight
        d_weight[:v] += rows
        lost = torch.where(pi > 0, 1 / pi - 1, 0.0)
        of_hidden = d_logits[tokens, :v].square().sum(0) * weight.square().sum(1)
        of_weight = (d_logits[tokens, :v].T @ hidden).square().sum(1)
        variance["hidden"] += float((lost * of_hidden).sum())
        variance["weight"] += float((lost * of_weight).sum())
        stated["hidden"] = variance["hidden"]
        stated["weight"] += float(((1 - pi) * rows.square().sum(1))[here].sum())
        seen += len(tokens) * int(here.sum())
        probabilities.append(pi)
        kept.append(here)
    gradients = {"hidden": d_hidden, "weight": d_weight}
    gradients["bias"] = None if problem.bias is None else d_logits.sum(0)
    errors = [
        stated[name] ** 0.5 / max(float(gradients[name].norm()), 1e-300)
        for name in stated
        if name in trained
    ]
    share = seen / (len(counted(problem)) * v)
    return Sample(gradients, share, max(errors), variance, probabilities, kept)


def exact(problem, d_logits):
    """Gradients by name, of all ids."""
    found = {"hidden": d_logits @ problem.weight, "weight": d_logits.T @ problem.hidden}
    return found | {"bias": d_logits.sum(0) if problem.bias is not None else None}


def agrees(out, gradients, truth, bound, trained=ALL):
    """With the sample: the gradients, and what is said of them."""
    for name in trained:
        if truth.gradients[name] is not None:
            assert relative_error(gradients[name], truth.gradients[name]) < bound, name
    assert float(out.gradient_share) == pytest.approx(truth.share, rel=1e-6)
    assert float(out.gradient_error) == pytest.approx(truth.error, rel=bound)


# --- the gradients of a sample -------------------------------------------------------------------


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
    truth = sample(problem, token_gradients(problem, rule), options, chunk_of(problem, backend))
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


# --- how far they are off ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "options"),
    [
        (("hidden",), {"gradient_tolerance": 0.4}),
        (("weight",), {"gradient_sampling": 0.2}),
        (("hidden", "weight"), {"gradient_tolerance": 0.4}),
        (("hidden", "weight"), {"gradient_sampling": 0.2}),
    ],
    ids=str,
)
def test_unbiased_and_as_far_off_as_stated(trained, options, small_chunks):
    """Over many seeds: the mean error is what is left of chance, the mean square is the formula's,
    and so is the one that a call states: of d_hidden to the last digit, of d_weight on average."""
    problem = peaked_problem(tokens=16, vocab_size=101, width=4, full=False)
    rule, runs = OBJECTIVES["reverse_kl"], 300
    d_logits = token_gradients(problem, rule)
    truth = exact(problem, d_logits)
    errors = {name: [] for name in trained}
    stated, shares = [], []
    for seed in range(runs):
        out, gradients = call(problem, rule, "torch", trained=trained, seed=seed, **options)
        for name in trained:
            errors[name].append(gradients[name] - truth[name])
        stated.append((out.gradient_error * gradients[trained[0]].norm()) ** 2)
        shares.append(out.gradient_share)
    expected = sample(problem, d_logits, options | {"seed": 0}, trained=trained)
    for name in trained:
        each = torch.stack(errors[name])
        squares = each.square().sum((1, 2))
        variance = expected.variance[name]
        assert variance > 0.01 * truth[name].square().sum(), "the sample is a real one"
        assert near(squares, variance)
        # The mean's squared error is chi-square-like around variance / runs.
        assert each.mean(0).square().sum() < 2 * variance / runs
        for direction in (truth[name], torch.ones_like(truth[name])):
            assert near((each * direction).sum((1, 2)), 0.0)
    assert near(torch.stack(shares), float(torch.stack(expected.probabilities).mean()))
    if trained == ("hidden",):
        for each in stated:
            torch.testing.assert_close(float(each), expected.variance["hidden"], rtol=1e-9, atol=0)
    elif trained == ("weight",):
        assert near(torch.stack(stated), expected.variance["weight"])


def near(values, mean):
    """Their mean is this one, within four standard errors."""
    return abs(float(values.mean()) - mean) < 4 * float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("trained", [("weight",), ("hidden", "weight")], ids=str)
def test_hidden_states_of_a_common_direction(mean, trained):
    """There the columns' signs count: ids that all tokens push the same way bring far more to
    d_weight than their squares say, and a choice by those alone would be 2.3 times as far off."""
    problem = make_problem(64, 1001, spread=2.5)
    problem.hidden += mean
    problem.weight -= problem.weight.mean(1, keepdim=True)  # leaves the logits as they were
    d_logits = token_gradients(problem, SFT())
    truth = exact(problem, d_logits)["weight"]
    squares, shares = [], []
    for seed in range(20):
        out, gradients = call(
            problem, SFT(), "torch", trained=trained, gradient_tolerance=0.3, seed=seed
        )
        squares.append(relative_error(gradients["weight"], truth) ** 2)
        shares.append(float(out.gradient_share))
    assert max(shares) < 0.5
    # Random directions are not quite independent, and the two gradients share one tolerance.
    most = 0.42 if mean == 0 or "hidden" in trained else 0.33
    assert 0.24 < math.sqrt(sum(squares) / len(squares)) < most


def test_a_square_of_the_mean_counts_once():
    """Hidden states that are all the same have nothing but their mean: sizes are exact there."""
    problem = make_problem(20, 301, spread=4)
    problem.hidden[:] = problem.hidden[0]
    d_logits = token_gradients(problem, SFT())
    truth = exact(problem, d_logits)["weight"].square().sum(1)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(Selection, "probabilities", lambda _, e: seen.append(e) or torch.ones_like(e))
        call(problem, SFT(), "torch", trained=("weight",), **TOLERANCE)
    torch.testing.assert_close(seen[0].square(), truth / truth.sum(), rtol=1e-10, atol=1e-20)


# --- corners -------------------------------------------------------------------------------------


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
        drawn = Selection(0.0, 0.2, torch.tensor(seed))
        blocks = sampling.Sample(drawn, engine_for("torch"), head, False, torch.empty(())).choose(
            g, g[:, :8], 0
        )
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


# --- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("selects", [(0.3, None), (0.0, 0.2)])
def test_no_tensor_of_tokens_times_vocabulary(selects, monkeypatch):
    for name in ("MULTIPLE", "ROWS", "SUPER_ROWS"):
        monkeypatch.setattr(chunking, name, 16)
    monkeypatch.setattr("tropd_kernels.rows.torch_rows.BLOCK_ELEMENTS", {"cpu": 4 * 3001})
    tokens, v = 256, 3001
    problem = make_problem(tokens, v, width=4, teacher_width=4, spread=4)
    flat = Problem(
        Side(problem.hidden.float(), problem.weight.float()),
        Side(problem.teacher_hidden.float(), problem.teacher_weight.float()),
        problem.labels, {}, RowOptions(GKD(), LogitTransform(), LogitTransform()), "torch", -100,
        None, selection=Selection(*selects, torch.tensor(4)),
    )  # fmt: skip
    with LargestTensor() as seen:
        result = forward(flat, Needs(student=True, weight=True), torch.ones(()))
    assert 0 < result.sampled[Sampled.SHARE] < 0.5 and result.sampled[Sampled.ERROR] > 0
    assert seen.elements <= tokens * v / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [TOLERANCE | {"gradient_tolerance": 0.01}, SAMPLING | {"gradient_sampling": 0.45}]
)
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

    assert 0.05 < float(step().gradient_share) < 0.5
    returned = sum(t.numel() * t.element_size() for t in (hidden, weight))
    peaks = []
    for _ in range(3):  # what the allocator keeps of freed memory differs from run to run
        buffers.release()
        with ResidentPeak() as peak:
            step()
        peaks.append(peak.delta)
    sizes = dict(dtype=dtype, device="cpu", backend=backend)
    plan = plan_chunks(tokens, v, h, h, **sizes, samples_gradient=True)
    used = min(peaks) - returned
    assert 0.5 * plan.workspace_bytes <= used <= 1.1 * plan.workspace_bytes, f"{used}\n{plan}"
    without = plan_chunks(tokens, v, h, h, **sizes)
    more = plan.workspace_bytes - without.workspace_bytes
    assert 0 < more == plan.workspace["sample of ids"] < without.workspace_bytes / 3
    assert (plan.rows, plan.super_rows) == (without.rows, without.super_rows)
    frozen = dict(needs_hidden_grad=False, needs_weight_grad=False)
    plan = plan_chunks(tokens, v, h, h, **sizes, **frozen, samples_gradient=True)
    assert plan.workspace["sample of ids"] == 0


# --- torch.compile, modules, errors --------------------------------------------------------------


@pytest.mark.parametrize("more", [(0.5, None), (0.0, 0.2)])
@pytest.mark.parametrize(
    "needs",
    [[True, True, False, False], [True, False, False, False], [False, True, False, True],
     [False] * 4],
)  # fmt: skip
def test_opcheck(needs, more, device):
    arguments = (*op_arguments("torch", device, needs), *more, torch.tensor(4, device=device))
    torch.library.opcheck(ops.distill, arguments)
    sampled = ops.distill(*arguments)[-1]
    assert sampled.shape == ((2,) if any(needs) else (0,))
    assert not any(needs) or sampled[Sampled.SHARE] < 1


@SAMPLES
def test_compile_without_a_graph_break(options):
    problem = peaked_problem(full=False)
    options, seed = options | {}, torch.tensor(options["seed"])
    del options["seed"]
    module = LinearDistillationLoss(GKD(), backend="torch", **options)
    weight, labels = problem.weight.float(), problem.labels
    teacher = HiddenTeacher(problem.teacher_hidden.float(), problem.teacher_weight.float())

    def step(hidden, seed):
        out = module(hidden, weight, labels, teacher, seed=seed)
        return out.loss, out.gradient_error, out.gradient_share

    results = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden = problem.hidden.float().requires_grad_()
        found = function(hidden, seed)
        found[0].backward()
        results.append((*(t.detach() for t in found), hidden.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert results[0][1] > 0 and results[0][2] < 0.5


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
        (dict(gradient_sampling=0.5), ValueError, "gradient_sampling draws .* pass seed="),
        (dict(gradient_tolerance=0.5), ValueError, "gradient_tolerance draws .* pass seed="),
        (TOLERANCE | {"seed": 0.5}, TypeError, "seed must be an int .*got float"),
        (SAMPLING | {"seed": 2**64}, ValueError, f"seed must be in .*got {2**64}"),
        (SAMPLING | {"seed": torch.arange(2)}, ValueError, r"seed must be .* got shape \(2,\)"),
        (TOLERANCE | SAMPLING, ValueError, "pass one of them"),
        (TOLERANCE | dict(reduction="none"), NotImplementedError, "gradient_tolerance .*'none'"),
        (SAMPLING | dict(reduction="none"), NotImplementedError, "gradient_sampling .*'none'"),
        (TOLERANCE | dict(backend="reference"), NotImplementedError, "'reference' takes no"),
    ],
)  # fmt: skip
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
            for options in (TOLERANCE, SAMPLING):
                yield f"{backend} {name} {options}", partial(shards_sample, name, backend, options)
        case = partial(shards_sample, "gkd", backend)
        yield f"{backend} frozen head", partial(case, TOLERANCE, trained=("hidden",))
        yield f"{backend} frozen body", partial(case, SAMPLING, trained=("weight",))
        yield f"{backend} a small shard", partial(case, TOLERANCE, cuts=(0, 9, 301))
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{backend} {dtype}", partial(shards_are_near, backend, dtype)
        for name in ("tropd", "gkd"):
            yield (
                f"{backend} {name} all ids",
                partial(compare, peaked_problem(), name, "hidden", backend, **TIGHT),
            )
    yield "a mean of many seeds", shards_are_unbiased
    yield "other options", ranks_disagree


def sharded_call(problem, rule, backend, dtype=torch.float64, trained=ALL, cuts=None, **more):
    """(output, gradients by name) on this rank: of hidden, and of its part of weight and bias."""
    leaves = {
        name: (tensor if name == "hidden" else mine(tensor, 0, cuts)).to(dtype).clone()
        for name in ALL
        if (tensor := getattr(problem, name)) is not None
    }
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    teacher, options = arguments(problem, rule, "hidden", dtype)
    out = linear_distillation_loss(
        leaves["hidden"], leaves["weight"], problem.labels, shard_of(teacher), rule,
        bias=leaves.get("bias"), backend=backend, process_group=dist.group.WORLD,
        **(options | more),
    )  # fmt: skip
    out.loss.backward()
    alike("what is said of the sample", torch.stack([out.gradient_error, out.gradient_share]))
    if "hidden" in trained:
        alike("d_hidden", leaves["hidden"].grad)
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def shards_sample(name, backend, options, trained=ALL, cuts=None):
    """Each its own ids, by their own sizes: to rounding what the formula gives."""
    problem, rule = peaked_problem(), OBJECTIVES[name]
    with chunks_of_a_few():
        out, gradients = sharded_call(problem, rule, backend, trained=trained, cuts=cuts, **options)
    cuts = cuts or ends(301, 2)
    truth = sample(problem, token_gradients(problem, rule), options, trained=trained, cuts=cuts)
    for name in ("weight", "bias"):
        truth.gradients[name] = mine(truth.gradients[name], 0, cuts)
    agrees(out, gradients, truth, 1e-10, trained)
    assert truth.error > 0


def shards_are_near(backend, dtype):
    """As far off as is said, in sums that round."""
    problem, rule = peaked_problem(), OBJECTIVES["tropd"]
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        setattr(problem, name, getattr(problem, name).to(dtype).double())
    with chunks_of_a_few():
        out, gradients = sharded_call(problem, rule, backend, dtype, **TOLERANCE)
    truth = exact(problem, token_gradients(problem, rule))
    error = relative_error(gradients["hidden"], truth["hidden"])
    stated = float(out.gradient_error)
    assert 0.2 < stated < 0.5 and 0.3 * stated < error < 2 * stated
    assert relative_error(gradients["bias"], mine(truth["bias"])) < HALF


def shards_are_unbiased():
    problem = peaked_problem(tokens=8, vocab_size=101, width=4, full=False)
    rule, runs = OBJECTIVES["reverse_kl"], 60
    d_logits = token_gradients(problem, rule)
    truth = exact(problem, d_logits)["hidden"]
    total, variance = torch.zeros_like(truth), []
    for seed in range(runs):
        options = {"gradient_sampling": 0.2, "seed": seed}
        _, gradients = sharded_call(problem, rule, "torch", **options)
        total += (gradients["hidden"] - truth) / runs
        variance.append((gradients["hidden"] - truth).square().sum())
    expected = sample(problem, d_logits, options, cuts=ends(101, 2)).variance["hidden"]
    assert near(torch.stack(variance), expected) and expected > 0
    assert total.square().sum() < 2.5 * expected / runs


def ranks_disagree():
    problem = make_problem()
    teacher, options = arguments(problem, GKD(), "hidden", torch.float32)
    rank = dist.get_rank()
    for more, name in (
        ({"gradient_tolerance": 0.1 * (1 + rank), "seed": 1}, "gradient_tolerance"),
        ({"gradient_sampling": 0.5 + 0.1 * rank, "seed": 1}, "gradient_sampling"),
        ({"gradient_sampling": 0.5, "seed": rank}, "seed"),
        ({"gradient_tolerance": 0.5, "seed": rank}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"disagree on {name}"):
            linear_distillation_loss(
                problem.hidden.float(), mine(problem.weight.float()), problem.labels,
                shard_of(teacher), GKD(), process_group=dist.group.WORLD, **(options | more),
            )  # fmt: skip


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_ranks_sample_their_own_ids(tmp_path):
    run(2, tmp_path, sharded)
