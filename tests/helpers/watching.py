"""What a call allocates: its largest tensor, those of one shape, and the resident memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


class Made(TorchDispatchMode):
    """Operators that have given a tensor of this shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.operators = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.operators.append(str(function))
        return result


def give_back_what_is_freed() -> None:
    """From now on glibc takes larger blocks from the system, and gives them back at once. By itself
    it raises the bound up to 32 MB; smaller blocks then stay resident or not, as they happen to
    lie."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        m_mmap_threshold = -3
        library.mallopt(m_mmap_threshold, 2**17)


class ResidentPeak:
    """Highest resident memory of this process while it is open, over the memory at its start."""

    def __enter__(self):
        gc.collect()
        give_back_what_is_freed()
        self.open, self.highest = True, 0
        self.start = self.now()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.open = False
        self.thread.join()
        self.delta = self.highest - self.start

    def watch(self):
        while self.open:
            self.highest = max(self.highest, self.now())
            time.sleep(0.0005)

    @staticmethod
    def now() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * mmap.PAGESIZE
