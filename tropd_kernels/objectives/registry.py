"""Objectives by name, as a config or a command line gives them.

A name stands for a constructor of this package, and the objective's knobs are that constructor's
arguments; their defaults are the papers'. Two of them have fields of their own in the config,
because users know them by those names: `beta` and `prefix_weight`. This module only matches names
and says what goes with what.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

from . import named, named_divergences
from .divergences import DIVERGENCES
from .rule import TokenRule

#: Objectives that read a tensor which no config holds, and the call's argument for it.
OF_A_CALL = {
    "mixed": "mixing",
    "cadence": "mixing",
    "demopsd": "blending",
    "kdrl": "task_advantages",
    "opdvr": "task_advantages",
    "exopd": "reference_teacher",
}
#: What serves in a config that has reward functions.
_INSTEAD = {
    "kdrl": ", or set task_weight with another objective",
    "opdvr": ", or give reward functions and the objective {'reward_filter': 'agree_scaled'}",
}
#: Divergences over the vocabulary, each an objective by its own name, and the knobs of each.
_DIVERGENCE_KNOBS = {
    name: spec.knobs
    for name, spec in DIVERGENCES.items()
    if spec.ids != "top_k" and name not in OF_A_CALL
}

_NAMED: dict[str, Callable[..., TokenRule]] = {
    "tropd": named.TrOPD,
    "opd": named.OPD,
    "gkd": named_divergences.GKD,
    "eopd": named.EOPD,
    "entropy_opd": named.EntropyOPD,
    "reopold": named.REOPOLD,
    "clip_outlier": named.ClipOutlier,
    "mask_outlier": named.MaskOutlier,
    "aopd": named.AOPD,
    "tropd_aopd": named.TrOPD_AOPD,
    "power_opd": named.PowerOPD,
    "topd": named.TOPD,
    "log1p_opd": named.Log1pOPD,
    "tv_opd": named.TVOPD,
    "lsm": named_divergences.LSM,
    "mopd": named_divergences.MOPD,
    "topk_jsd": named_divergences.TopKJSD,
    "veto": named_divergences.Veto,
    "sft": named_divergences.SFT,
}
#: What builds the rule of each objective.
OBJECTIVES = _NAMED | {
    name: partial(named_divergences.Divergence, name) for name in _DIVERGENCE_KNOBS
}


@cache  # a config asks for them at every step
def knobs(objective: str) -> tuple[str, ...]:
    """Names of the arguments that this objective's constructor takes."""
    if objective in _DIVERGENCE_KNOBS:
        return _DIVERGENCE_KNOBS[objective]
    return tuple(inspect.signature(OBJECTIVES[objective]).parameters)


def required_knobs(objective: str) -> tuple[str, ...]:
    """Those without a default: the paper states no one value."""
    parameters = inspect.signature(OBJECTIVES[objective]).parameters
    return tuple(k for k in knobs(objective) if parameters[k].default is inspect.Parameter.empty)


def rewarded() -> list[str]:
    """The objectives that have a K1 reward."""
    some = {name: dict.fromkeys(required_knobs(name), 0.5) for name in OBJECTIVES}
    return [name for name in OBJECTIVES if build_rule(name, some[name]).policy_gradient]


def objectives_taking(knob: str) -> list[str]:
    """The objectives that take this knob."""
    return [name for name in OBJECTIVES if knob in knobs(name)]


def check_knobs(objective: str, given: Iterable[str], where: str) -> None:
    """Raises ValueError for the first knob that the objective does not take, naming it, `where` it
    was given, and the objectives that do take it."""
    for knob in given:
        if knob in knobs(objective):
            continue
        others = objectives_taking(knob)
        if others:
            raise ValueError(
                f"{where}: objective {objective!r} takes no {knob!r}; it belongs to "
                f"{', '.join(others)}"
            )
        every = sorted({name for other in OBJECTIVES for name in knobs(other)})
        raise ValueError(
            f"{where}: no objective has a knob {knob!r}{nearest(knob, every)}. {objective!r} takes "
            f"{', '.join(knobs(objective)) or 'none'}"
        )


def check_required(objective: str, given: Iterable[str], where: str) -> None:
    """Raises ValueError for knobs that have no default and were not given."""
    missing = [knob for knob in required_knobs(objective) if knob not in given]
    if missing:
        raise ValueError(
            f"{where}: objective {objective!r} needs {' and '.join(missing)}, which has no default"
        )


def check_objective(objective: str) -> None:
    """Raises ValueError for an unknown name, with the nearest known one, and for an objective that
    takes more than a config."""
    if objective in OF_A_CALL:
        raise ValueError(
            f"objective: {objective!r} reads {OF_A_CALL[objective]}= in every call, which no "
            "config holds: call linear_distillation_loss with it in a training loop of your own"
            f"{_INSTEAD.get(objective, '')}. "
            f"Known here: {', '.join(OBJECTIVES)}"
        )
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective: unknown {objective!r}{nearest(objective, OBJECTIVES)}. Known: "
            f"{', '.join(OBJECTIVES)}"
        )


def build_rule(objective: str, arguments: Mapping[str, Any]) -> TokenRule:
    """The `TokenRule` of a checked name with checked knobs; a wrong value of one raises."""
    if arguments.get("top_k_ids") == "given":
        raise ValueError(
            "top_k_ids='given' reads ids= in every call, which no config holds: choose 'teacher' "
            "or 'student', or call linear_distillation_loss in a training loop of your own"
        )
    return OBJECTIVES[objective](**arguments)


def nearest(name: Any, known: Iterable[str], closeness: float = 0.6) -> str:
    """' (did you mean ...?)', or nothing where no known name is near, whatever their case.

    closeness: as difflib counts it, from 0 to 1.
    """
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name).lower(), list(by_lower), n=1, cutoff=closeness)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
