"""A target of three sides that are cut over ranks, each at ids of its own (`test_parallel`)."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from parallel_agreement import BACKENDS, compare, ragged
from problems import OBJECTIVES, reference_of
from sharding import arguments, bare, ends, everything, mine, shard_of

from tropd_kernels import ExOPD, LogitsTeacher, linear_distillation_loss

POWERS = dict(teacher_power=1.25, student_power=0.3, reference_power=-0.25)


def targets(ranks):
    cuts, teacher_cuts, beside_cuts = (
        ragged(each, ranks) for each in ([0, 2, 30, 33, 37], [0, 33, 34, 35, 41], [0, 7, 8, 40, 43])
    )
    for backend in BACKENDS:
        for at, name in enumerate(["tropd_expected", "opd", "gkd", "akl", "jeffreys", "todi"]):
            forms = ["hidden", "logits"] if at % 2 else ["logits", "hidden"]
            problem = everything()
            case = partial(
                compare, problem, replace(OBJECTIVES[name], **POWERS), forms[0], backend,
                beside=reference_of(problem, forms[1], torch.float32),
            )  # fmt: skip
            yield f"{backend} {name}", case
            incoming = torch.linspace(-1, 2, 7)
            yield (
                f"{backend} {name} ragged",
                partial(
                    case, cuts=cuts, teacher_cuts=teacher_cuts, beside_cuts=beside_cuts,
                    reduction="none", incoming=incoming,
                ),
            )  # fmt: skip
            yield f"{backend} {name} blended", partial(case, blending=torch.linspace(1, 0, 7))
        yield f"{backend} a lower reference", partial(a_lower_reference, backend)
        yield f"{backend} excluded ids", partial(excluded_ids, backend, ends(37, ranks))
    yield "disagreement", partial(disagreement, ranks)


def a_lower_reference(backend):
    """The ids that all three have end within the last shards of the other two."""
    problem = bare()
    problem.labels = problem.labels % 31
    beside = reference_of(problem, "hidden", torch.float32, vocab_size=31)
    compare(problem, replace(OBJECTIVES["gkd"], **POWERS), "hidden", backend, beside=beside)


def excluded_ids(backend, bounds):
    """The reference teacher excludes a shard, the teacher ids of another: nothing is left of the
    first, and its power below 0 makes no infinity of it."""
    problem = bare()
    problem.labels = problem.labels % (bounds[1] - 1)
    problem.teacher_bias = torch.zeros(41, dtype=torch.float64)
    problem.teacher_bias[bounds[1] - 1] = -torch.inf
    beside = reference_of(problem, "logits", torch.float32).logits
    beside[:, bounds[1] :] = -torch.inf
    rule = replace(OBJECTIVES["forward_kl"], **POWERS)
    compare(problem, rule, "hidden", backend, beside=LogitsTeacher(beside))


def disagreement(ranks):
    problem, rule = bare(), ExOPD(extrapolation=1.25)
    teacher, options = arguments(problem, rule, "hidden", torch.float32)
    whole = reference_of(problem, "hidden", torch.float32)
    part = shard_of(whole)
    last = dist.get_rank() == ranks - 1

    def call(beside):
        linear_distillation_loss(
            problem.hidden.float(), mine(problem.weight.float()), problem.labels, shard_of(teacher),
            rule, process_group=dist.group.WORLD, reference_teacher=beside, **options,
        )  # fmt: skip

    with pytest.raises(ValueError, match="begins the reference teacher's head .* of 43 ids"):
        call(whole)
    with pytest.raises(ValueError, match="disagree on the reference teacher's bias"):
        call(replace(part, bias=None) if last else part)
    with pytest.raises(ValueError, match="disagree on the reference teacher's logit_scale"):
        call(replace(part, logit_scale=2.0) if last else part)
