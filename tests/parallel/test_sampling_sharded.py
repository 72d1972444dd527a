"""Sampled gradients of a head sharded over the vocabulary: each rank draws from its own ids."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from gradient_samples import (
    ALL,
    HALF,
    SAMPLING,
    TIGHT,
    TOLERANCE,
    agrees,
    chunks_of_a_few,
    exact,
    near,
    peaked_problem,
    sample,
    token_gradients,
)
from parallel_agreement import alike, compare
from problems import OBJECTIVES, make_problem, relative_error
from sharding import arguments, ends, mine, run, shard_of

from tropd_kernels import GKD, linear_distillation_loss, native


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
    cuts, d_logits = cuts or ends(301, 2), token_gradients(problem, rule)
    left_out = out.stats.trust.isnan()
    truth = sample(problem, d_logits, options, trained=trained, cuts=cuts, left_out=left_out)
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
