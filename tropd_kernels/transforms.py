"""Which of torch.func's transforms work, and errors for those that do not.

grad, vjp, jacrev       work; a batch of incoming gradients is computed one after the other
vmap                    refused if a tensor of the loss is batched: the loop over tokens reads
                        values, and is already one batch
jvp, jacfwd, hessian    refused: the fused loss has one derivative, computed by its backward
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether some transform is at work."""
    return _functorch.maybe_current_level() is not None


def check_none(what: str) -> None:
    """Raises NotImplementedError inside a transform, for what exchanges tensors with ranks."""
    if not torch.compiler.is_compiling() and active():
        raise NotImplementedError(
            f"{what} inside a torch.func transform (grad, vjp, vmap, jvp): ranks cannot exchange "
            "the tensors that those wrap; call it outside, and use autograd (backward, "
            "torch.autograd.grad)"
        )


def wrapped(tensor: Tensor) -> bool:
    """Whether a transform stands around this tensor, whose own memory it then has not."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def batched(tensor: Any) -> bool:
    """Whether vmap runs over this tensor, on any level."""
    if isinstance(tensor, Tensor) and _functorch.is_legacy_batchedtensor(tensor):
        return True  # is_grads_batched=True, vectorize=True
    while isinstance(tensor, Tensor) and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def check_unbatched(tensors: dict[str, Any]) -> None:
    """Raises NotImplementedError for a tensor over which vmap runs, naming it."""
    if torch.compiler.is_compiling() or not active():
        return
    for name, tensor in tensors.items():
        if batched(tensor):
            raise NotImplementedError(
                f"{name} is batched by torch.vmap, over which no loss of this package runs: hidden "
                "may have any leading dimensions, so pass the whole batch, with reduction='none' "
                "for a loss of each token; for several heads loop over them"
            )


def check_tangents(*tensors: Tensor | None) -> None:
    """Raises NotImplementedError for a tensor that is differentiated forward."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise_forward_mode()


def raise_forward_mode(*_: Any) -> Any:
    raise NotImplementedError(
        "forward-mode differentiation (torch.func.jvp, jacfwd, hessian; forward_ad) of a fused "
        "loss, which has only a backward: use that, or backend='reference'"
    )
