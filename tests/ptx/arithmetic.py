"""Operations of PTX that NumPy has not, on arrays of one entry a thread.

`ex2.approx`, `div.full` and `div.approx` are one last bit off, or none, by a hash of their
operands: the hardware's may be off by two, and what is right here must not hang on their last bits.
Fused multiply-adds of float32 are rounded through float64, those of float64 through long double, so
that they may differ from the hardware's in a last bit.
"""

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
UNSIGNED = {8: U8, 16: U16, 32: U32, 64: U64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def ex2(x):
    return _off_by_a_bit(np.exp2(x.astype(np.float64)), x)


def divide(x, y):
    return _off_by_a_bit(x.astype(np.float64) / y.astype(np.float64), x, y)


def divide_roughly(x, y):
    """`div.approx`, which gives 0 for large divisors."""
    return np.where(np.abs(y) > np.float32(2.0**126), x * np.float32(0), divide(x, y))


def _off_by_a_bit(exact, *operands):
    """Rounded to float32, and moved; but not 1, nor what is infinite or nearly subnormal."""
    hashed = sum(x.view(U32).astype(U64) * U64(2654435761) for x in operands)
    step = ((hashed >> U64(13)) % U64(3)).astype(np.int32) - np.int32(1)
    near = exact.astype(np.float32)
    moved = (near.view(np.int32) + step).view(np.float32)
    keep = ~np.isfinite(near) | ~np.isfinite(moved) | (np.abs(near) < 1e-37) | (near == 1)
    return np.where(keep, near, moved)


def rcp(x):
    """Of float64 numbers, good to 20 bits."""
    return ((1 / x).view(U64) & U64(0xFFFFFFFF00000000)).view(np.float64)


def fma(a, b, c):
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def flush(x):
    """Subnormal numbers become zeros."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def pairs(operation, *operands):
    """Of two float32 numbers in 64 bits, each by itself."""
    low, high = (
        operation(*((x >> shift).astype(U32).view(np.float32) for x in operands))
        .view(U32)
        .astype(U64)
        for shift in (U64(0), U64(32))
    )
    return low | high << U64(32)


def bit_field(x, position, length):
    """`length` bits, extended by zeros or, of signed numbers, by their sign."""
    width, position, length = (x.dtype.type(n) for n in (8 * x.dtype.itemsize, position, length))
    return (x << (width - length - position)) >> (width - length)


def popc(x):
    return sum((x >> U32(bit)) & U32(1) for bit in range(32))


def to_bf16(x):
    """Bits of float32 numbers, rounded to nearest, ties to even."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def from_bf16(bits):
    return (bits.astype(U32) << U32(16)).view(np.float32)
