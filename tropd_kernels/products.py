"""The three matrix products around the rows: logits, d_hidden, d_weight.

All of them multiply in the inputs' dtype and return float32 (float64 for float64 inputs). Logits
are never rounded to bf16 before the softmax: that alone would cost 4 to 65 % of the gradient where
student and teacher agree. d_weight accumulates over chunks in float32.

On a GPU, cuBLAS does this for half-precision inputs (`out_dtype`). If one product computes all of
d_weight in bfloat16, it rounds only when it stores; by default torch lets cuBLAS round partial sums
as well.

On a CPU torch has no such kernel. If `csrc/` is built, we use our own bf16 GEMM: `NativeProducts`
on CPUs with AMX or AVX512-BF16, and `NativeFloatProducts` on CPUs with AVX2 only, which upcasts
bf16 to float32 on its way into the cache. Otherwise half-precision weights are upcast in tiles of
`TILE_ROWS` rows that stay in the cache, for a float32 GEMM. CPUs with bf16 instructions use them
for these float32 operands too (oneDNN's bf16 mode), which is exact, since weights and hidden states
were bf16 to begin with.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native
from .dtypes import HALF, TILE_ROWS, result_dtype
from .rows.engine import RowEngine

#: Elements of which a padded row has a multiple.
ROW_MULTIPLE = 16


def products_for(engine: RowEngine, dtype: torch.dtype, device_type: str) -> TorchProducts:
    """The products that serve this row engine and inputs of this dtype."""
    here = engine.native_products and device_type == "cpu" and dtype == torch.bfloat16
    if not here or not native.BF16_PRODUCTS:
        return TorchProducts(dtype, device_type, pads_rows=engine.pads_rows)
    in_float32 = native.BF16_PRODUCTS[0] == "AVX2"
    return (NativeFloatProducts if in_float32 else NativeProducts)(dtype, device_type)


class TorchProducts:
    """Products by torch.

    gradient_dtype: in which d_logits enters its two products. rounds_d_weight: `d_weight` can round
    to the weight's dtype as it stores, so that one product of all tokens needs no accumulator.
    rounds_sums: it can so also where it adds to an accumulator, so that the last of several
    products leaves no pass over it. rounds_d_hidden: `d_hidden` can round to the inputs' dtype as
    it stores.
    """

    rounds_sums = rounds_d_hidden = False

    def __init__(self, dtype: torch.dtype, device_type: str, pads_rows: bool = False):
        self.dtype, self.on_cpu = dtype, device_type == "cpu"
        self.pads_rows = pads_rows or not self.on_cpu
        self.result_dtype = result_dtype(dtype)
        self.gradient_dtype = self.result_dtype if self.on_cpu else dtype
        self.upcasts = self.on_cpu and dtype in HALF
        # Not float16, whose gradient waits in float32 for a loss scale.
        self.rounds_d_weight = self.rounds_d_hidden = not self.on_cpu and dtype == torch.bfloat16

    def row_stride(self, columns: int) -> int:
        """Of logits and d_logits with so many columns, in elements. On a GPU products read by 16
        bytes where rows begin at multiples of that, as statistics and sums do in tiles that end
        within a row; where they begin anywhere, number by number."""
        return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE if self.pads_rows else columns

    def logits_into(self, out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        """out (n, V) = hidden (n, H) @ weight (V, H).T"""
        if not self.upcasts:
            return self._mm(hidden, weight.t(), out)
        hidden = hidden.to(out.dtype)
        with _bf16_products(self.dtype):
            for rows, tile in _tiles(weight, out.dtype):
                torch.mm(hidden, tile.t(), out=out[:, rows])
        return out

    def d_hidden_into(self, out: Tensor, d_logits: Tensor, weight: Tensor) -> None:
        """out (n, H) = d_logits (n, V) @ weight (V, H), where `rounds_d_hidden`."""
        with _UNROUNDED_PARTS.held():
            torch.mm(d_logits, weight, out=out)

    def d_hidden(self, d_logits: Tensor, weight: Tensor) -> Tensor:
        """The same, in the accumulator's dtype."""
        shape = (d_logits.shape[0], weight.shape[1])
        if not self.on_cpu:
            return self._mm(d_logits, weight, weight.new_empty(shape, dtype=self.result_dtype))
        # Tiles have sums of their own also where nothing is upcast: some libraries would add
        # 150,000 float32 terms one by one, at a cost of 5e-5 in a softmax's d_hidden.
        total = d_logits.new_zeros(shape)
        with _bf16_products(self.dtype):
            for rows, tile in _tiles(weight, total.dtype):
                total += d_logits[:, rows] @ tile
        return total

    def d_weight(self, out: Tensor, d_logits: Tensor, hidden: Tensor, sums: Tensor | None) -> None:
        """out (V, H) = [sums +] d_logits (n, V).T @ hidden (n, H). `sums` is `out` itself or None.
        `out` may have the weight's dtype where `rounds_d_weight` and `sums` is None, or where
        `rounds_sums`."""
        if self.on_cpu:
            with _bf16_products(self.dtype):
                out.addmm_(d_logits.t(), hidden.to(out.dtype), beta=0 if sums is None else 1)
        elif out.dtype == hidden.dtype == torch.bfloat16:
            with _UNROUNDED_PARTS.held():
                torch.mm(d_logits.t(), hidden, out=out)
        elif sums is None:
            self._mm(d_logits.t(), hidden, out)
        elif hidden.dtype in HALF:
            self._add(d_logits, hidden, out)
        else:
            out.addmm_(d_logits.t(), hidden)

    def scratch_bytes(self, rows: int, super_rows: int, widths: list[int]) -> int:
        """What the products allocate besides their results, for heads of these widths."""
        size = self.result_dtype.itemsize
        if not self.on_cpu:
            return 0
        return size * ((TILE_ROWS if self.upcasts else 0) + rows) * max(widths, default=0)

    def sums_bytes(self, width: int) -> int:
        """What `d_weight` allocates where it adds to sums of this width and torch refuses to."""
        if self.on_cpu or self.dtype not in HALF:
            return 0
        return self.result_dtype.itemsize * TILE_ROWS * width

    def _add(self, d_logits: Tensor, hidden: Tensor, sums: Tensor) -> None:
        """sums (V, H) += d_logits (n, V).T @ hidden (n, H), which are in half precision."""
        if adds_to_wide_sums(sums.device, hidden.dtype):
            with _wide_sums(hidden.dtype):
                torch.addmm(sums, d_logits.t(), hidden, out_dtype=sums.dtype, out=sums)
            return
        tile = sums.new_empty((min(TILE_ROWS, len(sums)), hidden.shape[1]))
        for low in range(0, len(sums), TILE_ROWS):
            rows = slice(low, min(low + TILE_ROWS, len(sums)))
            sums[rows] += self._mm(d_logits[:, rows].t(), hidden, tile[: rows.stop - low])

    def _mm(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if a.dtype in HALF:
            with _wide_sums(a.dtype):
                return torch.mm(a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out=out)


class NativeProducts(TorchProducts):
    """Products of bfloat16 by `csrc/gemm_*.cpp`, on units that multiply it."""

    rounds_sums = True

    def __init__(self, dtype: torch.dtype, device_type: str):
        super().__init__(dtype, device_type)
        self.gradient_dtype, self.rounds_d_weight = dtype, True

    def logits_into(self, out, hidden, weight):
        hidden, weight = native.row_contiguous(hidden), native.row_contiguous(weight)
        torch.ops.tropd_native.gemm_nt(hidden, weight, out)
        return out

    def d_hidden(self, d_logits, weight):
        out = d_logits.new_empty((d_logits.shape[0], weight.shape[1]), dtype=self.result_dtype)
        torch.ops.tropd_native.gemm_nn(d_logits, native.row_contiguous(weight), out)
        return out

    def d_weight(self, out, d_logits, hidden, sums):
        add = sums is out
        hidden = native.row_contiguous(hidden)
        torch.ops.tropd_native.gemm_tn(d_logits, hidden, out, add, None if add else sums)

    def scratch_bytes(self, rows, super_rows, widths):
        # On every thread a block of packed rows; for all of them hidden states or d_hidden's sums.
        return torch.get_num_threads() * 2**20 + 6 * super_rows * max(widths, default=0)


class NativeFloatProducts(NativeProducts):
    """Products of bfloat16 inputs by `csrc/gemm_avx2.cpp`, in float32. d_logits stays in float32:
    nothing would be faster for its rounding."""

    def __init__(self, dtype: torch.dtype, device_type: str):
        super().__init__(dtype, device_type)
        self.gradient_dtype = self.result_dtype

    def scratch_bytes(self, rows, super_rows, widths):
        # As float32, hidden states or d_hidden's sums, and 256 ids of d_logits and of the head. On
        # every thread 96 rows of 256 steps, or 128, and their sums.
        widest = max(widths, default=0)
        shared = 4 * super_rows * widest + 4 * 256 * (super_rows + widest)
        each = max(4 * 128 * (256 + min(rows, 510)), 4 * 96 * (256 + widest))
        return shared + torch.get_num_threads() * each


@cache
def adds_to_wide_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of half precision to float32 sums on this GPU: older versions
    refuse `out_dtype` there, and so may other vendors' libraries. Asked once of each device."""
    factor = torch.zeros((ROW_MULTIPLE, ROW_MULTIPLE), dtype=dtype, device=device)
    sums = torch.zeros_like(factor, dtype=result_dtype(dtype))
    try:
        with _wide_sums(dtype):
            torch.addmm(sums, factor, factor, out_dtype=sums.dtype, out=sums)
    except (RuntimeError, TypeError) as error:
        if _says_nothing_of_products(error):
            raise
        return False
    return True


def _says_nothing_of_products(error: Exception) -> bool:
    """Of a device that is full, busy or lost, whichever product was asked for."""
    words = str(error)
    lost = "CUDA error" in words or "HIP error" in words
    full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in words
    return full or (lost and "NOT_SUPPORTED" not in words)


def _tiles(weight: Tensor, dtype: torch.dtype):
    """(rows, weight[rows] in dtype); one buffer serves them all."""
    same = weight.dtype == dtype
    height = min(TILE_ROWS, weight.shape[0])
    buffer = None if same else weight.new_empty((height, weight.shape[1]), dtype=dtype)
    for start in range(0, weight.shape[0], TILE_ROWS):
        rows = slice(start, min(start + TILE_ROWS, weight.shape[0]))
        tile = weight[rows] if same else buffer[: rows.stop - start].copy_(weight[rows])
        yield rows, tile


def bf16_in_hardware() -> bool:
    """The CPU multiplies bf16, which TROPD_CPU leaves in use, and oneDNN uses that for float32
    operands when told to."""
    avx512 = native.may_use("avx512") and torch.cpu._is_avx512_bf16_supported()
    return avx512 or native.amx_in_hardware()


class _Setting:
    """A setting of the process that products need. The first of several threads in a product sets
    it, and the last one sets it back: if each kept what it had found, one that came second would
    leave it set for every product of the process."""

    def __init__(self, owner: Any, name: str, value: Any):
        self.owner, self.name, self.value = owner, name, value
        self.lock, self.products, self.before = threading.Lock(), 0, None

    @contextmanager
    def held(self):
        with self.lock:
            if self.products == 0:
                self.before = getattr(self.owner, self.name)
                self._set(self.value)
            self.products += 1
        try:
            yield
        finally:
            with self.lock:
                self.products -= 1
                if self.products == 0:
                    self._set(self.before)

    def _set(self, value: Any) -> None:
        # One that holds already is left alone: writing may reset what comes with it, as
        # `allow_bf16_reduced_precision_reduction` does with its split-K switch.
        if getattr(self.owner, self.name) != value:
            setattr(self.owner, self.name, value)


#: oneDNN's compute mode for float32 products.
_BF16_MODE = _Setting(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")  # type: ignore[attr-defined]
#: A caller may let a GPU sum float16 products in float16; torch then refuses float32 results.
_WIDE_SUMS = _Setting(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
#: By default torch lets a GPU round the partial sums of a bfloat16 product that it has split.
_UNROUNDED_PARTS = _Setting(
    torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
)


def _wide_sums(dtype: torch.dtype):
    """Sums in float32 of products that are to give float32."""
    return _WIDE_SUMS.held() if dtype == torch.float16 else nullcontext()


def _bf16_products(dtype: torch.dtype):
    """oneDNN's bf16 compute mode for float32 products, where the inputs were bf16 and it pays."""
    pays = dtype == torch.bfloat16 and bf16_in_hardware()
    return _BF16_MODE.held() if pays else nullcontext()
