"""A rule of one's own as a config's `objective`: a `TokenRule`, its fields, or a schedule.

| given as                             | where                      | kept, and saved, as       |
|--------------------------------------|----------------------------|---------------------------|
| `TokenRule(gate="bernoulli", ...)`   | Python                     | the rule; all its fields  |
| `{"gate": "bernoulli", ...}`         | Python, YAML, JSON (a flag)| the rule; all its fields  |
| a function of progress (0 to 1)      | Python                     | `RuleSchedule`; its name  |

A schedule is asked for the rule of a step by the share of training before it, step / max_steps, and
nothing else of it is kept. No file holds a function: a resumed run is given the same one again.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from .. import objectives
from ..objectives import TokenRule
from ..objectives.registry import nearest

#: Where a schedule is read when a config is made: the settings are checked against these rules.
_READINGS = 100
#: What a config takes. HfArgumentParser reads a flag as text because of the None, which is refused.
Objective = dict | str | TokenRule | Callable[[float], TokenRule] | None
_NAMES = tuple(one.name for one in fields(TokenRule))


class RuleSchedule:
    """A function from progress (0 to 1) to a `TokenRule`, read and checked when it is made.

    Attributes:
        name: The function's, for messages, cards and files.
        rules: The different rules at progress 0, 0.01, ..., 1, in this order.

    Raises:
        ValueError: It fails, returns anything but a rule that a config can hold, or two rules for
            one progress. The text begins with "objective".
    """

    def __init__(self, function: Callable[[float], TokenRule]):
        self._function: Callable[[float], TokenRule] | None = function
        self.name = getattr(function, "__qualname__", None) or type(function).__qualname__
        read = {step / _READINGS: self(step / _READINGS) for step in range(_READINGS + 1)}
        self.rules = tuple(dict.fromkeys(read.values()))
        for place, rule in read.items():
            if self(place) != rule:
                raise ValueError(
                    f"objective: {self.name} gives different rules for progress {place:g}: let it "
                    "depend on progress alone, or a resumed run would train by other rules"
                )

    def __call__(self, progress: float) -> TokenRule:
        if self._function is None:
            raise ValueError(
                f"objective: the schedule {self.name} is a function, which is not saved: give it "
                "to the config again"
            )
        try:
            rule = self._function(progress)
        except Exception as error:
            raise ValueError(
                f"objective: {self.name}({progress:g}) fails with {type(error).__name__}: {error}: "
                "expected a function of progress, 0 to 1, that returns a TokenRule"
            ) from error
        if not isinstance(rule, TokenRule):
            raise ValueError(
                f"objective: {self.name}({progress:g}) returns {rule!r:.80}: expected a TokenRule"
            )
        _check_call(rule)
        return rule

    def __repr__(self) -> str:
        return f"RuleSchedule({self.name})"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same function: what others would give is not known at each progress."""
        return isinstance(other, RuleSchedule) and self._function == other._function

    __hash__ = object.__hash__

    def __deepcopy__(self, memory: Any) -> "RuleSchedule":
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the function, which pickle may refuse, or not find again."""
        return vars(self) | {"_function": None}


def read_objective(given: Any) -> str | TokenRule | RuleSchedule:
    """The objective of a config, in the form that it keeps.

    Raises ValueError, which begins with "objective", for what is no name, rule or schedule, for a
    field that a `TokenRule` refuses, and for a rule that reads what no config holds.
    """
    if isinstance(given, (str, RuleSchedule)):
        return given
    if isinstance(given, Mapping):
        given = _rule_of(given)
    if isinstance(given, TokenRule):
        _check_call(given)
        return given
    if callable(given):
        for name in objectives.__all__:
            if given is getattr(objectives, name):
                raise ValueError(f"objective: {name} makes a rule where it is called: {name}(...)")
        return RuleSchedule(given)
    raise ValueError(
        f"objective: expected a name, a TokenRule, a mapping of its fields, or a function of "
        f"progress that returns one; got {given!r:.80}"
    )


def saved_form(objective: Any) -> Any:
    """What stands for an objective in JSON: a rule's fields, from which the rule can be read."""
    if isinstance(objective, RuleSchedule):
        return {"schedule": objective.name}
    return asdict(objective) if isinstance(objective, TokenRule) else objective


def _rule_of(given: Mapping[str, Any]) -> TokenRule:
    if "schedule" in given:
        raise ValueError(
            f"objective: the schedule {given['schedule']!r} is a function, which no file holds: "
            "give it in Python, as objective=the function"
        )
    for name in given:
        if name not in _NAMES:
            raise ValueError(
                f"objective: a TokenRule has no field {name!r}{nearest(name, _NAMES)}. The knobs "
                "of an objective with a name go into objective_kwargs"
            )
    try:
        return TokenRule(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective: {error}") from error


def _check_call(rule: TokenRule) -> None:
    """Refuses a rule that reads a tensor of each call which the trainer does not have."""
    for field, reads, argument in (
        ("divergence", rule.weighs_by_mixing, "mixing"),
        ("top_k_ids", rule.top_k_ids == "given", "ids"),
        ("reference_power", rule.reference_power != 0, "reference_teacher"),
        ("select_by", rule.select_by == "scores", "scores"),
    ):
        if reads:
            raise ValueError(
                f"objective: {field}={getattr(rule, field)!r} reads {argument}= in every call, "
                "which no config holds: choose another, or call linear_distillation_loss in a "
                "training loop of your own"
            )
