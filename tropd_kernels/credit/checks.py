"""Arguments: their type, shape, dtype and device, never a tensor's values."""

import torch
from torch import Tensor

LARGEST_RATE = 1e6  # far above any use, and finite in float32 after any multiplication
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def float_matrix(name: str, tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The argument, checked, detached, and in float32, or float64 if it came so."""
    _check_tensor(name, tensor, like)
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {tensor.dtype}: convert it with .float()"
        )
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def counted_tokens(mask: Tensor | None, like: Tensor) -> Tensor:
    """Which tokens count, as bool."""
    if mask is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    _check_tensor("mask", mask, like)
    if mask.dtype not in (torch.bool, *_INTEGERS):
        raise TypeError(
            f"mask must be bool or integer, got {mask.dtype}: a soft weight belongs in token_weight"
        )
    return mask != 0


def check_ids(name: str, ids: Tensor, like: Tensor | None, one_per: str) -> None:
    _check_tensor(name, ids, like)
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got {ids.dtype}: one id per {one_per}")


def check_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        given = type(value).__name__
        raise TypeError(
            f"{name} must be a number in [{low:g}, {high:g}], got {given}: pass a Python float"
        )
    if not low <= value <= high:  # written so that NaN fails
        raise ValueError(
            f"{name} must be in [{low:g}, {high:g}], got {value}: pass a number in that range"
        )


def check_length(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        raise TypeError(f"{name} must be an int number of tokens, got {kind}: pass e.g. 64")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 token, got {value}: pass e.g. 64")


def _check_tensor(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        given = type(tensor).__name__
        raise TypeError(
            f"{name} must be a tensor, got {given}: pass a torch.Tensor of shape (B, T)"
        )
    shape = tuple(tensor.shape)
    if len(shape) != 2:
        advice = "use unsqueeze(0)" if len(shape) == 1 else "pass one value per token"
        raise ValueError(f"{name} must have shape (B, T), got {shape}: {advice}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have the first argument's shape {tuple(like.shape)}, got {shape}: "
            "align both to the labels"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the first argument's device {like.device}, got {tensor.device}: "
            "move it with .to()"
        )
