"""What sampled gradients take: no tensor of tokens times vocabulary, and the planned workspace."""

import pytest
import torch
from flat import flat_problem
from gradient_samples import (
    SAMPLING,
    TOLERANCE,
    one_thread,  # noqa: F401
)
from problems import make_problem
from watching import LargestTensor, ResidentPeak

from tropd_kernels import GKD, HiddenTeacher, buffers, linear_distillation_loss, native, plan_chunks
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss.loop import forward
from tropd_kernels.loss.problem import Side
from tropd_kernels.loss.sampling import GradientSampling, SamplingReport


@pytest.mark.parametrize("selects", [(0.3, None), (0.0, 0.2)])
def test_no_tensor_of_tokens_times_vocabulary(selects, monkeypatch):
    for name in ("MULTIPLE", "ROWS", "SUPER_ROWS"):
        monkeypatch.setattr(chunking, name, 16)
    monkeypatch.setattr("tropd_kernels.rows.torch_rows.BLOCK_ELEMENTS", {"cpu": 4 * 3001})
    tokens, v = 256, 3001
    problem = make_problem(tokens, v, width=4, teacher_width=4, spread=4)
    flat = flat_problem(
        Side(problem.hidden.float(), problem.weight.float()),
        Side(problem.teacher_hidden.float(), problem.teacher_weight.float()),
        problem.labels, GKD(), "torch", sampling=GradientSampling(*selects, torch.tensor(4)),
    )  # fmt: skip
    with LargestTensor() as seen:
        report = forward(flat).report
    assert 0 < report[SamplingReport.SHARE] < 0.5 and report[SamplingReport.ERROR] > 0
    assert seen.elements <= tokens * v / 16


@pytest.mark.slow
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
