"""Heads sharded over the vocabulary: processes on loopback against the same op in one process.

Each test spawns its processes once and runs many cases in them; a case that fails is reported by
name, rank and traceback.
"""

import os
import traceback
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import OBJECTIVES, TEACHERS, make_problem, relative_error, serves, with_everything

from tropd_kernels import (
    HiddenTeacher,
    LogitsTeacher,
    linear_distillation_loss,
    native,
    parallel,
    parallel_checks,
)

FLOAT32 = 1e-5
BACKENDS = ("torch",) if native.WHY_NOT else ("torch", "native")


# --- processes -----------------------------------------------------------------------------------


def worker(rank, ranks, folder, body, timeout):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    report = ""
    try:
        for name, case in body(ranks):
            torch.manual_seed(0)
            try:
                case()
            except Exception:
                report += f"--- rank {rank}: {name}\n{traceback.format_exc()}\n"
                break  # the ranks are out of step now
    finally:
        with open(f"{folder}/{rank}", "w") as file:
            file.write(report or "passed")
    if not report:
        dist.destroy_process_group()


def run(ranks, folder, body, timeout=60, may_die=()):
    """Runs `body(ranks)`, which yields (name, case), on every rank."""
    processes = mp.start_processes(
        worker, args=(ranks, str(folder), body, timeout), nprocs=ranks, join=False,
        start_method="spawn",
    )  # fmt: skip
    for process in processes.processes:
        process.join(240)
        assert not process.is_alive(), "a rank hangs"
    reports = [
        (folder / str(rank)).read_text() if (folder / str(rank)).exists() else f"rank {rank} died"
        for rank in range(ranks)
        if rank not in may_die
    ]
    failed = [report for report in reports if report != "passed"]
    assert not failed, "\n".join(failed)


# --- shards --------------------------------------------------------------------------------------


def ends(rows, ranks):
    """First ids of shards of ceil(rows / ranks) rows, the last one shorter, and the end."""
    return [min(rank * -(-rows // ranks), rows) for rank in range(ranks + 1)]


def mine(tensor, dim=0):
    bounds = ends(tensor.shape[dim], dist.get_world_size())
    low, high = bounds[dist.get_rank() : dist.get_rank() + 2]
    return tensor.narrow(dim, low, high - low).contiguous()


def shard_of(teacher):
    if isinstance(teacher, HiddenTeacher):
        bias = None if teacher.bias is None else mine(teacher.bias)
        return HiddenTeacher(
            teacher.hidden, mine(teacher.weight), bias, teacher.logit_scale, teacher.softcap
        )
    if isinstance(teacher, LogitsTeacher):
        return LogitsTeacher(mine(teacher.logits, -1))
    return teacher


def arguments(problem, rule, form, dtype):
    options = dict(problem.options)
    teacher = None
    if rule.uses_teacher:
        teacher = problem.teacher(form, dtype, options.get("temperature", 1.0))
    wide = torch.promote_types(dtype, torch.float32)
    options = {
        k: v.to(wide) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    return teacher, options | problem.student_head


def compare(problem, rule, form, backend, bound=FLOAT32, dtype=torch.float32, incoming=1.0, **more):
    """Loss, statistics and gradients of the sharded call against the whole head's, on this rank."""
    teacher, options = arguments(problem, rule, form, dtype)
    results = []
    for cut in (lambda tensor: tensor, mine):
        hidden, weight, bias = (
            None if t is None else t.to(dtype)
            for t in (problem.hidden, problem.weight, problem.bias)
        )
        weight, bias = cut(weight), None if bias is None else cut(bias)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
        given = {"bias": leaves[2]} if bias is not None else {}
        sharded = cut is mine
        out = linear_distillation_loss(
            leaves[0], leaves[1], problem.labels, shard_of(teacher) if sharded else teacher, rule,
            backend=backend, process_group=dist.group.WORLD if sharded else None,
            **given, **options, **more,
        )  # fmt: skip
        (out.loss * incoming).sum().backward()
        results.append((out, [leaf.grad for leaf in leaves]))
    (whole, expected), (shard, found) = results
    assert relative_error(shard.loss, whole.loss) <= bound, "loss"
    assert shard.loss.dtype == whole.loss.dtype
    for name, ours, truth in zip(("hidden", "weight", "bias"), found, expected, strict=False):
        truth = truth if name == "hidden" else mine(truth)
        # A shard's own norm may be small beside the head's.
        scale = max(1.0, float(expected[1].norm() / truth.norm())) if name == "weight" else 1.0
        assert relative_error(ours, truth) <= bound * scale, f"d_{name}"
        assert ours.dtype == dtype
    for name, value in vars(whole.stats).items():
        ours = getattr(shard.stats, name)
        assert (ours is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                ours, value, rtol=20 * bound, atol=20 * bound, equal_nan=True, msg=name
            )
    everyone = parallel.gather(
        dist.group.WORLD, torch.cat([shard.loss.reshape(-1), found[0].flatten()])
    )
    assert all(torch.equal(each, everyone[0]) for each in everyone), "the ranks differ"


def bare(teacher_vocab_size=41, **sizes):
    return make_problem(teacher_vocab_size=teacher_vocab_size, **sizes)


def everything(**sizes):
    return with_everything(bare(tokens=7, **sizes))


# --- agreement with one process ------------------------------------------------------------------


def every_objective(ranks):
    """With all options, V divisible by neither number of ranks, and heads cut at different ids."""
    for backend in BACKENDS:
        for name, rule in OBJECTIVES.items():
            for form in TEACHERS:
                if serves(form, name) and (form == "sampled" or name != "sft"):
                    for kind, problem in (("bare", bare()), ("everything", everything())):
                        yield (
                            f"{backend} {name} {form} {kind}",
                            lambda p=problem, r=rule, f=form, b=backend: compare(p, r, f, b),
                        )


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_objective_and_teacher(ranks, tmp_path):
    run(ranks, tmp_path, every_objective)
