"""Checks of an objective's arguments: each raises ValueError or TypeError naming the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    optional: bool = False,
) -> None:
    """A finite int or float in [low, high]; None too where it is optional."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not -math.inf < value < math.inf or not low <= value <= high:
        bounds = "finite" if (low, high) == (-math.inf, math.inf) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")
