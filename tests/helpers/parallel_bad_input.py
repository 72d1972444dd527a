"""Cases for `test_parallel`: what one rank alone is given is an error on every rank."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from problems import OBJECTIVES, relative_error
from sharding import arguments, bare, ends, mine, shard_of

from tropd_kernels import (
    SFT,
    HiddenTeacher,
    LogitsTeacher,
    TokenRule,
    TopKTeacher,
    linear_distillation_loss,
    linear_log_probs,
    native,
)

FLOAT32 = 1e-5


def bad_inputs(ranks):
    """What one rank alone is given; every rank raises, and the next call is in step again."""
    last = ranks - 1
    at_fault = f"rank {last} of {ranks}"
    labels = bare().labels
    other = labels.clone()
    other[3] = (other[3] + 1) % 37
    top_k = bare().teacher("top_k", torch.float32)

    def call(rule=None, form="hidden", everywhere=None, **wrong):
        """`wrong` arguments on the last rank, `everywhere` on all."""
        rule = rule or OBJECTIVES["tropd"]
        problem = bare()
        teacher, options = arguments(problem, rule, form, torch.float32)
        given = dict(
            hidden=problem.hidden.float().requires_grad_(),
            weight=mine(problem.weight.float()).requires_grad_(),
            labels=problem.labels, teacher=shard_of(teacher), objective=rule,
            process_group=dist.group.WORLD, backend="torch", **options,
        ) | (everywhere or {})  # fmt: skip
        if dist.get_rank() == last:
            given |= wrong
        return linear_distillation_loss(**given)

    def refused(match, kind=ValueError, **case):
        with pytest.raises(kind, match=match):
            call(**case)
        assert call().loss.isfinite()

    def disagree(name):
        return f"disagree on {name}: {at_fault}"

    def other_threads():
        """Under a budget they would walk by chunks of other sizes."""
        torch.set_num_threads(2 if dist.get_rank() == last else 1)
        try:
            refused(
                disagree("max_workspace_bytes") + ".*with 2 threads, rank 0 .*with 1 threads",
                everywhere=dict(backend="native", max_workspace_bytes=10**9),
            )  # fmt: skip
        finally:
            torch.set_num_threads(1)

    def wide(width, dtype=torch.float32):
        heights = {"hidden": 10, "weight": mine(bare().weight).shape[0]}
        return {name: torch.zeros(tall, width, dtype=dtype) for name, tall in heights.items()}

    n = 10
    none = dict(uniforms=None, teacher=None)
    sft = dict(objective=SFT(), teacher=None)
    # name: (what the error says, what is wrong on the last rank, what is given on all)
    cases = {
        "dtype": (disagree("weight"), wide(16, torch.float64) | none, sft),
        "hidden size": (disagree("weight") + ".*width 12, rank 0 .*width 16", wide(12), {}),
        "its shapes": (f"{at_fault}: student hidden must be", dict(hidden=torch.zeros(n, 15)), {}),
        "no tensor": (f"{at_fault}: labels must be int64", dict(labels=None), {}),
        "labels": (disagree("labels") + ".*other values", dict(labels=other), {}),
        "order of labels": (disagree("labels"), dict(labels=labels.flip(0)), {}),
        "fewer tokens": (
            disagree("hidden"), dict(hidden=torch.zeros(9, 16), labels=labels[:9]) | none, sft
        ),
        "temperature": (
            disagree("temperature") + " has 2.0, rank 0 1.0", dict(temperature=2.0), {}
        ),
        "logit scale": (disagree("logit_scale"), dict(logit_scale=2.0), {}),
        "soft cap": (disagree("softcap"), dict(softcap=30.0), {}),
        "objective": (disagree("objective"), dict(objective=OBJECTIVES["gkd"]), {}),
        "reduction": (disagree("reduction"), dict(reduction="sum"), {}),
        "ignore_index": (disagree("ignore_index"), dict(ignore_index=-1), {}),
        "normalizer": (disagree("normalizer"), dict(normalizer=3.0), {}),
        "workspace": (disagree("max_workspace_bytes"), dict(max_workspace_bytes=10**9), {}),
        "uniforms": (disagree("uniforms or seed"), dict(uniforms=torch.rand(n) / 2), {}),
        "seed": (disagree("uniforms or seed"), dict(seed=1), dict(uniforms=None, seed=0)),
        "token_weight": (disagree("token_weight"), dict(token_weight=torch.ones(n)), {}),
        "old_log_probs": (
            disagree("old_log_probs") + ".*other values", dict(old_log_probs=-torch.ones(n)),
            dict(old_log_probs=-2 * torch.ones(n)),
        ),
        "prefix": (
            disagree("teacher_prefix") + ".*other values",
            dict(teacher_prefix=torch.ones(n).bool()), dict(teacher_prefix=torch.zeros(n).bool()),
        ),
        "advantages": (disagree("advantages"), dict(advantages=torch.ones(n)), {}),
        "mixing": (
            disagree("mixing") + ".*other values", dict(mixing=torch.ones(n)),
            dict(objective=OBJECTIVES["mixed"], mixing=torch.zeros(n)),
        ),
        "blending": (
            disagree("blending") + ".*other values", dict(blending=torch.ones(n)),
            dict(objective=OBJECTIVES["veto"], blending=torch.zeros(n)),
        ),
        "task_advantages": (
            disagree("task_advantages") + ".*other values", dict(task_advantages=torch.ones(n)),
            dict(objective=TokenRule(task_weight=1.0), task_advantages=torch.zeros(n)),
        ),
        "bias": (disagree("bias"), dict(bias=mine(torch.zeros(37))), {}),
        "frozen": (disagree("requires_grad"), dict(hidden=torch.zeros(n, 16)), {}),
        "frozen, to recompute": (
            disagree("requires_grad"), dict(hidden=torch.zeros(n, 16)), dict(reduction="none"),
        ),
        "teacher's form": (disagree("the teacher's weight"), dict(teacher=top_k), {}),
        "teacher's ids": (
            disagree("the teacher's ids"),
            dict(teacher=TopKTeacher(top_k.ids.roll(1, 0), top_k.log_probs, top_k.label_log_probs)),
            dict(teacher=top_k),
        ),
        "teacher's width": (
            disagree("the teacher's weight") + ".*width 8",
            dict(teacher=HiddenTeacher(torch.zeros(n, 8), torch.zeros(10, 8))), {},
        ),
        # wrong on all ranks alike
        "a whole head on each": (
            f"begins the head .* of 37 ids on each of the {ranks} ranks", {},
            dict(weight=bare().weight.float()),
        ),
        "a teacher's whole head on each": (
            "begins the teacher's head .* of 41 ids", {},
            dict(teacher=bare().teacher("hidden", torch.float32)),
        ),
        "a teacher's whole logits on each": (
            "begins the teacher's head .* of 41 ids", {},
            dict(teacher=bare().teacher("logits", torch.float32)),
        ),
        "labels beyond the shards": (
            "label 37 lies outside the vocabulary of 37 ids.*ranks of process_group hold", {},
            dict(labels=labels.new_full((n,), 37)),
        ),
        "a rank with no id": (
            f"rank {ranks // 2} of {ranks} holds none of the .* ids that student and teacher", {},
            dict(teacher=LogitsTeacher(torch.zeros(n, 3))),
        ),
    }  # fmt: skip
    if not native.WHY_NOT:
        cases["backend"] = (disagree("backend"), dict(backend="native"), {})
        yield "threads", other_threads
    for name, (match, wrong, everywhere) in cases.items():
        yield name, partial(refused, match, everywhere=everywhere, **wrong)
    half, by_name = torch.zeros(n, 16).bfloat16(), dict(process_group="world")
    for match, kind, wrong, everywhere in (
        (f"{at_fault}: student hidden must be of a float", TypeError, dict(hidden=half.long()), {}),
        (disagree("hidden"), ValueError, dict(hidden=half), {}),
        (f"{at_fault}: objective must be", TypeError, dict(objective=3), {}),
        ("backend='reference' takes no", NotImplementedError, {}, dict(backend="reference")),
        ("process_group must be", TypeError, {}, by_name),
    ):
        yield match, partial(refused, match, kind, everywhere=everywhere, **wrong)
    yield "outside the group", partial(outside_the_group, ranks)
    yield "DTensors", dtensors


def outside_the_group(ranks):
    inside = list(range(1, ranks))
    group = dist.new_group(inside)
    problem = bare()
    if dist.get_rank() == 0:
        with pytest.raises(TypeError, match="outside it, new_group"):
            linear_distillation_loss(
                problem.hidden, problem.weight, problem.labels, None, SFT(), process_group=group
            )
        return
    bounds = ends(37, len(inside))
    at = inside.index(dist.get_rank())
    weight = problem.weight[bounds[at] : bounds[at + 1]]
    out = linear_distillation_loss(
        problem.hidden, weight, problem.labels, None, SFT(), process_group=group
    )
    whole = linear_distillation_loss(problem.hidden, problem.weight, problem.labels, None, SFT())
    assert relative_error(out.loss, whole.loss) < 1e-12


def dtensors():
    """A head that is a DTensor with Shard(0) brings its group; its gradient is one, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    problem = bare()
    teacher = problem.teacher("hidden", torch.float32)
    hidden = problem.hidden.float().requires_grad_()
    weight = problem.weight.float().requires_grad_()
    rule = OBJECTIVES["tropd_expected"]
    given = dict(labels=problem.labels, objective=rule)
    linear_distillation_loss(hidden, weight, teacher=teacher, **given).loss.backward()

    def cut(tensor, placement=None):
        return distribute_tensor(tensor.detach(), mesh, [placement or Shard(0)]).requires_grad_()

    ours, head = cut(hidden, Replicate()), cut(weight)
    theirs = HiddenTeacher(teacher.hidden, cut(teacher.weight).detach())
    linear_distillation_loss(ours, head, teacher=theirs, **given).loss.backward()
    assert relative_error(ours.grad.to_local(), hidden.grad) < FLOAT32
    assert relative_error(head.grad.full_tensor(), weight.grad) < FLOAT32
    with pytest.raises(ValueError, match="weight is a DTensor with placements"):
        linear_distillation_loss(hidden, cut(weight, Shard(1)), teacher=theirs, **given)
    with pytest.raises(ValueError, match="hidden is a DTensor with placements"):
        linear_distillation_loss(cut(hidden), head, teacher=theirs, **given)
    # One DTensor among plain tensors: torch would say to make all of them DTensors.
    labels = distribute_tensor(problem.labels, mesh, [Replicate()])
    uniforms = distribute_tensor(torch.rand(10), mesh, [Replicate()])
    told = problem.teacher("top_k", torch.float32)
    told = replace(told, label_log_probs=cut(told.label_log_probs, Replicate()).detach())
    for name, wrong in (
        ("hidden", dict(hidden=ours)),
        ("the teacher's weight", dict(teacher=theirs)),
        ("the teacher's logits", dict(teacher=LogitsTeacher(cut(torch.randn(10, 37)).detach()))),
        ("teacher label_log_probs", dict(teacher=told)),
        ("labels", dict(labels=labels)),
        ("labels", dict(labels=labels, weight=head, teacher=theirs)),
        ("uniforms", dict(uniforms=uniforms)),
    ):
        plain = dict(hidden=hidden, weight=weight, teacher=teacher) | given
        with pytest.raises(TypeError, match=f"{name} is a DTensor with placements"):
            linear_distillation_loss(**plain | wrong)
    with pytest.raises(TypeError, match="labels is a DTensor"):
        linear_log_probs(hidden, weight, labels)
