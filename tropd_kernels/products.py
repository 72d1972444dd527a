"""The three matrix products around the rows: logits, d_hidden, d_weight.

All of them multiply in the inputs' dtype and give float32 (float64 for float64 inputs): logits are
never rounded to bf16 on the way to the softmax, which alone would cost 4 to 65 % of the gradient
where student and teacher agree, and d_weight accumulates over chunks in float32.

On a GPU, cuBLAS does that for half-precision inputs (`out_dtype`). On a CPU no such kernel exists
in torch, so half-precision weights are upcast in tiles of `TILE_ROWS` rows that stay in the cache,
and the product is a float32 one. Where the CPU has AMX, oneDNN is told to multiply those float32
operands in bf16, which is exact for weights and hidden states that were bf16 to begin with.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor

#: Rows of the weight upcast at once on a CPU: 8 MiB at a width of 1024.
TILE_ROWS = 2048
HALF = (torch.bfloat16, torch.float16)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and accumulators for inputs of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def gradient_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which d_logits enters its two products."""
    return result_dtype(dtype) if device_type == "cpu" else dtype


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """out (n, V) = hidden (n, H) @ weight (V, H).T"""
    if not _upcasts(weight):
        return _mm(hidden, weight.t(), out)
    hidden = hidden.to(out.dtype)
    with _bf16_products(weight.dtype):
        for rows, tile in _tiles(weight, out.dtype):
            torch.mm(hidden, tile.t(), out=out[:, rows])
    return out


def d_hidden(d_logits: Tensor, weight: Tensor) -> Tensor:
    """d_logits (n, V) @ weight (V, H), in the accumulator's dtype."""
    if not _upcasts(weight):
        shape = (d_logits.shape[0], weight.shape[1])
        return _mm(d_logits, weight, weight.new_empty(shape, dtype=result_dtype(weight.dtype)))
    total = d_logits.new_zeros((d_logits.shape[0], weight.shape[1]))
    with _bf16_products(weight.dtype):
        for rows, tile in _tiles(weight, total.dtype):
            total.addmm_(d_logits[:, rows], tile)
    return total


def add_d_weight(total: Tensor, d_logits: Tensor, hidden: Tensor, first: bool) -> None:
    """total (V, H) += d_logits (n, V).T @ hidden (n, H); the first product overwrites."""
    if hidden.device.type == "cpu":
        with _bf16_products(hidden.dtype):
            total.addmm_(d_logits.t(), hidden.to(total.dtype), beta=0 if first else 1)
    elif first:
        _mm(d_logits.t(), hidden, total)
    elif hidden.dtype in HALF:
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(d_logits.t(), hidden)


def scratch_bytes(dtype: torch.dtype, device_type: str, rows: int, widths: list[int]) -> int:
    """What the products allocate besides their results, for heads of these widths."""
    size = result_dtype(dtype).itemsize
    tile = size * (TILE_ROWS + rows) * max(widths, default=0)
    return tile if device_type == "cpu" and dtype in HALF else 0


def _upcasts(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in HALF


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out=out)


def _tiles(weight: Tensor, dtype: torch.dtype):
    buffer = weight.new_empty((min(TILE_ROWS, weight.shape[0]), weight.shape[1]), dtype=dtype)
    for start in range(0, weight.shape[0], TILE_ROWS):
        rows = slice(start, min(start + TILE_ROWS, weight.shape[0]))
        tile = buffer[: rows.stop - start]
        tile.copy_(weight[rows])
        yield rows, tile


@contextmanager
def _bf16_products(dtype: torch.dtype):
    """oneDNN's bf16 compute mode for float32 products, where the inputs were bf16 and it pays."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
