"""Whether transformers can make the schedule of the learning rate that is asked for.

It makes it when training starts, with errors that name one of its functions, not the key.
"""

import inspect
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ..objectives.registry import nearest

#: Arguments of schedules that transformers fills in itself.
_FILLED_IN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def arguments_of(kind: str | SchedulerType) -> list[str]:
    """The arguments of a schedule, by its lr_scheduler_type, that lr_scheduler_kwargs can give."""
    made_by: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
    taken = inspect.signature(made_by).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):  # passed on to a class
        taken = inspect.signature(type(made_by(_optimizer(1.0)))).parameters
    return [name for name in taken if name not in _FILLED_IN]


def check_schedule(args: Any) -> None:
    """Raises ValueError for lr_scheduler_kwargs with which, or without which, there is no schedule.

    Of a schedule without arguments `effects` refuses them. args: a `TrOPDConfig`.
    """
    kind, given = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    known = arguments_of(kind)
    if not known:
        return
    takes = f"{kind.value!r}, which takes {', '.join(known)}"
    for name in given.keys() - set(known):
        raise ValueError(
            f"lr_scheduler_kwargs: {name!r} is no argument of lr_scheduler_type {takes}"
            f"{nearest(name, known)}"
        )
    # How long epochs are is not known yet.
    steps = args.max_steps if args.max_steps > 0 else 1_000_000
    warmup = args.get_warmup_steps(steps)
    try:
        made: Any = get_scheduler(
            kind, _optimizer(args.learning_rate), num_warmup_steps=warmup, num_training_steps=steps,
            scheduler_specific_kwargs=dict(given),
        )  # fmt: skip
        highest = made.lr_lambdas[0](warmup) if hasattr(made, "lr_lambdas") else 1.0
        # Those by a metric have one for each group of parameters.
        lowest = max(getattr(made, "min_lrs", None) or [given.get("min_lr") or 0.0])
        above = lowest > args.learning_rate
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs: {given} make no schedule of lr_scheduler_type {takes}: {error}"
        ) from error
    # A decay of so many steps may have begun before the run does; others are as long as the run.
    if "num_decay_steps" in given and warmup < args.max_steps and highest < 0.999:
        raise ValueError(
            f"lr_scheduler_kwargs: with {given} and warmup_steps {warmup} lr_scheduler_type "
            f"{kind.value!r} would have at most {highest:.1%} of learning_rate within max_steps "
            f"{steps}: shorten its parts"
        )
    if above:
        whose = "" if "min_lr" in given else "its default "
        raise ValueError(
            f"lr_scheduler_kwargs: with {whose}min_lr {lowest:g} lr_scheduler_type {kind.value!r} "
            f"would never lower the learning_rate, {args.learning_rate:g}: set min_lr below that"
        )


def _optimizer(rate: float) -> torch.optim.Optimizer:
    """With two groups, as transformers has them: with weight decay, and without."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    return torch.optim.SGD(groups, lr=rate)
