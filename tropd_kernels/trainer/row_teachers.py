"""Several teachers: `teacher_models={id: model or name}`, and of each row the id in `teacher_id`.

Each teacher reads its rows of a micro-batch alone, and the loss is one call for each: as much work
as one teacher's. The sums are divided once, by all tokens that count, so that the loss is

    (sum over the first's tokens + sum over the second's + ...) / all tokens

A rule that ranks the tokens of a whole batch cannot be computed in parts, and is refused.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..functional import DistillationOutput, TokenStats
from ..objectives import TokenRule
from .data_checks import data_sets
from .effects import refuse
from .loaded_teacher import refuse_compiled
from .self_teacher import is_self
from .sides import ModelSide

COLUMN = "teacher_id"
#: A batch's rows: the place of each row's teacher among `teacher_models`.
INDEX = "teacher_index"
_NAMED = (ImportError, NotImplementedError, OSError, TypeError, ValueError)
_ONE = ("teacher_model_name_or_path", "teacher_model_server_url", "teacher_model_revision")


@dataclass(frozen=True, eq=False)
class RowTeachers:
    """Each teacher's signal for some rows of a micro-batch: the mask (B,) of those, and itself."""

    parts: Sequence[tuple[Tensor, Any]]

    def as_teacher(self) -> "RowTeachers":
        return RowTeachers([(rows, side.as_teacher()) for rows, side in self.parts])


def check_several(
    teachers: Any, teacher_model: Any, args: Any, datasets: Mapping[str, Any]
) -> None:
    """Raises, before a model is loaded, for what several teachers cannot be, and for their rows.

    args: a `TrOPDConfig`. datasets: by the argument's name.
    """
    if not isinstance(teachers, Mapping) or not teachers:
        raise ValueError(
            "teacher_models: expected a mapping of ids to models or their names, such as "
            f"{{'math': 'org/teacher'}}, got {teachers!r:.80}"
        )
    for name, teacher in teachers.items():
        if not isinstance(name, str) or not isinstance(teacher, (str, torch.nn.Module)):
            raise ValueError(
                f"teacher_models: expected text as an id and a model or its name, got {name!r:.40} "
                f"and a {type(teacher).__name__}"
            )
        refuse_compiled(f"teacher_models: {name!r}", teacher)
        if is_self(teacher):
            raise ValueError(
                f"teacher_models: {name!r} is 'self', and the student teaches itself alone: give "
                "its name, which loads a frozen copy"
            )
        if isinstance(teacher, str) and teacher.startswith(("http://", "https://")):
            raise NotImplementedError(
                f"teacher_models: {name!r} is behind a server, and only one teacher can be "
                "(teacher_model_server_url): load it in this process"
            )
    if not any(isinstance(teacher, str) for teacher in teachers.values()):
        refuse(args, ("teacher_model_init_kwargs",), "all of teacher_models are models already")
    given = [key for key in _ONE if getattr(args, key) is not None]
    given += ["precomputed_teacher"] if args.precomputed_teacher else []
    given += ["teacher_model"] if teacher_model is not None else []
    if given:
        raise ValueError(f"{given[0]}: teacher_models are the teachers: leave {given[0]} out")
    for rule in args.rules():
        if rule.fraction is not None and rule.score is not None:
            raise NotImplementedError(
                f"teacher_models: {rule!r} ranks the tokens of a whole batch, and each teacher's "
                "are compared by themselves: set select_threshold, or take another objective"
            )
    for key in ("gradient_tolerance", "gradient_sampling"):
        if getattr(args, key):
            raise NotImplementedError(
                f"{key}: its error is of one call, and teacher_models take several: leave it out"
            )
    for name, data, present in data_sets(datasets):
        if present and COLUMN not in present:
            raise ValueError(
                f"{name}: teacher_models need a column {COLUMN!r}, which says whose each row is; "
                f"it has {', '.join(map(repr, present))}"
            )
        if present and hasattr(data, "unique"):
            for own in data.unique(COLUMN):
                _check_id(own, teachers, f"{name}: ")


def _check_id(own: Any, known: Mapping[str, Any], where: str) -> None:
    if own not in known:
        raise ValueError(
            f"{where}{COLUMN} {own!r:.80} is none of the teachers: teacher_models has "
            f"{', '.join(map(repr, known))}"
        )


def refuse_beside_several(sharded: bool, is_vlm: bool) -> None:
    if is_vlm:
        raise NotImplementedError(
            "teacher_models: the images of a batch are not split by teacher: give one teacher_model"
        )
    if sharded:
        raise NotImplementedError(
            "teacher_models: under FSDP and ZeRO-3 all processes read a teacher together, and a "
            "process may have no row of it: give one teacher_model, or train under DDP"
        )


def row_indices(rows: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> Tensor:
    """The place (B,) of each row's teacher. Raises ValueError for a row without one."""
    for row in rows:
        _check_id(row.get(COLUMN), known, "")
    places = {name: place for place, name in enumerate(known)}
    return torch.tensor([places[row[COLUMN]] for row in rows])


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of one of the teachers, with its id."""
    try:
        yield
    except _NAMED as error:
        text = str(error).removeprefix("teacher_model: ")
        # A subclass, such as JSONDecodeError, may take other arguments than a message.
        kind = next(one for one in type(error).__mro__ if one in _NAMED)
        raise kind(f"teacher_models[{name!r}]: {text}") from error


def rows_of(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The rows of a micro-batch of text, by mask (B,)."""
    return {
        name: value[rows] if torch.is_tensor(value) and value.ndim else value
        for name, value in inputs.items()
    }


def compare_parts(
    compare: Callable[..., DistillationOutput],
    student: ModelSide,
    teachers: RowTeachers,
    labels: Tensor,  # (B, C)
    rule: TokenRule,
    *,
    normalizer: Any = None,
    reduction: str = "mean",
    **options: Any,
) -> DistillationOutput:
    """`compare` on each teacher's rows, as one call on all of them would be.

    compare: called as `(student, teacher, labels, rule, reduction="sum", **options)`.
    """
    outputs: list[tuple[Tensor, DistillationOutput]] = []
    for rows, teacher in teachers.parts:
        own = replace(student, hidden=student.hidden[rows])
        of_rows = {k: v[rows] if torch.is_tensor(v) else v for k, v in options.items()}
        part = compare(own, teacher, labels[rows], rule, reduction="sum", **of_rows)
        outputs.append((rows, part))
    stats = _joined([(rows, part.stats) for rows, part in outputs], labels)
    loss = torch.stack([part.loss for _, part in outputs]).sum()
    if reduction == "mean":
        count = stats.kept if rule.normalize == "kept" else labels != -100
        loss = loss / (count.sum().clamp(min=1) if normalizer is None else normalizer)
    return replace(outputs[0][1], loss=loss, stats=stats)


def _joined(parts: list[tuple[Tensor, TokenStats]], labels: Tensor) -> TokenStats:
    joined: dict[str, Any] = {}
    for name in [field.name for field in fields(TokenStats)]:
        values = [(rows, getattr(stats, name)) for rows, stats in parts]
        if any(value is None for _, value in values):
            joined[name] = None
            continue
        whole = joined[name] = values[0][1].new_zeros(labels.shape)
        for rows, value in values:
            whole[rows] = value
    return TokenStats(**joined)
