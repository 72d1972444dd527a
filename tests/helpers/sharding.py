"""Processes on loopback, and problems cut over them by vocabulary, for `test_parallel`."""

import multiprocessing
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import inputs_of, make_problem, with_everything

from tropd_kernels import HiddenTeacher, LogitsTeacher

#: Imports take most of a process's time. Where it can, one server makes them once, and forks.
START = "forkserver" if sys.platform == "linux" else "spawn"
if START == "forkserver":
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "tropd_kernels", "pytest"])


def worker(rank, ranks, folder, body, timeout, backend):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    report = "passed"
    for name, case in body(ranks):
        torch.manual_seed(0)
        try:
            case()
        except BaseException:  # pytest's "did not raise" is no Exception
            report = f"--- rank {rank}: {name}\n{traceback.format_exc()}\n"
            break  # the ranks are out of step now
    with open(f"{folder}/{rank}", "w") as file:
        file.write(report)


#: Seconds that a rank waits for another: for one that hangs, not for one on a slow processor.
PATIENCE = 200


def run(ranks, folder, body, timeout=PATIENCE, may_die=(), backend="gloo"):
    """Runs `body(ranks)`, which yields (name, case), on every rank; with nccl, a GPU each."""
    processes = mp.start_processes(
        worker, args=(ranks, str(folder), body, timeout, backend), nprocs=ranks, join=False,
        start_method=START if backend == "gloo" else "spawn",
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


def ends(rows, ranks):
    """First ids of shards of ceil(rows / ranks) rows, the last one shorter, and the end."""
    return [min(rank * -(-rows // ranks), rows) for rank in range(ranks + 1)]


def mine(tensor, dim=0, cuts=None):
    bounds = cuts or ends(tensor.shape[dim], dist.get_world_size())
    low, high = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    return tensor.narrow(dim, low, high - low).contiguous()


def shard_of(teacher, cuts=None):
    if isinstance(teacher, HiddenTeacher):
        bias = None if teacher.bias is None else mine(teacher.bias, 0, cuts)
        return HiddenTeacher(
            teacher.hidden, mine(teacher.weight, 0, cuts), bias, teacher.logit_scale,
            teacher.softcap,
        )  # fmt: skip
    if isinstance(teacher, LogitsTeacher):
        return LogitsTeacher(mine(teacher.logits, -1, cuts))
    return teacher


def arguments(problem, rule, form, dtype):
    """Teacher and options, in this dtype."""
    options = problem.options | inputs_of(rule, problem.labels)
    teacher = None
    if rule.uses_teacher:
        teacher = problem.teacher(form, dtype, options.get("temperature", 1.0))
    wide = torch.promote_types(dtype, torch.float32)
    options = {
        k: v.to(wide) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    return teacher, options | problem.student_head


def bare(tokens=10, teacher_vocab_size=41, **sizes):
    return make_problem(tokens, teacher_vocab_size=teacher_vocab_size, **sizes)


def everything(**sizes):
    return with_everything(bare(7, **sizes))
