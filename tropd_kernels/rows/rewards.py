"""Transforms of the reward in torch: twin of `triton_kernels/rewards.py`. The table that names them
is `objectives/rewards.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_shares(share: float) -> tuple[float, float]:
    """The logs of a share in (0, 1] and of what it leaves."""
    return math.log(share), math.log1p(-share) if share < 1 else -math.inf


def transformed(kind: str, parameter: float | None, lq: Tensor, lo: Tensor) -> Tensor:
    """T(lq - lo) (n,), from the token's log-probs under teacher and policy."""
    if kind in ("power", "proximal"):
        assert parameter is not None
        if kind == "power":
            return (parameter * lq).exp() - (parameter * lo).exp()
        # Not log(a exp(lq - lo) + 1 - a): at a = 1 this is lq - lo to the bit.
        log_a, log_rest = log_shares(parameter)
        return torch.logaddexp(lq + log_a, lo + log_rest) - lo
    ratio = lq - lo
    if kind == "log_ratio":
        return ratio
    if kind == "log1p":
        return torch.copysign(ratio.abs().log1p(), ratio)
    if kind == "tanh":
        assert parameter is not None
        return (ratio / parameter).tanh()
    if kind == "sign":
        return torch.where(ratio.isnan(), ratio, ratio.sign())
    raise NotImplementedError(f"reward={kind!r} has no formula in torch")
