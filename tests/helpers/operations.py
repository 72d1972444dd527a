"""What a call would launch on a GPU, counted without one.

The package's functions run on meta tensors, which have shapes, strides and dtypes but no memory,
and take every branch that they would take on a GPU. A dispatch mode sees each operation of torch
beneath autograd; each kernel of Triton that would be launched is noted, and nothing runs.

Counted is what gives a GPU something to do: not a view, not memory that is left as it is, not an
operation on no element. An operation of torch counts as one, also where it takes several kernels (a
sort).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

#: What leaves memory as it is, and is no view by its schema.
IDLE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class _TorchOperations(TorchDispatchMode):
    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        name = func._schema.name.split("::")[1]
        if not _is_view(func) and name not in IDLE and any(t.numel() for t in made):
            self.found[name] += 1
        return result


def _is_view(func) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@contextmanager
def counted() -> Iterator[Counter]:
    """Within, operations of torch and kernels of Triton by name. The kernels do not run."""
    found: Counter = Counter()

    def launcher(kernel, grid):
        return lambda *args, **kwargs: found.update([kernel.__name__])

    with mock.patch.object(KernelInterface, "__getitem__", launcher), _TorchOperations(found):
        yield found
