"""Recipes: the settings that a publication states, set at once and overruled key by key.

    tropd_paper          TrOPD (arXiv 2606.01249, section 5.1), with the rule `TrOPD.paper()`;
                         weight decay and the bound of the gradient's norm, of which that section
                         says nothing, are those of the authors' script, as reported
    tropd_official_code  the same settings, with the rule `TrOPD.official_code()`
    opd                  Thinking Machines' `tinker-cookbook`, with its learning rate of full
                         fine-tuning; that of a LoRA is 1e-4. Its Adam has the second beta of
                         `train_step` and, by tinker's default, gradients of any norm
    eopd                 EOPD (arXiv 2603.07079, table 9 in appendix A), as reported. The authors'
                         script is not in their repository: its weight decay may be verl's, 0.01
    reopold              the objective of arXiv 2603.11137, and no more: how its runs were optimized
                         is not known here

What a source does not state stays at TRL's default. The size of a run stays the user's, as it
follows from data and machine: steps, prompts a step and max_completion_length (TrOPD: 200 steps of
128 prompts, up to 8096 tokens; EOPD: 128 prompts in 4 steps, up to 4096 tokens, for 2 or 3 epochs).

A recipe sets keys that were not given. One that was given stays, also with its default's value.
In a saved config, which gives all keys, the recipe's name says that they hold it already.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..objectives import EOPD, OPD, REOPOLD, TokenRule, TrOPD
from ..objectives.registry import OBJECTIVES, build_rule, knobs, nearest
from .optimizers import NOT_ADAM


@dataclass(frozen=True)
class Recipe:
    """Settings of a run, the rule of its objective, and where they come from."""

    source: str
    objective: str
    rule: TokenRule
    settings: Mapping[str, Any]

    @property
    def keys(self) -> dict[str, Any]:
        """All that it sets, but for the objective's knobs."""
        return {"objective": self.objective, **self.settings}

    @property
    def knobs(self) -> dict[str, Any]:
        """The objective's knobs in which its rule differs from the defaults."""
        default, names = build_rule(self.objective, {}), knobs(self.objective)
        own = {name: getattr(self.rule, name) for name in names if hasattr(self.rule, name)}
        return {name: value for name, value in own.items() if value != getattr(default, name)}


_OF_TROPD = {
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "num_generations": 4,
    "temperature": 1.0,
    "prefix_schedule": "cosine",
    "prefix_relative": True,
}
_OF_OPD = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "max_grad_norm": 0.0,
    "num_generations": 4,
    "temperature": 1.0,
}
_OF_EOPD = {
    "learning_rate": 3e-6,
    "lr_scheduler_type": "cosine",
    "num_generations": 1,
    "temperature": 1.0,
}
RECIPES = {
    "tropd_paper": Recipe("arXiv 2606.01249", "tropd", TrOPD.paper(), _OF_TROPD),
    "tropd_official_code": Recipe(
        "arXiv 2606.01249, its code as reported", "tropd", TrOPD.official_code(), _OF_TROPD
    ),
    "reopold": Recipe("arXiv 2603.11137", "reopold", REOPOLD(), {}),
    "eopd": Recipe("arXiv 2603.07079", "eopd", EOPD(), _OF_EOPD),
    "opd": Recipe("tinker-cookbook, for full fine-tuning", "opd", OPD(), _OF_OPD),
}


class Applied(str):
    """The name of a recipe in a config that has its settings."""


_APPLIED = " (applied)"


def saved_name(recipe: str | None) -> str | None:
    """A config's recipe as JSON holds it. Its reader is given all keys, as by a parser that knows
    nothing of the recipe, but they hold it already, as far as it was not overruled."""
    return f"{recipe}{_APPLIED}" if isinstance(recipe, Applied) else recipe


def apply_recipe(config: Any, given: Collection[str]) -> None:
    """Sets the keys of a new config's recipe that were not given, but for the objective's knobs.

    Raises ValueError for an unknown recipe, and for one of which nothing is left.
    """
    if config.recipe is None or isinstance(config.recipe, Applied):
        return
    name = config.recipe.removesuffix(_APPLIED)
    saved = name != config.recipe
    recipe = RECIPES.get(name)
    if recipe is None:
        raise ValueError(
            f"recipe: unknown {name!r}{nearest(name, RECIPES)}. Known: {', '.join(RECIPES)}"
        )
    config.recipe = Applied(name)
    left = recipe.keys.keys() - given - _pointless(config, given)
    for key in left:
        setattr(config, key, recipe.keys[key])
    if not left and not saved and overruled(config):
        raise ValueError(
            f"recipe: it would have no effect: all that {name!r} sets is given as well "
            f"({', '.join(recipe.keys)}): leave recipe out. A parser of TRL's or transformers' "
            "gives every key; `tropd train` gives those of its flags and file"
        )


