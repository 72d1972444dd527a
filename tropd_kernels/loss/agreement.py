"""Checks that the ranks of a process group make the same call, and finds which ids each one holds.

There is one exchange of 96 int64 numbers before anything else: whether the rank's own checks
passed, the sizes of its shards, digests that tell shards from copies of one head, and a digest of
every argument that must be the same everywhere. All ranks see all numbers, so an error is raised on
every rank, and names the rank and the argument. Only in that case do ranks exchange text as well.

For hidden only shape and dtype are compared: its replicas may differ in the last bit. What controls
the loss of a token (labels, draws, weights, given log-probs) is compared to the bit, by a digest:
ranks that disagreed on it would add up gradients of different losses.

The exchange costs a host sync on a GPU. If the caller has asked for none (`ignore_index=None`),
only the first call with the same shapes and options makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from hashlib import blake2b
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import engine_for
from ..parallel import Shard, bounds, gather
from ..rows.layout import TOKEN_INPUTS
from .ops import NUMBERS, numbers_of
from .problem import Problem, Side
from .values import may_look

#: Errors that a rank can pass on to the others, by their code.
ERRORS: tuple[type[Exception], ...] = (
    ValueError, TypeError, NotImplementedError, RuntimeError
)  # fmt: skip
#: Numbers that a rank sends to the others.
MESSAGE_NUMBERS = 96
#: Values that a digest is made of at once, in several int64 tensors as long.
PIECE = 2**20
#: Bytes of a message between ranks.
MESSAGE = 2000
#: What the caller calls the per-token inputs that it does not pass by their own name.
PUBLIC = {
    "uniforms": "uniforms or seed",
    "ids": "the teacher's ids",
    "topk_log_probs": "the teacher's log_probs",
    "label_log_probs": "the teacher's label_log_probs",
    "teacher_entropy": "the teacher's entropy",
}
#: Facts about a call: name of the argument, and what it is, in words or as a tensor of values.
Facts = list[tuple[str, str, Tensor | None]]

#: By group and call, the heights of all ranks' shards. No Shard, which would keep the group alive.
_seen: WeakKeyDictionary[dist.ProcessGroup, dict[Any, list[list[int]]]]
_seen = WeakKeyDictionary()


class _Call(NamedTuple):
    """What this rank compares with the others'. heights: ids of the shards of student, teacher and
    reference teacher, -1 where there is none."""

    problem: Problem
    heights: tuple[int, ...]
    facts: Facts


def check_agreement(
    group: dist.ProcessGroup, prepare: Callable[[], Problem], reduction: str
) -> tuple[Problem, Shard]:
    """What `prepare` makes of this rank's arguments, and the rank's Shard.

    Raises on every rank what `prepare` raises on any, and ValueError where the ranks disagree.
    """
    error: Exception | None = None
    call: _Call | None = None
    try:
        problem = prepare()
        call = _Call(problem, _heights(problem), _facts(problem, reduction))
    except Exception as raised:
        error = raised
    key = None
    if call is not None and not may_look(call.problem):
        key = (call.heights, tuple(words for _, words, _ in call.facts))
        known = _seen.setdefault(group, {}).get(key)
        if known is not None:
            return call.problem, _layout(group, known)
    table = gather(group, _numbers(group, call, error)).tolist()
    _raise_errors(group, error, [row[0] for row in table])
    assert call is not None  # or there was an error
    sides = len(call.heights)
    _raise_copies([row[1 : 1 + 2 * sides] for row in table])
    _raise_differences(group, call.facts, [row[1 + 2 * sides :] for row in table])
    every = [[row[1 + side] for row in table] for side in range(sides)]
    if key is not None:
        _seen[group][key] = every
    return call.problem, _layout(group, every)


# --- what is compared ----------------------------------------------------------------------------


def _heights(problem: Problem) -> tuple[int, ...]:
    return tuple(-1 if side is None else side.vocab_size for side in problem.sides)


def _first_rows(problem: Problem) -> list[Tensor]:
    """0-d digests of the first row of each side's shard, or of the first token's logits; 0 where it
    tells nothing, being one number throughout."""
    digests = []
    for side in problem.sides:
        rows = None if side is None else side.source if side.weight is None else side.weight
        if rows is None or len(rows) == 0:
            digests.append(torch.zeros((), dtype=torch.int64))
            continue
        row = rows[0].detach()
        digests.append(torch.where(row.amax() > row.amin(), digest(row), 0))  # not of NaN
    return digests


def _facts(problem: Problem, reduction: str) -> Facts:
    """The same list of arguments on every rank, whatever they are."""
    student, options = problem.student, problem.options
    named = {f.name: repr(getattr(options, f.name)) for f in fields(options)}
    named["objective"] = named.pop("rule")
    del named["sampling"]  # its numbers and its seed follow
    named |= dict(zip(NUMBERS, map(repr, numbers_of(problem)), strict=True))
    if options.max_workspace_bytes is not None and engine_for(options.backend).native_products:
        threads = torch.get_num_threads()  # whose memory the plan counts
        named["max_workspace_bytes"] += f" with {threads} threads"

    def kind(tensor: Tensor | None) -> str:
        return "none" if tensor is None else f"{tensor.dtype}"

    def head(tensor: Tensor | None) -> str:
        return "none" if tensor is None else f"{tensor.dtype} of width {tensor.shape[1]}"

    def values(name: str, tensor: Tensor | None) -> tuple[str, str, Tensor | None]:
        words = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} with values"
        return name, words, tensor

    hidden, weight, bias = student.source, student.weight, student.bias

    def of_teacher(name: str, side: Side | None) -> Facts:
        t_hidden = t_logits = t_weight = t_bias = rows = None
        if side is not None:
            t_weight, t_bias, rows = side.weight, side.bias, side.source.shape[0]
            t_hidden, t_logits = (None, side.source) if t_weight is None else (side.source, None)
        return [
            (f"{name}'s weight", head(t_weight), None),
            (f"{name}'s hidden", kind(t_hidden), None),
            (f"{name}'s logits", kind(t_logits), None),
            (name, f"{rows} rows", None),
            (f"{name}'s bias", kind(t_bias), None),
        ]

    wants = [
        name
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias))
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    ]
    name, shape = ("hidden", tuple(hidden.shape)) if weight is not None else ("logits", len(hidden))
    return [
        ("weight", head(weight), None),
        (name, f"{hidden.dtype} {shape}", None),
        ("bias", kind(bias), None),
        ("requires_grad", f"of {' and '.join(wants) or 'nothing'}", None),
        *of_teacher("the teacher", problem.teacher),
        *of_teacher("the reference teacher", problem.reference),
        *[(name, words, None) for name, words in named.items()],
        ("reduction", repr(reduction), None),
        values("labels", problem.labels),
        *[
            values(
                name if name == "ids" and problem.teacher is not None else PUBLIC.get(name, name),
                tensor,
            )
            for name, tensor in zip(TOKEN_INPUTS, problem.inputs.tensors(), strict=True)
        ],
        values("normalizer", problem.loss_scale),
        values("seed", options.sampling.seed),
    ]


def _numbers(group: dist.ProcessGroup, call: _Call | None, error: Exception | None) -> Tensor:
    """(MESSAGE_NUMBERS,): the error's code or 0, the sides' heights and first rows, each fact's
    words and values."""
    home = _home(group)
    if call is None:
        code = next((i for i, e in enumerate(ERRORS) if isinstance(error, e)), len(ERRORS) - 1)
        return torch.tensor([code + 1, *[0] * (MESSAGE_NUMBERS - 1)], device=home)
    numbers = torch.zeros(MESSAGE_NUMBERS, dtype=torch.int64)
    firsts = [first.to(home) for first in _first_rows(call.problem)]
    facts = [_hash(words) for _, words, _ in call.facts]
    words = torch.tensor([0, *call.heights, *[0] * len(firsts), *facts])
    numbers[: len(words)] = words
    numbers = numbers.to(home)
    numbers[1 + len(firsts) : 1 + 2 * len(firsts)] = torch.stack(firsts)
    digests = [digest(value).to(home) for _, _, value in call.facts if value is not None]
    numbers[len(words) : len(words) + len(digests)] = torch.stack(digests)
    return numbers


def _hash(words: str) -> int:
    return int.from_bytes(blake2b(words.encode(), digest_size=7).digest(), "big")


def digest(values: Tensor) -> Tensor:
    """A 0-d int64 tensor that changes with any value, and with their order."""
    flat = values.detach().reshape(-1)
    if flat.is_floating_point():
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        flat = flat.view(words[flat.element_size()])
    total = flat.new_zeros((), dtype=torch.int64)
    for start in range(0, flat.numel(), PIECE):
        total += _digest(flat[start : start + PIECE].long(), start + 1)
    return total


def _digest(flat: Tensor, first: int) -> Tensor:
    """Of a piece (n,) int64 that begins at this place."""
    prime = 2**31 - 1  # so that no product reaches 2^63
    at = torch.arange(first, first + flat.numel(), device=flat.device)
    low, high = (flat & 0xFFFFFFFF) % prime, (flat >> 32) % prime
    mixed = (low * 48271 + high * 69621 + at) % prime
    return (mixed * (at * 16807 % prime + 1) % prime * (mixed + 1) % prime).sum()


def _home(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend takes tensors, whatever this rank was given."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# --- what follows from it ------------------------------------------------------------------------


def _raise_errors(group: dist.ProcessGroup, error: Exception | None, codes: list[int]) -> None:
    if not any(codes):
        return
    said = _texts(group, "" if error is None else str(error))
    if error is not None and not isinstance(error, ERRORS):
        raise error
    first = next(rank for rank, code in enumerate(codes) if code)
    kind = ERRORS[codes[first] - 1]
    raise kind(f"rank {first} of {len(codes)}: {said[first]}") from error


def _raise_copies(table: list[list[int]]) -> None:
    """For a head that is whole on every rank: its ids would count once a rank."""
    ranks = len(table)
    names = "the head", "the teacher's head", "the reference teacher's head"
    for side, name in enumerate(names):
        height, first = table[0][side], table[0][side + len(names)]
        same = all((row[side], row[side + len(names)]) == (height, first) for row in table)
        if ranks > 1 and first and same:
            raise ValueError(
                f"every rank of process_group begins {name} (or logits) with the same numbers, of "
                f"{height} ids on each of the {ranks} ranks: with process_group a rank passes its "
                "own ids alone, those behind the ids of the rank before it; where each holds all "
                "of them, cut them, or leave process_group out"
            )


def _raise_differences(group: dist.ProcessGroup, facts: Facts, table: list[list[int]]) -> None:
    compared = [(name, words) for name, words, _ in facts]
    # Where the words agree, so does the list of those that have values.
    compared += [(name, "other values") for name, _, value in facts if value is not None]
    for i, (name, words) in enumerate(compared):
        odd = [rank for rank, row in enumerate(table) if row[i] != table[0][i]]
        if not odd:
            continue
        said = _texts(group, words)
        has = f"rank {odd[0]} of {len(table)} has {said[odd[0]]}"
        has += f", rank 0 {said[0]}" if said[odd[0]] != said[0] else " than rank 0"
        others = f" (ranks {odd[1:]} differ from rank 0, too)" if len(odd) > 1 else ""
        raise ValueError(
            f"the ranks of process_group disagree on {name}: {has}{others}. With a head sharded "
            "over the vocabulary every rank is given the same tokens and options, and only its own "
            "rows of the head; where FSDP sharded the head of ranks with other tokens, gather it "
            "first"
        )


def _layout(group: dist.ProcessGroup, every: list[list[int]]) -> Shard:
    """every: each side's heights, by rank."""
    heights, *teachers = every
    v = min(sum(each) for each in every if each[0] >= 0)
    teacher, reference = (bounds(e, sum(e)) if e[0] >= 0 else None for e in teachers)
    shard = Shard(group, bounds(heights, v), teacher, v, reference)
    for rank, (low, high) in enumerate(zip(shard.bounds, shard.bounds[1:])):
        if low == high:
            raise ValueError(
                f"rank {rank} of {len(heights)} holds none of the {v} ids that student and teacher "
                f"share: the student's shards have {heights} rows, the teacher's "
                f"{' and '.join(str(each) for each in teachers if each[0] >= 0)}; pass a "
                "process_group that covers the heads, or shard the student's more evenly"
            )
    return shard


def _texts(group: dist.ProcessGroup, text: str) -> list[str]:
    """Every rank's text."""
    data = text.encode()[:MESSAGE].ljust(MESSAGE, b"\0")
    sent = torch.tensor(list(data), dtype=torch.uint8, device=_home(group))
    return [
        bytes(row).rstrip(b"\0").decode(errors="replace") for row in gather(group, sent).tolist()
    ]
