"""Heads sharded over the vocabulary: processes on loopback against the same op in one process.

A test spawns its processes once, which is what takes the time, and runs many cases in them: each is
reported by name, rank and traceback, and the first that fails ends the rank.

agreement: every objective, teacher form, backend and option, in pairs, equal to the whole head's
loss, statistics and gradients. communication: bytes sent, as `parallel` states them, at three
heights of the head. bad_inputs: what one rank alone is given is an error on every rank.
"""

import os
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from flat import flat_problem
from parallel_agreement import RANKS, agreement, on_either_number_of_ranks
from parallel_bad_input import bad_inputs
from parallel_target import targets
from problems import OBJECTIVES, K
from sharding import PATIENCE, arguments, bare, ends, mine, run, shard_of

from tropd_kernels import OPD, SFT, linear_distillation_loss, parallel
from tropd_kernels.gathering import gathered_tokens
from tropd_kernels.loss import agreement as checks
from tropd_kernels.loss.problem import Side

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


class Counted:
    """Bytes that this rank sends, by the function that sends them."""

    def __init__(self, monkeypatch):
        self.bytes = dict.fromkeys(("all_gather", "all_reduce", "batch_isend_irecv"), 0)
        for name, sent in (
            ("all_gather", lambda parts, tensor, **_: [tensor]),
            ("all_reduce", lambda tensor, **_: [tensor]),
            ("batch_isend_irecv", lambda ops: [op.tensor for op in ops if op.op is dist.isend]),
        ):
            monkeypatch.setattr(dist, name, partial(self.count, name, sent, getattr(dist, name)))

    def count(self, name, sent, function, *args, **kwargs):
        self.bytes[name] += sum(t.numel() * t.element_size() for t in sent(*args, **kwargs))
        return function(*args, **kwargs)


