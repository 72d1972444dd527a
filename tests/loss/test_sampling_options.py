"""`gradient_tolerance` and `gradient_sampling` under torch.compile and opcheck; their errors."""

import math

import pytest
import torch
from flat import BOTH
from gradient_samples import (
    SAMPLES,
    SAMPLING,
    TOLERANCE,
    one_thread,  # noqa: F401
    peaked_problem,
)
from problems import make_problem
from test_compile import op_arguments

from tropd_kernels import GKD, HiddenTeacher, LinearDistillationLoss, linear_distillation_loss
from tropd_kernels.loss import ops
from tropd_kernels.loss.problem import NO_GRADIENTS, GradNeeds
from tropd_kernels.loss.sampling import GradientSampling, SamplingReport


@pytest.mark.parametrize("more", [(0.5, None), (0.0, 0.2)])
@pytest.mark.parametrize(
    "needs",
    [BOTH, GradNeeds(hidden=True), GradNeeds(weight=True, fp32_weight=True), NO_GRADIENTS],
)
def test_opcheck(needs, more, device):
    sampling = GradientSampling(*more, torch.tensor(4, device=device))
    arguments = op_arguments("torch", device, needs, sampling=sampling)
    torch.library.opcheck(ops.distill, arguments)
    report = ops.distill(*arguments)[-1]
    assert report.shape == ((2,) if needs.any else (0,))
    assert not needs.any or report[SamplingReport.SHARE] < 1


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
