"""README.md's first example, run as it stands, with models as a user loads them: both require
grad."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

README = Path(__file__).parents[2] / "README.md"
V, H, G = 300, 16, 24


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lm_head = nn.Linear(width, V, bias=False)


def run(dtype=None):
    student, teacher = Model(H), Model(G)
    names = SimpleNamespace(
        student=student, teacher=teacher, step=1,
        hidden=torch.randn(2, 5, H, dtype=dtype, requires_grad=True),
        teacher_hidden=torch.randn(2, 5, G), labels=torch.randint(V, (2, 5)),
    )  # fmt: skip
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    if dtype is not None:
        example = example.replace(
            "student.lm_head.weight", "student.lm_head.weight.to(hidden.dtype)"
        )
    exec(example, vars(names))
    return names


def test_the_first_example():
    names = run()
    assert names.hidden.grad.norm() > 0 and names.student.lm_head.weight.grad.norm() > 0
    assert names.teacher.lm_head.weight.grad is None


def test_it_under_autocast():
    """What the lines below it say: hidden states come in bf16, the head stays in float32."""
    names = run(torch.bfloat16)
    assert names.hidden.grad.dtype == torch.bfloat16
    assert names.student.lm_head.weight.grad.dtype == torch.float32
    assert names.student.lm_head.weight.grad.norm() > 0
