"""Memory for a call's chunks and its unrounded d_weight on a CPU, kept between calls.

A fresh page costs a page fault and its zeroing: for hundreds of megabytes that takes longer than a
pass over them. So all threads touch the pages at once, and the block is kept for the next call,
marked so that the system may reclaim it when memory is short (MADV_FREE); until then it counts as
resident. Only the largest block so far is kept; `release()` drops it. On a GPU torch's allocator
does all this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

#: Smaller blocks come from memory that the C library keeps anyway.
SMALLEST = 2**25
#: Of tensors within a block, which itself lies as torch's allocator lays it.
ALIGNMENT = 64

_kept: list[Tensor] = []
_lock = threading.Lock()


class Arena:
    """Hands out tensors, one behind the other, from a block of bytes, or each of its own."""

    def __init__(self, block: Tensor | None):
        self.block, self.at = block, 0

    def empty(self, like: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.block is None:
            return like.new_empty(size, dtype=dtype)
        low, self.at = self.at, self.at + bytes_for(size, dtype)
        return self.block[low : low + prod(size) * dtype.itemsize].view(dtype).view(size)

    def drop(self, *tensors: Tensor | None) -> None:
        """Gives the pages of some of its tensors back for this call, with what they hold."""
        for tensor in tensors:
            if tensor is not None and self.block is not None:
                torch.ops.tropd_native.drop_pages(tensor)


def bytes_for(size: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a tensor takes up in an arena."""
    return -(-prod(size) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


@contextmanager
def arena(nbytes: int) -> Iterator[Arena]:
    """An arena of `nbytes` for the `native` backend, whose block the next call may use."""
    with _lock:
        block = _kept.pop() if _kept else None
    if block is None or block.numel() < nbytes:
        block = None  # before the new one takes its place
        with torch.inference_mode(False):  # or only inference could write to it
            block = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        torch.ops.tropd_native.make_pages(block)
    yield Arena(block)
    # Not where the call has failed: its error may hold views of the block.
    if torch.ops.tropd_native.may_be_reclaimed(block):
        with _lock:  # of calls in several threads the largest
            _kept[:] = [max([*_kept, block], key=Tensor.numel)]


def release() -> None:
    """Gives the kept block back to the system."""
    with _lock:
        _kept.clear()
