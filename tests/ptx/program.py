"""One program: a block of threads, which go through the kernel's blocks of instructions together.

Threads that branch apart form groups. The group that is furthest behind goes first, so that groups
meet again; one that has a part of a warp alone waits at an exchange for the rest of it. Barriers
hold everyone who has not left.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from . import PtxError, arithmetic
from .arithmetic import FLOAT, SIGNED, U8, U32, U64, UNSIGNED
from .memory import BARRIER, PROGRAM, Memory

WARP = 32
LANES = np.arange(WARP)


class Program:
    """number: how many programs of the launch ran before. index, grid: its place among them."""

    def __init__(self, kernel, memory, parameters, number, index, grid):
        self.kernel, self.memory = kernel, memory
        self.threads = np.arange(kernel.threads)
        self.stamps = (number + 1) * PROGRAM + self.threads // WARP  # none of them is 0
        room = np.full(kernel.shared, 0xFF, U8)
        self.shared = Memory(0, room, "shared memory", known=False)
        self.stack = np.full((kernel.threads, kernel.stack), 0xFF, U8)
        self.names = {
            **kernel.registers, **kernel.constants, **parameters, **_TYPES, **vars(arithmetic),
            "tid_x": self.threads.astype(U32),
            "load_global": partial(self.load, memory),
            "load_shared": partial(self.load, self.shared),
            "store_global": partial(self.store, memory),
            "store_shared": partial(self.store, self.shared),
            "load_local": self.load_local, "store_local": self.store_local,
            "ldmatrix": self.ldmatrix, "stmatrix": self.stmatrix, "shuffle": self.shuffle,
            "reduced": self.reduced, "chosen": _chosen, "np": np,
        }  # fmt: skip
        for axis, position, size in zip("xyz", index, grid):
            self.names |= {f"ctaid_{axis}": U32(position), f"nctaid_{axis}": U32(size)}

    def run(self) -> None:
        running = {0: np.ones(len(self.threads), bool)}  # groups, by the block that they come to
        waiting: dict[int, np.ndarray] = {}
        while running or waiting:
            if not running:
                if len(waiting) > 1:
                    raise PtxError("threads wait at different barriers")
                running, waiting = waiting, {}
                self.stamps += BARRIER
            at = min((at for at in running if self._may_run(at, running[at])), default=None)
            if at is None:
                raise PtxError("a part of a warp waits at an exchange of all its threads")
            group = running.pop(at)
            block = self.kernel.blocks[at]
            self.names["m"] = group
            exec(block.code if group.all() else block.masked, self.names)
            if block.end == "bar":
                waiting[at + 1] = waiting.get(at + 1, False) | group
                continue
            away = np.zeros_like(group)
            if block.end:
                away = group & eval(block.leaves, self.names)
            ways = [(at + 1, group & ~away)]
            if block.end == "bra":
                ways.append((self.kernel.labels[block.target], away))
            for to, threads in ways:
                if threads.any():
                    running[to] = running.get(to, False) | threads

    def _may_run(self, at: int, group: np.ndarray) -> bool:
        warps = group.reshape(-1, WARP)
        return not self.kernel.blocks[at].gathers or (warps.any(1) == warps.all(1)).all()

    # What instructions of these names do, for the threads of `mask`; None for all. A value is an
    # array of one entry a thread, or a scalar that is the same for all.

    def _of_all(self, value) -> np.ndarray:
        return np.broadcast_to(value, self.threads.shape)

    def _these(self, mask) -> np.ndarray:
        return self.threads if mask is None else np.flatnonzero(self._of_all(mask))

    def load(self, memory, address, size, count, mask):
        these = self._these(mask)
        out = np.zeros((len(self.threads), size * count), U8)
        if len(these):
            addresses = self._of_all(address)[these]
            out[these] = memory.read(addresses, size * count, self.stamps[these])
        return _columns(out, size)

    def store(self, memory, address, values, size, mask):
        these = self._these(mask)
        if len(these):
            addresses = self._of_all(address)[these]
            memory.write(addresses, self._rows(values, size)[these], self.stamps[these])

    def load_local(self, address, size, count, mask):
        at = self._of_all(address).astype(np.int64)[:, None] + np.arange(size * count)
        return _columns(self.stack[self.threads[:, None], at], size)

    def store_local(self, address, values, size, mask):
        these, rows = self._these(mask), self._rows(values, size)
        at = self._of_all(address).astype(np.int64)[:, None] + np.arange(rows.shape[1])
        self.stack[these[:, None], at[these]] = rows[these]

    def _rows(self, values, size) -> np.ndarray:
        """(threads, bytes)."""
        columns = [self._of_all(v).astype(UNSIGNED[8 * size]) for v in values]
        return np.stack(columns, 1).view(U8)

    def _by_warp(self, value) -> np.ndarray:
        return self._of_all(value).reshape(-1, WARP)

    def shuffle(self, value, by, butterfly):
        by = self._by_warp(by.astype(np.int64))
        lanes = LANES ^ by if butterfly else by % WARP
        return np.take_along_axis(self._by_warp(value), lanes, 1).ravel()

    def reduced(self, ufunc, value, members):
        """One number of a warp."""
        if (members != U32(0xFFFFFFFF)).any():
            raise PtxError("an exchange of some threads of a warp")
        value = self._of_all(value)
        return np.repeat(ufunc.reduce(self._by_warp(value), axis=1, dtype=value.dtype), WARP)

    def ldmatrix(self, address, count, mask):
        """Lane 8 i + r gives the address of row r of matrix i, and gets two of its entries."""
        rows, within = self._by_warp(address), (4 * (LANES % 4)).astype(U64)
        words = [
            self.load(self.shared, (rows[:, 8 * i + LANES // 4] + within).ravel(), 4, 1, mask)
            for i in range(count)
        ]
        return words[0] if count == 1 else tuple(words)

    def stmatrix(self, address, values, mask):
        """The reverse: lane 8 i + r gives an address, and each lane two entries of a matrix."""
        rows, within = self._by_warp(address), (4 * (LANES % 4)).astype(U64)
        for i, value in enumerate(values):
            at = (rows[:, 8 * i + LANES // 4] + within).ravel()
            self.store(self.shared, at, (value,), 4, mask)


_TYPES = {
    f"{letter}{width}": type_
    for letter, types in (("u", UNSIGNED), ("i", SIGNED), ("f", FLOAT))
    for width, type_ in types.items()
}


def _columns(data: np.ndarray, size: int):
    parts = data.view(UNSIGNED[8 * size])
    return parts[:, 0] if parts.shape[1] == 1 else tuple(np.ascontiguousarray(parts.T))


def _chosen(mask, new, old):
    return tuple(np.where(mask, a, b) for a, b in zip(new, old))
