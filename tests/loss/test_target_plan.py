"""What a target and a reference teacher cost: what the plan says, and nothing of (tokens, V)."""

import pytest
import torch
from watching import ResidentPeak

from tropd_kernels import (
    GKD,
    ExOPD,
    HiddenTeacher,
    LogitsTeacher,
    Veto,
    buffers,
    linear_distillation_loss,
    plan_chunks,
)

RULE = ExOPD(extrapolation=1.25)
VETO = Veto(student_power=0.5)


def planned(rule=RULE, teacher=32, reference=16, **more):
    given = dict(dtype=torch.float32, device="cpu", backend="torch", objective=rule)
    return plan_chunks(1000, 5000, 64, teacher, reference_hidden_size=reference, **(given | more))


def test_the_plan_counts_a_third_product_and_its_logits():
    plan, plain = planned(), planned(GKD(), reference=None)
    assert (plan.student_gemms, plan.teacher_gemms, plan.reference_gemms) == (3, 1, 1)
    assert plan.gemm_flop == 2 * 1000 * 5000 * (3 * 64 + 32 + 16)
    assert "3 S + 1 T + 1 T' = " in repr(plan) and "T'" not in repr(plain)
    assert plan.workspace["reference logits"] == plan.workspace["teacher logits"] > 0
    assert plain.workspace["reference logits"] == 0
    work = {each.name: each for each in plan.work}
    chunks = work["student logits"].launches
    assert work["reference logits"].flop == 2 * 1000 * 5000 * 16
    assert work["reference logits"].launches == work["target"].launches == chunks
    assert work["target"].bytes == 4 * 1000 * 5000 * 3  # teacher and reference read, target written
    recomputed = planned(reduction="none")
    assert (recomputed.teacher_gemms, recomputed.reference_gemms) == (2, 2)
    copied = planned(dtype=torch.bfloat16, reference_weight_dtype=torch.float32)
    assert {"copy of the reference's head"} == {
        each.name for each in copied.work if each.name.startswith("copy")
    }


def test_a_target_of_given_logits_has_a_buffer():
    """A LogitsTeacher's logits are the caller's, so the target needs room of ours."""
    plan, plain = planned(VETO, None, None), planned(GKD(), None, None)
    assert plan.workspace["teacher logits"] == plan.workspace["student logits"]
    assert plain.workspace["teacher logits"] == 0
    assert "target" not in {each.name for each in plain.work}


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_width_that_no_teacher_has(size):
    with pytest.raises(ValueError, match="reference_hidden_size must be an int, at least 1"):
        planned(reference=size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's engine")
@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("blended", [False, True])
def test_workspace_is_what_the_plan_says(form, blended):
    """As `test_memory` has it of other calls: at most a tenth over the plan's figure."""
    tokens, v, h, g = 512, 50_000, 64, 64
    draw = torch.randn(tokens, h), torch.randn(v, h) * 3 / h**0.5
    hidden, weight = (t.bfloat16().requires_grad_() for t in draw)
    teachers = []
    for _ in range(2):
        states, head = torch.randn(tokens, g), torch.randn(v, g) * 3 / g**0.5
        if form == "hidden":
            teachers.append(HiddenTeacher(states.bfloat16(), head.bfloat16()))
        else:
            teachers.append(LogitsTeacher((states @ head.T).bfloat16()))
    labels = torch.randint(v, (tokens,))
    blending = torch.rand(tokens) if blended else None

    def run():
        linear_distillation_loss(
            hidden, weight, labels, teachers[0], RULE, reference_teacher=teachers[1],
            backend="torch", blending=blending,
        ).loss.backward()  # fmt: skip
        hidden.grad = weight.grad = None

    run()  # libraries allocate their own buffers once
    buffers.release()
    with ResidentPeak() as peak:
        run()
    width = g if form == "hidden" else None
    plan = plan_chunks(
        tokens, v, h, width, device="cpu", backend="torch", objective=RULE,
        reference_hidden_size=width,
    )  # fmt: skip
    used = peak.delta - sum(2 * t.numel() for t in (hidden, weight))
    assert 0.5 * plan.workspace_bytes <= used <= 1.1 * plan.workspace_bytes, (
        f"{used / 1e6:.0f}\n{plan}"
    )
