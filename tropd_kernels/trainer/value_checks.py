"""Checks of single values: their types, and the numbers of TRL and transformers.

Each raises ValueError that begins with the key.
"""

import inspect
import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from ..once import parse_json

#: For each annotation the type that a field takes, and its name in errors.
TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    type(None): (type(None), ""),
}
#: Bounds of numbers of TRL and transformers. Beyond them some have another meaning without a word,
#: and others fail when training starts, in words that do not name the key.
_AT_LEAST = {
    "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1, "dataloader_num_workers": 0,
}  # fmt: skip
_WITHIN: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "neftune_noise_alpha",
                     "eval_delay"), (0.0, 1e9)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0.0, 0.999999)),
    "max_grad_norm": (0.0, math.inf), "seed": (0, 2**32 - 1),
}  # fmt: skip


def check_values(config: Any) -> None:
    """Checks values of TRL and transformers, whose own errors do not name the key."""
    check_numbers(config)
    _check_compilation(config)
    if not isinstance(config.output_dir, (str, os.PathLike, type(None))):
        raise ValueError(
            f"output_dir: expected a folder's name, got {config.output_dir!r}: in YAML put quotes "
            "around a date"
        )
    if config.output_dir is not None and os.path.isfile(config.output_dir):
        raise ValueError(f"output_dir: {config.output_dir} is a file: expected a folder")
    for key in ("accelerator_config", "fsdp_config"):
        value = getattr(config, key) or {}
        if isinstance(value, str) and value[0] != "{" and not os.path.isfile(value):
            raise ValueError(
                f"{key}: expected a mapping or a file of one: there is no file {value}"
            )
    given = config.report_to
    names = given if isinstance(given, list) else [given]
    known = list(INTEGRATION_TO_CALLBACK)
    if names not in (["none"], ["all"]) and not all(name in known for name in names):
        raise ValueError(
            f"report_to: expected 'none', 'all' or names out of {', '.join(known)}; got {given!r}"
        )


def _check_compilation(config: Any) -> None:
    """Before an earlier transformers puts the keys into the environment, where the next config is
    held against them."""
    nothing = (
        "it would compile nothing: the loss reaches the models below the wrapper that compiles"
    )
    if config.torch_compile or config.torch_compile_backend or config.torch_compile_mode:
        raise ValueError(
            f"torch_compile: {nothing}: leave out the keys that begin with torch_compile"
        )
    launched = "ACCELERATE_DYNAMO_BACKEND"
    if os.environ.get(launched, "no").lower() != "no":
        raise ValueError(
            f"{launched}: {nothing}: unset it, or leave dynamo_backend out of accelerate's launch "
            "and its config"
        )


def check_checkpointing(config: Any) -> None:
    """Raises ValueError for what torch's checkpoints do not take, which the first step would say,
    and for text in the place of a bool, which is true whatever it says."""
    known = inspect.signature(checkpoint).parameters.values()
    names = [one.name for one in known if one.kind is one.KEYWORD_ONLY]
    names += ["preserve_rng_state", "every_n_layers", "offload"]  # the latter are transformers'
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        given = getattr(config, key, None) or {}  # earlier transformers have the latter alone
        if isinstance(given, dict):  # transformers reads the words of JSON
            check_type(f"{key}: use_reentrant", given.get("use_reentrant"), [bool, type(None)])
        else:
            given = parse_json(given)
        for name in given.keys() - set(names):
            raise ValueError(
                f"{key}: {name!r} is no argument of a checkpoint, which takes {', '.join(names)}"
            )


def check_numbers(config: Any) -> None:
    for key, least in _AT_LEAST.items():
        if (value := getattr(config, key)) is not None:
            at_least(key, value, least)
    for key, (low, high) in _WITHIN.items():
        if (value := getattr(config, key)) is not None:
            within(key, value, low, high)
    if (limit := config.save_total_limit) is not None and limit < 1:
        raise ValueError(
            f"save_total_limit: must be at least 1 checkpoint, got {limit!r}: leave it out to keep "
            "all"
        )
    for key in ("save_steps", "eval_steps", "logging_steps"):
        by_steps = getattr(config, f"{key.removesuffix('steps')}strategy") == "steps"
        if by_steps and (value := getattr(config, key)) is not None and not value > 0:
            raise ValueError(
                f"{key}: must be positive, got {value!r}; {key.removesuffix('steps')}strategy 'no' "
                "leaves it undone"
            )
    if config.max_steps < 1 and config.max_steps != -1:
        raise ValueError(
            f"max_steps: must be at least 1, or -1 for num_train_epochs, got {config.max_steps!r}"
        )
    if config.max_steps == -1 and not config.num_train_epochs > 0:
        raise ValueError(
            f"num_train_epochs: must be positive, got {config.num_train_epochs!r}: nothing would "
            "be trained (evaluate() needs no epochs)"
        )
    # Aliases, of which transformers gives each the other's value.
    alias = getattr(config, "activation_checkpointing_kwargs", None)
    if alias and not (
        config.gradient_checkpointing
        if config.activation_checkpointing is None
        else config.activation_checkpointing
    ):
        raise ValueError(
            "activation_checkpointing_kwargs: it has an effect with activation_checkpointing True "
            "alone: set that, or leave activation_checkpointing_kwargs out"
        )
    for key in ("log_level", "log_level_replica"):
        if getattr(config, key) not in trainer_log_levels:
            raise ValueError(
                f"{key}: must be one of {', '.join(trainer_log_levels)}; got "
                f"{getattr(config, key)!r}"
            )
    for key in ("temperature", "repetition_penalty", "top_k", "top_p", "min_p"):
        setattr(config, key, sampling_value(key, key, getattr(config, key)))
    multiple: Any = config.pad_to_multiple_of  # text, from the command line
    if not (multiple in (None, "auto") or str(multiple).lower() in ("none", "null")):
        if not str(multiple).isdecimal() or int(multiple) < 1:
            raise ValueError(
                "pad_to_multiple_of: must be a whole number of at least 1, 'auto' or None, got "
                f"{multiple!r}"
            )
    limit = config.max_completion_length
    if limit is None or limit < 1:
        raise ValueError(f"max_completion_length: must be at least 1 token, got {limit!r}")


def within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # written so that NaN fails
        raise ValueError(f"{key}: must be in [{low:g}, {high:g}], got {value!r}")


def at_least(key: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{key}: must be a whole number of at least {low}, got {value!r}")


def sampling_value(name: str, key: str, value: Any) -> Any:
    """A sampler's setting in the type that samplers take. key: its name in errors."""
    if value is None:
        return None
    if name == "top_k":
        at_least(key, value, 0)
        return value
    within(key, value, 0.0, 1e9 if name in ("temperature", "repetition_penalty") else 1.0)
    if name in ("temperature", "repetition_penalty") and value == 0:
        raise ValueError(f"{key}: must be positive, got 0")
    return float(value)  # they refuse an int


def check_type(key: str, value: Any, kinds: Sequence[type]) -> None:
    """Raises ValueError for a value of none of these `TYPES`."""
    if isinstance(value, bool):  # which Python counts among the numbers
        fits = bool in kinds
    else:
        fits = isinstance(value, tuple(TYPES[kind][0] for kind in kinds))
    if not fits:
        words = " or ".join(TYPES[kind][1] for kind in kinds if kind is not type(None))
        raise ValueError(
            f"{key}: expected {words}, got {value!r:.80}: give that, or leave the key out"
        )
