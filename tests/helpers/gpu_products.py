"""A GPU's products and plan on a CPU: `torch.mm` and `torch.addmm` of half precision as a GPU has
them, and the loop as it runs there, over the CPU's row engines."""

import torch

from tropd_kernels.dtypes import HALF
from tropd_kernels.loss import plan as chunking
from tropd_kernels.loss.plan import plan_chunks
from tropd_kernels.products import TorchProducts, adds_to_wide_sums

whole_mm, whole_addmm = torch.mm, torch.addmm


def mm(a, b, *, out_dtype=None, out=None):
    if a.dtype not in HALF:
        return whole_mm(a, b, out=out)
    assert out_dtype in (None, a.dtype, torch.float32)
    made = whole_mm(a.float(), b.float()).to(out_dtype or a.dtype)
    assert out is None or out.dtype == made.dtype
    return made if out is None else out.copy_(made)


def addmm(sums, a, b, *, out_dtype=None, out=None, **more):
    if out_dtype is None:
        return whole_addmm(sums, a, b, out=out, **more)
    made = sums + whole_mm(a.float(), b.float())
    return made if out is None else out.copy_(made)


def on_gpu(monkeypatch, multiple: int = 8, rows: int = 8, columns: int = 304) -> None:
    """CPU tensors go the way of a GPU's. Chunks of `rows` tokens of float32 logits of so many
    columns, and super-chunks of twice as many."""
    adds_to_wide_sums.cache_clear()
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)

    def products_for(engine, dtype, device_type):
        return TorchProducts(dtype, "cuda")

    for module in ("loop", "logits", "plan"):
        monkeypatch.setattr(f"tropd_kernels.loss.{module}.products_for", products_for)
    monkeypatch.setattr(
        "tropd_kernels.loss.loop.plan_chunks",
        lambda *a, **k: plan_chunks(*a, **k | {"device": "cuda"}),
    )
    monkeypatch.setattr(chunking, "MULTIPLE", multiple)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 4 * rows * columns)
