"""Gradients made from a sample of the vocabulary, as documented, in float64: for `test_sampling_*`.

The truth is each token's own gradient, from the reference on logits that exist: which ids a call
keeps, what it makes of them and what it says of the error is compared with that.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from problems import make_problem, relative_error, with_everything
from sharding import arguments

from tropd_kernels import distillation_loss, linear_distillation_loss, plan_chunks
from tropd_kernels.draws import id_uniforms
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss.sampling import GradientSampling

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
def one_thread(use_threads):
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


@pytest.fixture(name="small_chunks")
def small_chunks_fixture():
    with chunks_of_a_few():
        yield


@pytest.fixture(name="asked")
def asked_fixture(monkeypatch):
    """(sizes, probabilities) of every super-chunk."""
    seen, ask = [], GradientSampling.probabilities

    def watched(self, sizes):
        seen.append((sizes, ask(self, sizes)))
        return seen[-1][1]

    monkeypatch.setattr(GradientSampling, "probabilities", watched)
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


def sample(problem, d_logits, options, chunk=CHUNK, trained=ALL, cuts=None, given=None,
           left_out=None):  # fmt: skip
    """As documented, in float64, from every token's d_logits (N, V). cuts: first ids of shards,
    and V. given: every super-chunk's probabilities, for calls in which a last bit may decide.
    left_out (N,): the tokens that the rule does not select."""
    count = counted(problem)
    count = count if left_out is None else count[~left_out[count]]
    seed = torch.tensor(options["seed"])
    selects = GradientSampling(
        options.get("gradient_tolerance", 0.0), options.get("gradient_sampling")
    )
    v = min(len(problem.weight), len(problem.teacher_weight))
    weight, shards = problem.weight[:v], list(pairwise(cuts or (0, v)))
    d_hidden, d_weight = torch.zeros_like(problem.hidden), torch.zeros_like(problem.weight)
    stated, variance = ({"hidden": 0.0, "weight": 0.0} for _ in range(2))
    probabilities, kept, seen = [], [], 0
    for i, tokens in enumerate(count.split(chunk)):
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
    share = seen / (len(count) * v)
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


def near(values, mean):
    """Their mean is this one, within four standard errors."""
    return abs(float(values.mean()) - mean) < 4 * float(values.std()) / len(values) ** 0.5
