"""How large the checks are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: {what: (value, the most that it may be)}
Figures = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Sizes:
    """rows: of logits, as many as one program takes alone and as few as several share; twin_rows:
    of them, those whose twin is computed in float64."""

    even: int
    odd: int
    rows: tuple[int, ...]
    twin_rows: int
    tokens: int
    hidden: int
    teacher_hidden: int
    dtype: torch.dtype

    def vocab(self, parity: str) -> int:
        return self.even if parity == "even" else self.odd


FULL = Sizes(151_936, 50_257, (1024, 16), 16, 300, 256, 384, torch.bfloat16)
TINY = Sizes(320, 257, (4,), 4, 12, 16, 24, torch.float32)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """NaN where either has one."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())
