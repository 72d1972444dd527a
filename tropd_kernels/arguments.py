"""Checks of the public functions' arguments, but for heads and teachers (see `teachers`)."""

from __future__ import annotations

from reprlib import repr as short  # a list of all labels would fill a screen
from typing import Any

import torch
from torch import Tensor

from .backends import has_row_engine
from .dtypes import FLOATS
from .objectives import TokenRule
from .symbolic import shown

REDUCTIONS = ("mean", "sum", "none")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, float) or is_int(value)


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be of a float dtype (float16, bfloat16, float32 or float64), got "
            f"{tensor.dtype}: cast it, or dequantise it"
        )


def check_dtype(name: str, dtype: Any) -> None:
    if dtype not in FLOATS:
        raise TypeError(
            f"{name} must be one of {', '.join(map(str, FLOATS))}, got {short(dtype)}: a quantised "
            "head has the dtype to which it is dequantised"
        )


def check_rule(rule: Any) -> None:
    if not isinstance(rule, TokenRule):
        raise TypeError(f"objective must be a TokenRule, such as TrOPD(); got {short(rule)}")


def check_call(
    student, labels, rule, temperature, ignore_index, reduction, max_workspace_bytes
) -> None:
    check_rule(rule)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or (
        labels.shape != student.shape[:-1]
    ):  # fmt: skip
        given = (
            f"{labels.dtype} {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else f"a {type(labels).__name__}"
        )
        as_long = getattr(labels, "shape", None) == student.shape[:-1]
        remedy = "shift them so that hidden[i] (or logits[i]) predicts labels[i]"
        raise (TypeError if as_long else ValueError)(
            f"labels must be int64 of shape {tuple(student.shape[:-1])}, got {given}: "
            + ("convert them with .long()" if as_long else remedy)
        )
    if not is_number(temperature) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {shown(temperature)}")
    if ignore_index is not None and not is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int or None, got {short(ignore_index)}")
    check_reduction(reduction)
    check_budget(max_workspace_bytes)


def check_reduction(reduction: Any) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}; got {short(reduction)}"
        )


def check_budget(max_workspace_bytes: Any) -> None:
    if max_workspace_bytes is not None and not (
        is_int(max_workspace_bytes) and max_workspace_bytes > 0
    ):
        raise ValueError(
            f"max_workspace_bytes must be a positive int or None, got {short(max_workspace_bytes)}"
        )


def check_sampling(tolerance, sampling, reduction: str, backend: str | None, seed) -> None:
    if not is_number(tolerance) or not 0 <= tolerance < 1:
        raise ValueError(
            f"gradient_tolerance must be a number in [0, 1), got {shown(tolerance)}: the standard "
            "deviation of the gradient relative to its norm, 0 for an exact one"
        )
    if sampling is not None and (not is_number(sampling) or not 0 < sampling <= 1):
        raise ValueError(
            f"gradient_sampling must be None or a number in (0, 1], got {shown(sampling)}: the "
            "share of the vocabulary's ids that make the gradient, on average"
        )
    if tolerance > 0 and sampling is not None:
        raise ValueError(
            f"gradient_tolerance={shown(tolerance)} and gradient_sampling={shown(sampling)} both "
            "say how many ids make the gradient: pass one of them"
        )
    if not tolerance and sampling is None:
        return
    name = "gradient_sampling" if sampling is not None else "gradient_tolerance"
    if reduction == "none":
        raise NotImplementedError(
            f"{name} needs gradients that are formed in the forward, and reduction='none' "
            "recomputes them for any incoming gradient: use 'mean' or 'sum'"
        )
    if not has_row_engine(backend):
        raise NotImplementedError(
            f"backend='reference' takes no {name}: use 'torch', 'native' or 'triton'"
        )
    if seed is None:
        raise ValueError(f"{name} draws at random: pass seed=<an integer that changes every step>")


def flat_per_token(name: str, value: Tensor | None, labels: Tensor) -> Tensor | None:
    """Flat and detached, after a look at shape and dtype."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != labels.shape:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be a tensor of the labels' shape {tuple(labels.shape)}, got {given}"
        )
    if name == "teacher_prefix":
        if value.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {value.dtype}: pass {name}.bool()")
    elif not value.is_floating_point():
        raise TypeError(f"{name} must be of a float dtype, got {value.dtype}: pass {name}.float()")
    elif value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the loss treats it as a constant (K1 back-propagated "
            "directly would never see the teacher): pass it detached"
        )
    return value.reshape(-1)


def check_devices(student: Tensor, tensors: dict) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != student.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the student on {student.device}: move it there"
            )