def sent_by(problem, rule, form, **options):
    """Bytes sent by one call, the backward included."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        teacher, given = arguments(problem, rule, form, torch.float32)
        hidden = problem.hidden.float().requires_grad_()
        weight = mine(problem.weight.float()).requires_grad_()
        out = linear_distillation_loss(
            hidden, weight, problem.labels, shard_of(teacher), rule,
            process_group=dist.group.WORLD, **(given | options),
        )  # fmt: skip
        out.loss.sum().backward()
        return counted.bytes


def communication(ranks):
    """Numbers of 4 bytes a token: what `parallel` states, H = 16 for d_hidden."""
    n, stated = 10, {
        ("tropd", "hidden"): 11 + K + 8,
        ("opd", "hidden"): 11,
        ("gkd", "logits"): 11 + 8,
        ("reverse_kl", "hidden"): 11,
        ("akl", "hidden"): 11 + 120 + 8,
        ("gkd_cross_entropy", "hidden"): 12 + 8,
        ("tropd", "top_k"): 4 + 8,
        ("student_top_k", "hidden"): 11 + 4 * K + 3 + 8,
        ("opd", "sampled"): 4,
        ("entropy_opd", "sampled"): 4 + 4 * 4 / 10,  # of ten tokens four are selected
    }  # fmt: skip

    def check(name, form, numbers, reduction):
        if name == "student_top_k" and reduction == "none":  # the backward seeks its ids again
            numbers += 4 * K
        for v in (37, 301, 1003):
            sent = sent_by(bare(vocab_size=v, teacher_vocab_size=v), OBJECTIVES[name], form,
                           reduction=reduction)  # fmt: skip
            assert sent == {
                "all_gather": 4 * numbers * n + 96 * 8,
                "all_reduce": 4 * 16 * (4 if name == "entropy_opd" else n),
                "batch_isend_irecv": 0,
            }, f"{v}: {sent}"

    for (name, form), numbers in stated.items():
        for reduction in ("mean", "none"):
            yield f"{name} {form} {reduction}", partial(check, name, form, numbers, reduction)

    def differently_cut():
        """The rows of the teacher's head that change ranks follow from the padding, not from V."""
        rank, rule = dist.get_rank(), OBJECTIVES["tropd"]
        for v in (40, 400):
            problem = bare(vocab_size=v, teacher_vocab_size=v + 3 * ranks)
            sent = sent_by(problem, rule, "hidden")["batch_isend_irecv"]
            assert sent == 4 * 24 * 3 * (rank + 1) * (rank + 1 < ranks), sent

    def looks_once():
        """Where looking at values costs a host sync, and the caller wants none, the checks are made
        in the first call with the same shapes and options alone."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "may_look", lambda problem: False)
            calls = [sent_by(bare(), OPD(), "sampled")["all_gather"] for _ in range(3)]
            calls.append(sent_by(bare(), OPD(), "sampled", temperature=2.0)["all_gather"])
        first, second = 4 * 4 * n + 96 * 8, 4 * 4 * n
        assert calls == [first, second, second, first], calls

    yield "differently cut", differently_cut
    yield "looks once", looks_once


def sequence_parallel(ranks):
    """Each rank has a share of the tokens, and gets their gradients back."""

    def shares():
        problem = bare(4 * ranks)
        teacher, options = arguments(problem, OBJECTIVES["tropd"], "top_k", torch.float32)
        hidden, weight = problem.hidden.float(), problem.weight.float()

        def call(hidden, weight, **group):
            out = linear_distillation_loss(
                hidden, weight, problem.labels, teacher, OBJECTIVES["tropd"], **options, **group
            )
            out.loss.backward()
            return out.loss.detach()

        whole = hidden.clone().requires_grad_()
        expected = call(whole, weight)
        mine_ = mine(hidden).requires_grad_()
        everyone = gathered_tokens(mine_, dist.group.WORLD)
        assert torch.equal(everyone, hidden)
        loss = call(everyone, mine(weight), process_group=dist.group.WORLD)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine_.grad, mine(whole.grad), rtol=1e-4, atol=1e-6)

    def uneven():
        rank = dist.get_rank()
        with pytest.raises(
            ValueError, match=r"hidden: rank 1 of \d holds \(2, 3\), rank 0 \(4, 3\)"
        ):
            gathered_tokens(torch.zeros(4 if rank != 1 else 2, 3), dist.group.WORLD)

    yield "shares of the tokens", shares
    yield "uneven shares", uneven


def all_cases(ranks):
    for cases in (agreement, targets, communication, sequence_parallel, bad_inputs):
        yield from ((f"{cases.__name__}: {name}", case) for name, case in cases(ranks))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_agreement_with_the_whole_head_communication_and_bad_input(ranks, tmp_path):
    run(ranks, tmp_path, all_cases)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_every_objective_on_either_number_of_ranks(ranks, tmp_path):
    run(ranks, tmp_path, on_either_number_of_ranks)


@pytest.mark.parametrize(
    ("device", "ignore_index", "looks"),
    [("cpu", None, True), ("meta", -100, True), ("meta", None, False)],
)
def test_the_checks_add_no_host_sync_where_the_caller_wants_none(device, ignore_index, looks):
    labels = torch.empty(1, device=device)
    problem = flat_problem(Side(None), None, labels, OPD(), "torch", ignore_index=ignore_index)
    assert checks.may_look(problem) == looks


# --- ranks that end, or hang ---------------------------------------------------------------------


def hangs_and_ends(ranks):
    """Rank 1 hangs in the middle of a call that it shares with rank 0, rank 2 ends in another."""
    rank, seconds = dist.get_rank(), 4
    groups = [dist.new_group([0, other], timeout=timedelta(seconds=seconds)) for other in (1, 2)]

    def call(group):
        problem = bare()
        low, high = ends(37, 2)[min(rank, 1) :][:2]
        hidden = problem.hidden.requires_grad_()
        linear_distillation_loss(
            hidden, problem.weight[low:high], problem.labels, None, SFT(), process_group=group
        )

    def fails(group):
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 0 of 2: an exchange .* process_group"):
            call(group)
        assert time.monotonic() - started < PATIENCE / 2  # by its group's time-out

    def hangs():
        if rank == 0:
            fails(groups[0])
        elif rank == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parallel.Shard, "gather", lambda *_: time.sleep(seconds + 2))
                with pytest.raises(AttributeError):
                    call(groups[0])
        dist.barrier()

    def ends_early():
        if rank == 0:
            fails(groups[1])
        elif rank == 2:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parallel.Shard, "sum_", lambda *_: os._exit(1))
                call(groups[1])

    yield "hangs", hangs
    yield "ends", ends_early


def test_a_rank_that_ends_or_hangs_is_an_error_within_the_time_out(tmp_path):
    run(3, tmp_path, hangs_and_ends, may_die=(2,))
