"""A chunk of one side's raw logits, and the room that it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import result_dtype
from ..products import products_for
from ..rows.engine import RowEngine
from ..rows.layout import LogitTransform
from .problem import Side

#: Shape and dtype of a buffer.
Size = tuple[tuple[int, int], torch.dtype]
#: Tokens of the flat batch: a range, or the indices of those that count.
Tokens = slice | Tensor


class ChunkLogits:
    """Logits of any tokens, over the ids that are formed here, without bias and scale."""

    def __init__(self, side: Side, engine: RowEngine, columns: int, stride: int):
        self.side, self.engine, self.columns, self.stride = side, engine, columns, stride

    @property
    def transform(self) -> LogitTransform:
        """What happens to these logits before the temperature."""
        return self.side.transform(1.0, self.columns)

    def size(self, rows: int) -> Size | None:
        """Of so many rows, with their padding, where a GEMM makes them."""
        if self.side.weight is None:
            return None
        return (rows, self.stride), result_dtype(self.side.source.dtype)

    def of(
        self,
        tokens: Tokens,
        buffer: Tensor | None,  # as `size` says
        hidden: Tensor | None = None,  # of these tokens, where they are at hand
    ) -> Tensor:
        side = self.side
        if side.weight is None:
            if side.pieces:
                return torch.cat([piece[tokens] for piece in side.pieces], dim=-1)
            return side.source[tokens][:, : self.columns]
        rows = side.source[tokens] if hidden is None else hidden
        assert buffer is not None
        products = products_for(self.engine, rows.dtype, rows.device.type)
        out = buffer[: rows.shape[0], : self.columns]
        if not side.pieces:
            return products.logits_into(out, rows, side.weight[: self.columns])
        low = 0
        for piece in side.pieces:
            high = low + piece.shape[0]
            products.logits_into(out[:, low:high], rows, piece)
            low = high
        return out
