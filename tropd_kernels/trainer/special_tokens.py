"""Tokenizers that differ in special tokens alone: `special_token_map`, {student's: teacher's}.

R1-Distill-Qwen and Qwen2.5, for example, have one vocabulary of words, and other tokens for turns
and ends. A table T holds the teacher's id of each of the student's ids:

    the teacher reads      T[prompt], T[completion]
    the loss compares      the student's logit of i with the teacher's of T[i]

No two of the student's ids may have one of the teacher's, whose probability would count twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .sides import ModelSide
from .vocabulary import check_same_texts, check_tokenizers, differing

_ROLES = ("eos_token", "bos_token", "pad_token", "unk_token", "cls_token", "sep_token")


def check_map(given: Any) -> None:
    """Raises ValueError for a map that is not one of texts to texts."""
    texts = isinstance(given, Mapping) and given and all(
        isinstance(token, str) for pair in given.items() for token in pair
    )  # fmt: skip
    if not texts:
        raise ValueError(
            "special_token_map: expected a mapping of the student's tokens to the teacher's, such "
            f"as {{'<|end|>': '<|im_end|>'}}, got {given!r:.80}"
        )


def unknown_tokenizer_error() -> ValueError:
    return ValueError(
        "special_token_map: the teacher's tokenizer is not found, which the map leads to: give the "
        "teacher by the name or the folder that holds it"
    )


def id_table(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, given: Mapping[str, str]
) -> dict[int, int]:
    """The teacher's id of each of the student's ids that are mapped.

    Raises ValueError where the two still differ, or two ids would have one.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for whose, vocabulary, tokens in (
        ("student", ours, given.keys()), ("teacher", theirs, given.values()),
    ):  # fmt: skip
        if unknown := [token for token in tokens if token not in vocabulary]:
            raise ValueError(f"special_token_map: the {whose} has no token {unknown[0]!r}")
    table = {ours[mine]: theirs[yours] for mine, yours in given.items()}
    names = {i: token for token, i in ours.items()}
    ends: dict[int, int] = {}
    for i in sorted(names):
        other = ends.setdefault(table.get(i, i), i)
        if other != i:
            raise ValueError(
                f"special_token_map: {names[other]!r} and {names[i]!r} would both be the teacher's "
                f"id {table.get(i, i)}: map each to a token of its own"
            )
    if rest := [token for token in differing(ours, theirs) if token not in given]:
        raise ValueError(
            f"special_token_map: {rest[0]!r} is not in it, and is another token for the teacher. "
            + _advice(student, teacher)
        )
    check_same_texts(student, teacher)
    return {i: j for i, j in table.items() if i != j}


def compare_tokenizers(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    given: Mapping[str, str] | None,
    several: bool = False,
) -> dict[int, int]:
    """`id_table` under a map; without one an empty table.

    several: whether the map may be for another teacher.

    Raises ValueError for tokenizers that differ, with the map that would help where one does.
    """
    differ = differing(student.get_vocab(), teacher.get_vocab())
    if given is not None and differ:
        return id_table(student, teacher, given)
    if given is not None and not several:
        refuse_unused_map([None])
    if differ and _only_specials_differ(student, teacher):
        raise ValueError(
            "teacher_model: its tokenizer is not the student's, but the two differ in special "
            f"tokens alone, such as {differ[0]!r}. " + _advice(student, teacher)
        )
    check_tokenizers(student, teacher)
    return {}


def refuse_unused_map(tables: Iterable[Tensor | None]) -> None:
    """Raises ValueError for a map where no teacher has a table by it."""
    if all(table is None for table in tables):
        raise ValueError(
            "special_token_map: it would have no effect: the tokenizers have the same tokens: "
            "leave it out"
        )


def _only_specials_differ(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> bool:
    pairs = (student, teacher), (teacher, student)
    return all(
        set(differing(one.get_vocab(), other.get_vocab())) <= set(one.get_added_vocab())
        for one, other in pairs
    )


def _advice(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """The map to write: by name, by role, by id, and what is left in the order of ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    rest, free = differing(ours, theirs), differing(theirs, ours)
    roles = {getattr(student, role): getattr(teacher, role) for role in reversed(_ROLES)}
    names = {i: token for token, i in theirs.items()}
    found: dict[str, str] = {}
    for guess in (lambda t: t, roles.get, lambda t: names.get(ours[t]), lambda t: free[0]):
        for token in rest:
            if token not in found and free and (match := guess(token)) in free:
                found[token] = match
                free.remove(match)
    if len(found) < len(rest) or not _only_specials_differ(student, teacher):
        return "No map of special tokens makes the two one: choose models of one family"
    line = {token: found[token] for token in rest}
    return f"Write special_token_map={line}, and see that each is for the same purpose"


def full_table(
    table: dict[int, int], student_ids: int, teacher_ids: int, device: Any
) -> Tensor | None:
    """The teacher's id of each of the student's that it has by number; None for an empty table.

    Raises ValueError for an id beyond the teacher's head.
    """
    if not table:
        return None
    whole = torch.arange(min(student_ids, teacher_ids))
    # An id without a token of the student's, which one of its tokens took, has one that is free.
    free = iter(sorted(table.keys() - table.values()))
    taken = dict(zip(sorted(table.values() - table.keys()), free))
    for mine, yours in (table | taken).items():
        if mine < len(whole):
            whole[mine] = yours
    if int(whole.max()) >= teacher_ids:
        raise ValueError(
            f"special_token_map: it leads to id {int(whole.max())}, and the teacher's head has the "
            f"ids below {teacher_ids}"
        )
    return whole.to(device)


def teachers_ids(inputs: Mapping[str, Any], table: Tensor) -> dict[str, Any]:
    """A micro-batch in the teacher's ids."""
    return {**inputs, **{name: table[inputs[name]] for name in ("prompt_ids", "completion_ids")}}


def students_columns(side: ModelSide, table: Tensor) -> ModelSide:
    """A teacher's side whose head has the order of the student's ids."""
    rows = table.to(side.weight.device)
    bias = None if side.bias is None else side.bias[rows]
    return replace(side, weight=side.weight[rows], bias=bias)


def back(written: Sequence[Sequence[int]], table: Tensor) -> list[list[int]]:
    """Texts in the student's ids that were written in the teacher's."""
    inverse = {yours: mine for mine, yours in enumerate(table.tolist())}
    return [[inverse[token] for token in ids] for ids in written]
