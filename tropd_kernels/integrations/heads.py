"""A call in the forward of a model's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def in_head(
    linear: Any, hidden: Tensor, call: Callable[[Tensor, Tensor, Tensor | None], Any]
) -> Any:
    """call(hidden, weight, bias) within the forward of this linear layer.

    There FSDP has a head that is a unit of its own whole, and its hooks on what comes out gather it
    again for the backward: the call returns tensors, or a tuple or dict of them. The gradient is
    reduced as that of the layer's own product.
    """
    plain = vars(linear).get("forward")
    linear.forward = lambda hidden: call(hidden, linear.weight, linear.bias)
    try:
        return linear(hidden)
    finally:
        del linear.forward
        if plain is not None:
            linear.forward = plain
