"""What a REPL shows of an output, a teacher, a head or a plan: a summary, not its tensors."""

import torch
from torch import nn

from tropd_kernels import (
    HiddenTeacher,
    LogitsTeacher,
    SampledTeacher,
    TopKTeacher,
    TrOPD,
    linear_distillation_loss,
    plan_chunks,
)
from tropd_kernels.heads import Head

HIDDEN, WEIGHT = torch.zeros(2, 300, 8).bfloat16(), torch.zeros(5000, 8).bfloat16()
LABELS = torch.zeros(2, 300, dtype=torch.int64)


def test_teachers():
    teacher = HiddenTeacher(HIDDEN, WEIGHT, softcap=30.0)
    assert repr(teacher) == (
        "HiddenTeacher(hidden=bfloat16 (2, 300, 8), weight=bfloat16 (5000, 8), logit_scale=1.0, "
        "softcap=30.0)"
    )
    assert repr(LogitsTeacher(WEIGHT)) == "LogitsTeacher(logits=bfloat16 (5000, 8))"
    assert repr(SampledTeacher(WEIGHT[:, 0])) == (
        "SampledTeacher(label_log_probs=bfloat16 (5000,))"
    )
    given = TopKTeacher(LABELS.long(), LABELS.float(), LABELS[:, 0].float().to("meta"))
    assert repr(given) == (
        "TopKTeacher(ids=int64 (2, 300), log_probs=float32 (2, 300), label_log_probs="
        "float32 (2,) on meta)"
    )


def test_outputs():
    teacher = SampledTeacher(torch.full(LABELS.shape, -1.0))
    out = linear_distillation_loss(HIDDEN, WEIGHT, LABELS, teacher, TrOPD(outlier="mask"), seed=0)
    assert repr(out).startswith(f"DistillationOutput(loss={out.loss!r}, stats=TokenStats(log_probs")
    assert "kept=float32 (2, 300)" in repr(out) and "reverse_kl" not in repr(out)
    assert len(repr(out)) < 800 and "\n" not in repr(out)


def test_heads():
    head = Head(nn.Sequential(nn.Linear(3, 3)), WEIGHT, None, 1.0, None, 5000)
    expected = "Head(backbone=Sequential, weight=bfloat16 (5000, 8), logit_scale=1.0, "
    assert repr(head) == expected + "vocab_size=5000)"


def test_plans():
    plan = plan_chunks(1000, 5000, 64, backend="torch", device="cpu")
    assert repr(plan) == str(plan)
    assert repr(plan).startswith("1000 tokens, vocabulary 5000\n") and "workspace" in repr(plan)