def apply_knobs(config: Any) -> None:
    """Adds the recipe's knobs to the objective_kwargs, a mapping or None, that lack them."""
    recipe = RECIPES.get(config.recipe)
    if not recipe or not recipe.knobs or config.objective != recipe.objective:
        return
    own, given = recipe.knobs, config.objective_kwargs or {}
    # As `TrOPD` does with its defaults: what the given ones leave without effect is dropped.
    if given.get("gate") == "always":
        own = {}
    elif given.get("outlier") in ("mask", "clip") or given.get("top_k", "") is None:
        del own["top_k_tail"]
    config.objective_kwargs = own | given


def _pointless(config: Any, given: Collection[str]) -> set[str]:
    """Keys that the given ones leave without effect."""
    keys = _of_another_optimizer(config)
    # With lmbda 0 all completions of a prompt may be one text, the data set's.
    if config.precomputed_teacher or config.lmbda == 0:
        keys |= {"num_generations", "prefix_schedule", "prefix_relative"}
    if "prefix_relative" in given and not (config.prefix_relative or config.prefix_length):
        keys.add("prefix_schedule")
    if config.prefix_length or ("prefix_schedule" in given and config.prefix_schedule == "none"):
        keys.add("prefix_relative")
    return keys


def overruled(config: Any) -> list[str]:
    """The keys of its recipe that have other values."""
    keys, idle = RECIPES[config.recipe].keys, _of_another_optimizer(config)
    return [key for key in keys if key not in idle and getattr(config, key) != keys[key]]


def _of_another_optimizer(config: Any) -> set[str]:
    """Keys of recipes that the config's optimizer does not take."""
    return {"adam_beta2"} if getattr(config.optim, "value", config.optim) in NOT_ADAM else set()


def sets(config: Any, key: str) -> bool:
    """Whether a key has its value of the config's recipe."""
    settings = RECIPES[config.recipe].settings if config.recipe else {}
    return key in settings and getattr(config, key) == settings[key]


def how_to_unset(config: Any, key: str) -> str:
    """What to do, for an error, so that a key has its default."""
    if config.recipe is not None and key in RECIPES[config.recipe].settings:
        return f"give {key} its default, beside recipe {str(config.recipe)!r}"
    return f"leave {key} out"


def describe(config: Any, unused: Collection[str] = ()) -> str:
    """What the recipe of a config says, and what the user set otherwise, in Markdown.

    unused: keys of it which the optimizer given to the trainer has itself.
    """
    recipe, other = RECIPES[config.recipe], overruled(config)
    without = {*other, *_of_another_optimizer(config), *unused}
    shown = _shown({key: getattr(config, key) for key in recipe.settings if key not in without})
    changed = {key: getattr(config, key) for key in other}
    if config.objective == recipe.objective:
        own = _knob_values(recipe.objective, recipe.rule, recipe.knobs)
        listed = ", ".join(f"{k}={value!r}" for k, value in own.items() if value is not None)
        shown.insert(0, f"`{recipe.objective}({listed})`")
        given = dict(config.objective_kwargs or {})
        if config.beta is not None:
            given["beta"] = config.beta
        values = _knob_values(config.objective, config.rule_of_all(), given)
        changed |= {k: value for k, value in values.items() if k not in own or own[k] != value}
    text = f"Recipe `{config.recipe}` ({recipe.source}): {', '.join(shown) or 'nothing'}."
    if changed:
        text += f" Overruled: {', '.join(_shown(changed))}."
    if unused:
        left = _shown({key: getattr(config, key) for key in recipe.settings if key in unused})
        text += f" Not applied, as the trainer is given its optimizer: {', '.join(left)}."
    return text


def _knob_values(objective: str, rule: TokenRule, given: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's knobs: a rule's fields of their names, and what was given of the others."""
    takes = inspect.signature(OBJECTIVES[objective]).parameters
    values = {k: getattr(rule, k, given.get(k, one.default)) for k, one in takes.items()}
    if "stage" not in given:  # the trainer switches it
        values.pop("stage", None)
    return values


def _shown(settings: Mapping[str, Any]) -> list[str]:
    return [f"`{key}={getattr(value, 'value', value)!r}`" for key, value in settings.items()]
