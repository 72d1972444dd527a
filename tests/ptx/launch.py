"""Triton's launches on CPU tensors: compiled for a GPU, and run by this machine.

`install`, which conftest calls where TROPD_PTX is set, makes Triton believe in such a GPU, and the
package in Triton's kernels for CPU tensors.
"""

from __future__ import annotations

import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.cubins import TARGETS, FakeDriver
from tropd_kernels import backends

from .kernel import Kernel

_compile_only = JITFunction.run
_kernels: dict[str, Kernel] = {}


def install(target: str) -> None:
    driver.set_active(FakeDriver(TARGETS[target]))
    knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
    JITFunction.run = _run
    why_not = backends._why_not_triton
    backends._why_not_triton = lambda kind: None if kind == "cpu" else why_not(kind)


def _stop_at_ptx(backend=None, stages=None, *_):
    """Triton's hook around a compilation: without arguments it asks for a key of the cache and its
    hash. The machine code, which `test_ahead_of_time` makes, is an eighth of the time."""
    if stages is None:
        return "tests/ptx", "tests/ptx"
    stages["cubin"] = lambda ptx, metadata: b""


def _run(self, *args, grid, warmup, **options):
    compiled = _compile_only(self, *args, grid=grid, warmup=True, **options)
    if compiled.hash not in _kernels:
        _kernels[compiled.hash] = Kernel(compiled.asm["ptx"], compiled.metadata.shared)
    given = dict(zip(self.arg_names, args)) | options
    arguments = [
        given[name] for name, type_ in compiled.src.signature.items() if type_ != "constexpr"
    ]
    tensors = {name: a for name, a in given.items() if isinstance(a, torch.Tensor)}
    _kernels[compiled.hash].run(
        grid,
        [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments],
        [(*_extent(t), name) for name, t in tensors.items()],
    )
    return compiled


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte and past its last."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
