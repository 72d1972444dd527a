"""Uniform draws for the trust gate, as functions of (seed, step, sequence id, position), and for
sampled gradients, as functions of (seed, token, id of the vocabulary).

A recomputed forward, a resumed run, another split into micro-batches and every tensor-parallel rank
must draw the same number for the same token. So the generator has no state but is counter-based:
Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011; the Random123 library). Ten rounds of

    (c0, c1, c2, c3)  <-  (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))

on four 32-bit counter words, hi and lo being the halves of the 64-bit product; the two key words
grow by W0 and W1 between rounds. The words here:

    counter   (position, sequence id low, sequence id high, step), position and step modulo 2^32
    key       (seed low, seed high), of the 64-bit seed in two's complement
    uniform   (first output word >> 8) / 2^24: float32, exact, 0 <= u < 1

The second and third output word give a sampled gradient's draw, float64 of 53 bits, which is thus
independent of the gate's under the same seed; the fourth is not used. An element costs one block,
and no element's draw depends on a neighbour.

Arithmetic is int64 tensor arithmetic kept below 2^49, so it means the same on every device, and
the global random state is neither read nor changed. On a GPU the kernel of `triton_draws.py` gives
the same bits. To torch.compile it is one op.
"""

import torch
from torch import Tensor

from .backends import runs_triton

__all__ = ["bernoulli_uniforms", "id_uniforms", "philox4x32", "seed_tensor", "uniforms_like"]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def bernoulli_uniforms(
    seed: int | Tensor,
    step: int | Tensor,
    sequence_ids: Tensor,  # (*)
    positions: Tensor,  # (*), broadcasts with sequence_ids
) -> Tensor:
    """Uniforms in [0, 1), one for each token, that depend on nothing but the token's four numbers.

    Args:
        seed: A 64-bit Python int (signed or unsigned; -1 and 2^64 - 1 are the same key) or a
            0-d int64 tensor.
        step: An int in [0, 2^32), or a 0-d integer tensor read modulo 2^32.
        sequence_ids: Integers that name a sequence across the whole optimiser step, on every rank;
            64 bits count.
        positions: The token's index within its sequence, not within the padded or packed row;
            32 bits count. Broadcasts with `sequence_ids`: (B, 1) and (T,) give (B, T).

    Under torch.compile pass seed and step as 0-d tensors: an int that changes from call to call
    recompiles, and from 2^63 on inductor refuses it. A tensor on a GPU is not read by the host.

    Returns:
        float32 of the broadcast shape, on the tensors' device.

    Raises:
        TypeError, ValueError: A wrong type, dtype, shape, device or range.
    """
    for name, tensor in (("sequence_ids", sequence_ids), ("positions", positions)):
        if not isinstance(tensor, Tensor):
            given = type(tensor).__name__
            raise TypeError(f"{name} must be an integer tensor, got {given}: use torch.tensor()")
        _check_integers(name, tensor)
    if sequence_ids.device != positions.device:
        raise ValueError(
            f"positions must be on sequence_ids' device {sequence_ids.device}, "
            f"got {positions.device}: move it with .to()"
        )
    return _uniforms(seed, step, sequence_ids, positions, torch.float32)


def uniforms_like(labels: Tensor, seed: int | Tensor) -> Tensor:
    """Uniforms in [0, 1) of the shape (*) of `labels`, for callers who keep no sequence ids.

    As `bernoulli_uniforms` with step 0, the last dimension as positions and the flat index over the
    others as sequence ids: change the seed at every step, micro-batch and data-parallel rank, which
    would share their draws (the ranks of a sharded head have to), and mind that the draws go with
    the layout of this batch. Only the shape and device of `labels` are used. seed: a 64-bit int or
    a 0-d int64 tensor.

    Returns float32 (*), on the labels' device. Raises TypeError or ValueError on a wrong type or
    range.
    """
    return bernoulli_uniforms(seed, 0, *_places(labels)).view(labels.shape)


