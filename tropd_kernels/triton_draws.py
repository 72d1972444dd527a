"""The draws of `draws.py` by one kernel, for GPUs, where its tensor arithmetic would be some 300
launches before the first product of a call.

Triton has the same generator, by the same words (`tl.philox`), so the bits are those of `draws.py`
on any other device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import device_of
from .rows.triton_launch import FUSION_OFF

BLOCK = 512


@triton.jit
def draws_kernel(seed_ptr, step_ptr, ids_ptr, positions_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.load(ids_ptr + at, mask=at < n, other=0).to(tl.int64)
    position = tl.load(positions_ptr + at, mask=at < n, other=0).to(tl.int64)
    step = tl.zeros_like(position) + tl.load(step_ptr)
    first, second, third, _ = tl.philox(
        tl.load(seed_ptr), position.to(tl.uint32), sequence.to(tl.uint32),
        (sequence >> 32).to(tl.uint32), step.to(tl.uint32),
    )  # fmt: skip
    if out_ptr.dtype.element_ty == tl.float32:
        uniform = (first >> 8).to(tl.float32) * 2.0**-24
    else:
        bits = ((second >> 5).to(tl.int64) << 26) + (third >> 6).to(tl.int64)
        uniform = bits.to(tl.float64) * 2.0**-53
    tl.store(out_ptr + at, uniform, mask=at < n)


def uniforms(
    seed: Tensor,  # (), int64, on a CPU or the others' device, as step
    step: Tensor,
    sequence_ids: Tensor,  # (*), int64 or int32
    positions: Tensor,  # (*), broadcasts with sequence_ids
    dtype: torch.dtype,
) -> Tensor:
    """The draw of a gate in float32, that of a sampled gradient in float64."""
    ids, places = (t.contiguous() for t in torch.broadcast_tensors(sequence_ids, positions))
    out = torch.empty(ids.shape, dtype=dtype, device=ids.device)
    # A CPU's number is read without a wait; a copy of its tensor could not be in a CUDA graph.
    seed, step = (
        t if t.device == ids.device else t.new_full((), int(t), device=ids.device)
        for t in (seed, step)
    )
    n = out.numel()
    if n:
        with device_of(ids):
            grid = (triton.cdiv(n, BLOCK),)
            draws_kernel[grid](seed, step, ids, places, out, n, BLOCK=BLOCK, **FUSION_OFF)
    return out
