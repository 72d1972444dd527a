"""One-line reprs for what holds tensors: dtype and shape in place of thousands of numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn


class Summarized:
    """For dataclasses (with repr=False): `Name(field=summary, ...)`, fields that are None left
    out."""

    def __repr__(self):
        given = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        parts = [f"{name}={summary(value)}" for name, value in given if value is not None]
        return f"{type(self).__name__}({', '.join(parts)})"


def summary(value: Any) -> str:
    """A tensor of one number as torch writes it, a larger one by dtype, shape and, unless it is the
    CPU, device; a module by its class; anything else by its repr."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    if not isinstance(value, Tensor) or value.dim() == 0:
        return repr(value)
    device = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{device}"