def id_uniforms(seed: Tensor, token: int, first: int, count: int, device: torch.device) -> Tensor:
    """Uniforms in [0, 1) (count,) that decide which ids of the vocabulary, from `first` on, a
    sampled gradient keeps in the chunk that begins with this token. seed: as `seed_tensor` gives
    it. Independent of a gate's draws.

    Returns float64: an id may be kept with a probability below 2^-24, which float32 draws miss.
    """
    ids = torch.arange(first, first + count, device=device)
    return _uniforms(seed, 0, ids.new_full((1,), token), ids, torch.float64)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed, a 64-bit int or a 0-d integer tensor, as a 0-d int64 tensor. Raises TypeError or
    ValueError on a wrong type or range."""
    return _scalar("seed", seed, -(2**63), 2**64 - 1, device)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # int64, broadcast together
    key: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox4x32-10 block as published: four counter and two key words to four random words.

    All words are int64 in [0, 2^32); the caller sees to the range of what goes in.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(_M0, c0)
        hi1, lo1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def _uniforms(
    seed: int | Tensor,
    step: int | Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """A gate's draws in float32, a sampled gradient's in float64."""
    device = positions.device
    seed = seed_tensor(seed, device)
    step = _scalar("step", step, 0, _WORD, device)
    if torch.compiler.is_compiling():
        return _opaque(seed, step, sequence_ids, positions, dtype)
    # Fake tensors have no values.
    if runs_triton(device) and type(positions) is Tensor:
        from . import triton_draws

        return triton_draws.uniforms(seed, step, sequence_ids, positions, dtype)
    sequence_ids, positions = sequence_ids.long(), positions.long()
    counter = (positions & _WORD, sequence_ids & _WORD, (sequence_ids >> 32) & _WORD, step & _WORD)
    first, second, third, _ = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    if dtype == torch.float32:
        return _uniform(first)
    return (((second >> 5) << 26) + (third >> 6)).to(dtype) * 2.0**-53


@torch.library.custom_op("tropd_kernels::uniforms", mutates_args=())
def _opaque(
    seed: Tensor, step: Tensor, sequence_ids: Tensor, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    """`_uniforms` as one node of a compiled graph. Inductor would write each round's words into the
    next one's, four times each: ten rounds make an expression that it does not finish."""
    return _uniforms(seed, step, sequence_ids, positions, dtype)


@_opaque.register_fake
def _(seed, step, sequence_ids, positions, dtype):
    shape = torch.broadcast_shapes(sequence_ids.shape, positions.shape)
    return positions.new_empty(shape, dtype=dtype)


def _places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence ids (rows, 1) and positions (length,) of tokens that are known by their place."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a tensor, got {type(labels).__name__}: pass the labels of the loss"
        )
    *leading, length = labels.shape or (1,)
    rows = 1
    for size in leading:
        rows *= size
    sequence_ids = torch.arange(rows, device=labels.device).unsqueeze(1)
    return sequence_ids, torch.arange(length, device=labels.device)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product, which int64 cannot hold: by 16-bit halves."""
    upper = constant * (word >> 16)
    lower = constant * (word & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD


def _uniform(word: Tensor) -> Tensor:
    """The upper 24 bits: a float32 holds no more, and rounding 32 of them would reach 1.0."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def _scalar(name: str, value: int | Tensor, low: int, high: int, device: torch.device) -> Tensor:
    """The argument, checked, as a 0-d int64 tensor; an int from 2^63 on keeps its bits."""
    if isinstance(value, Tensor):
        _check_integers(name, value)
        if value.ndim != 0:
            shape = tuple(value.shape)
            raise ValueError(f"{name} must be an int or a 0-d tensor, got shape {shape}: index it")
        if value.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"{name} must be on {device} like positions, or on the CPU, got {value.device}: "
                "move it with .to()"
            )
        return value.long()
    if isinstance(value, bool) or not isinstance(value, int):
        given = type(value).__name__
        raise TypeError(
            f"{name} must be an int or a 0-d integer tensor, got {given}: pass int({name})"
        )
    if not low <= value <= high:
        raise ValueError(
            f"{name} must be in [{low}, {high}], got {value}: reduce it modulo {high + 1}"
        )
    # A tensor at once: compiled with a changing int, inductor gets the type of int shifts wrong.
    signed = value if value < 2**63 else value - 2**64
    return torch.full((), signed, dtype=torch.int64, device=device)


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} must be int64 or int32, got {tensor.dtype}: convert it with .long()"
        )
