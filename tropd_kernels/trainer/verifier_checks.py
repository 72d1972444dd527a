"""What a run refuses as reward functions, before any model is loaded."""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name, get_config_model_id

from ..objectives.registry import rewarded
from .data_checks import data_sets
from .sources import check_source

#: What GRPO passes to a function besides the data set's columns.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def find_functions(names: Sequence[str] | str | None) -> list | None:
    """Reward functions by the names that a command line gives; names of models stay names.

    One name may come without a list. A name without a dot is one of `trl.rewards`, as in TRL's
    scripts; a dotted one is looked up from the working directory, too. Raises ValueError for what
    is not found, or cannot be imported.
    """
    if names is None:
        return None
    found: list[Any] = []
    kinds = (
        "expected a function of trl.rewards, a dotted path (module.function), or a model (a "
        "folder, or owner/name)"
    )
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str):
            raise ValueError(f"reward_funcs: {kinds}, got {name!r}")
        if "/" in name or Path(name).is_dir():
            found.append(name)
            continue
        module, _, function = name.rpartition(".")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            found.append(getattr(importlib.import_module(module or "trl.rewards"), function))
        except Exception as error:  # whatever the user's module raises
            raise ValueError(
                f"reward_funcs: {name}: {type(error).__name__}: {error}: {kinds}"
            ) from error
    return found


def check_reward_funcs(
    given: Any, tokenizers: Any, args: Any, tools: Any, datasets: Mapping[str, Any]
) -> dict[str, Any]:
    """The reward functions by the names under which they are logged, before any model is loaded.

    Raises ValueError or TypeError, which names the argument, for what cannot be a reward function,
    cannot take the data sets' columns, or would have no effect; OSError for a model that is not
    there.
    """
    functions = [*given] if isinstance(given, (list, tuple)) else [given]
    functions = [] if given is None else functions
    reads = args.uses_task_advantages
    if not functions:
        if reads:
            raise ValueError(
                "reward_funcs: the objective has a task_weight or a reward_filter, which read a "
                "verifier's rewards: give reward_funcs to TrOPDTrainer"
            )
        if tokenizers is not None:
            raise ValueError("reward_processing_classes: there are no reward_funcs: leave it out")
        return {}
    if tools:
        raise NotImplementedError(
            "reward_funcs: TRL's distillation keeps no messages of the tools' turns, which GRPO's "
            "functions get: leave tools or reward_funcs out"
        )
    if not any(rule.policy_gradient for rule in args.rules()):
        raise ValueError(
            f"reward_funcs: they would have no effect: objective {args.objective!r} has no policy "
            f"gradient, which rewards enter: take one of {', '.join(rewarded())}, with "
            "task_weight, or leave reward_funcs out"
        )
    if args.precomputed_teacher:
        raise ValueError(
            "reward_funcs: with precomputed_teacher nothing is generated that they could judge: "
            "leave one of the two out"
        )
    if not reads:
        raise ValueError(
            f"reward_funcs: they would have no effect: objective {args.objective!r} has no "
            "task_weight: set task_weight (1 adds the advantages to the log-ratio), or leave "
            "reward_funcs out"
        )
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns: reward_funcs would not get the data set's columns: leave it out"
        )
    names = []
    for place, function in enumerate(functions):
        if isinstance(function, str):
            check_source("reward_funcs", function, {"trust_remote_code": args.trust_remote_code})
            names.append(function.rstrip("/").split("/")[-1])
            continue
        if not callable(function):
            raise TypeError(
                f"reward_funcs: number {place} is {function!r:.80}: expected a function, a model "
                "for sequence classification, or its name"
            )
        names.append(_name(function))
        if isinstance(function, nn.Module):
            _check_labels(names[-1], function)
            continue
        for where, _, columns in data_sets(datasets):
            if columns is not None:
                _check_columns(names[-1], function, where, columns)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"reward_funcs: two have the name {twice!r}, under which each is logged: give one of "
            "them another __name__"
        )
    for key, what in (("reward_weights", args.reward_weights),
                      ("reward_processing_classes", tokenizers)):  # fmt: skip
        count = len(what) if isinstance(what, (list, tuple)) else 1
        if what is not None and count != len(functions):
            raise ValueError(f"{key}: {count} for {len(functions)} reward_funcs: give one for each")
    return dict(zip(names, functions))


def _check_columns(name: str, function: Any, where: str, columns: Sequence[str]) -> None:
    """Refuses a function that cannot be called with the columns of a data set."""
    taken = sorted({*columns} & {*_GIVEN} - {"completion_ids"})
    if taken:
        raise ValueError(
            f"{where}: the column {taken[0]!r} has the name of what reward_funcs are called with: "
            "give it another one by rename_column()"
        )
    keywords = [*_GIVEN, *({*columns} - {"prompt", "completion", "completion_ids"})]
    try:
        inspect.signature(function).bind(**dict.fromkeys(keywords))
    except TypeError as error:
        raise TypeError(
            f"reward_funcs: {name}: {error}: it is called with {', '.join(keywords)}, the last of "
            f"them columns of {where}: let it take **kwargs, and only columns that are there"
        ) from error
    except ValueError:  # a function without a signature
        return


def _name(function: Any) -> str:
    if isinstance(function, nn.Module):
        return get_config_model_id(function.config).rstrip("/").split("/")[-1]  # type: ignore[arg-type]
    return get_callable_name(function)


def _check_labels(name: str, model: Any) -> None:
    labels = getattr(model.config, "num_labels", None)
    if labels != 1:
        raise ValueError(
            f"reward_funcs: the model {name} has {labels} labels, and a reward is one number: load "
            "it by AutoModelForSequenceClassification with num_labels=1"
        )
