"""A gradient times a factor that only the GPU knows, by one kernel.

As many programs as fill a GPU share the tensor; each of them reads the factor first, and where the
result takes the gradient's own memory and the factor is 1, nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import device_of
from ..rows.triton_launch import FUSION_OFF, PROGRAMS

BLOCK = 4096


@triton.jit
def scale_kernel(
    gradient, factor, out, n, step, ACC: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    by = tl.load(factor).to(ACC)
    if IN_PLACE:
        n = tl.where(by == 1, 0, n)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < n).to(ACC) * by
        tl.store(out + at, value, mask=at < n)


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """Writes gradient * factor, both contiguous, into `out`, which may be `gradient` itself.
    factor: (), on their device."""
    n = gradient.numel()
    if n == 0:
        return
    wide = torch.float64 in (gradient.dtype, factor.dtype)
    programs = min(PROGRAMS, triton.cdiv(n, BLOCK))
    with device_of(gradient):
        scale_kernel[(programs,)](
            gradient, factor, out, n, programs * BLOCK, ACC=tl.float64 if wide else tl.float32,
            IN_PLACE=out.data_ptr() == gradient.data_ptr(), BLOCK=BLOCK, num_warps=8, **FUSION_OFF,
        )  # fmt: skip
