"""Memory that knows who touched it.

A stamp is a program's number, a count of the barriers that it has passed, and a warp, in bits 32
and up, 5 to 31, and 0 to 4. Two stamps are of a race if their programs differ, or if between two
barriers of one program their warps do.
"""

from __future__ import annotations

import ctypes

import numpy as np

from . import PtxError
from .arithmetic import U8, U64

PROGRAM, BARRIER = 1 << 32, 1 << 5


class Memory:
    """Bytes at addresses from `base`. `known`: whether they have been written before."""

    def __init__(self, base: int, data: np.ndarray, name: str, known: bool):
        self.base, self.data, self.name = base, data, name
        self.known = np.full(len(data), known)
        self.writer = np.zeros(len(data), np.int64)
        # Of a byte's readers the first, and those after the latest barrier with the lowest and the
        # highest warp.
        self.first, self.low, self.high = np.zeros((3, len(data)), np.int64)

    def read(self, addresses: np.ndarray, size: int, stamps: np.ndarray) -> np.ndarray:
        """(threads, size) bytes."""
        at = self._bytes(addresses, size)
        if not self.known[at].all():
            raise PtxError(f"{self.name} is read before it is written")
        stamps = np.repeat(stamps[:, None], size, 1)
        self._refuse(self.writer[at], stamps, "read what another writes")
        self.first[at] = np.where(self.first[at] == 0, stamps, self.first[at])
        self.low[at[self.high[at] // BARRIER < stamps // BARRIER]] = np.iinfo(np.int64).max
        np.minimum.at(self.low, at, stamps)
        np.maximum.at(self.high, at, stamps)
        return self.data[at]

    def write(self, addresses: np.ndarray, values: np.ndarray, stamps: np.ndarray) -> None:
        """values (threads, size) bytes. Several may write the same."""
        at = self._bytes(addresses, values.shape[1])
        stamps = np.repeat(stamps[:, None], values.shape[1], 1)
        for readers in (self.first, self.low, self.high):
            self._refuse(readers[at], stamps, "write what another reads")
        for _ in range(2):  # beside those before, and beside each other
            others = np.where(self.data[at] == values, 0, self.writer[at])
            self._refuse(others, stamps, "write what another writes")
            self.writer[at], self.data[at] = stamps, values
        self.known[at] = True

    def _bytes(self, addresses: np.ndarray, size: int) -> np.ndarray:
        at = (addresses - U64(self.base)).view(np.int64)
        if (outside := (at < 0) | (at + size > len(self.data))).any():
            where = f"byte {at[outside][0]} of the {len(self.data)} of {self.name}"
            raise PtxError(f"{size} bytes are touched at {where}")
        if (addresses % U64(size)).any():
            raise PtxError(
                f"{size} bytes of {self.name} at an address that is no multiple of {size}"
            )
        return at[:, None] + np.arange(size)

    def _refuse(self, before: np.ndarray, now: np.ndarray, what: str) -> None:
        other_program = before // PROGRAM != now // PROGRAM
        other_warp = (before != now) & (before // BARRIER == now // BARRIER)
        if ((before != 0) & (other_program | other_warp)).any():
            raise PtxError(f"a race: threads {what}, in {self.name}, and no barrier stands between")


class GlobalMemory:
    """The tensors that a kernel was given, as (first address, address past the last, name); those
    that overlap are one."""

    def __init__(self, extents: list[tuple[int, int, str]]):
        merged: list[list] = []
        for low, high, name in sorted(extents):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
                merged[-1][2] += f" and {name}"
            elif high > low:
                merged.append([low, high, name])
        self.parts = [
            Memory(low, np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)),
                   name, known=True)
            for low, high, name in merged
        ]  # fmt: skip
        self.lows = np.array([part.base for part in self.parts], U64)

    def read(self, addresses, size, stamps):
        out = np.empty((len(addresses), size), U8)
        for part, here in self._parts(addresses):
            out[here] = part.read(addresses[here], size, stamps[here])
        return out

    def write(self, addresses, values, stamps):
        for part, here in self._parts(addresses):
            part.write(addresses[here], values[here], stamps[here])

    def _parts(self, addresses):
        which = np.searchsorted(self.lows, addresses, side="right") - 1
        for index in np.unique(which):
            yield self.parts[max(index, 0)], which == index
