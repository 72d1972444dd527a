"""Numbers whose values torch.compile does not know while it traces a call.

From the second value of an option on, or at once with `dynamic=True`, a Python float is a symbol in
the graph, and one graph serves all values. But a custom op takes floats as constants only: each
value would need a graph of its own, and the ninth would be refused. So the op takes a CPU tensor,
which may hold any value and is read without waiting for a GPU. torch traces a multiplication into
such a tensor; torch.full and torch.tensor would make the number a constant again.

Checks compare such numbers. Each comparison becomes a guard of the graph; a value that breaks it
raises as it would without a compiler. math.isfinite cannot be traced, and a symbol is assumed to be
finite, so the op checks that when it reads the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor


def symbols_of(numbers: Sequence[float]) -> Tensor | None:
    """The numbers as a tensor where some of them are symbols, else None."""
    if not torch.compiler.is_compiling():
        return None
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if all(map(has_static_value, numbers)):
        return None
    return torch.stack([as_tensor(number) for number in numbers])


def values_of(symbols: Tensor, names: Sequence[str]) -> list[float]:
    """The numbers in the tensor. Raises ValueError for one that is not finite, by its name."""
    values = symbols.tolist()
    for name, value in zip(names, values, strict=True):
        if not isfinite(value):
            raise ValueError(f"{name} must be finite, got {value} in a compiled call")
    return values


def shown(value: Any) -> str:
    """A short repr, of a symbol's value."""
    if torch.compiler.is_compiling() and isinstance(value, float):
        return f"{float.fromhex(value.hex())!r}"  # which makes it a constant
    return short(value)


def as_tensor(
    number: float, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """A 0-d tensor with this value, which need not be known."""
    return torch.ones((), dtype=dtype, device=device) * number
