"""The command line's key `peft`: arguments of PEFT's LoraConfig, or true for all defaults."""

import importlib.util
import json
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator

from ..once import parse_json

#: Keys whose annotation is not what LoraConfig takes: whole numbers for lora_dropout, parts of one
#: for lora_alpha, and init_lora_weights has pissa_niter_16.
_OTHERWISE = {"r", "lora_alpha", "lora_dropout", "init_lora_weights"}


def lora_config(peft: Any) -> Any:
    """PEFT's LoraConfig for the value of the key `peft`; None without an adapter.

    Raises ValueError for a value that LoraConfig takes as it is, and which would fail late or be
    trained as something else.
    """
    if isinstance(peft, str):
        try:
            peft = parse_json(peft.lower() if peft.lower() in ("true", "false") else peft)
        except json.JSONDecodeError as error:
            raise ValueError(f"peft: expected true, false or JSON, got {peft!r}") from error
        except ValueError as error:
            raise ValueError(f"peft: {error}") from error
    if not peft:
        return None
    if not isinstance(peft, (bool, dict)):
        raise ValueError(f"peft: expected true, false or a mapping, got {peft!r}")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("peft: it is not installed: pip install peft")
    from peft import LoraConfig

    given = peft if isinstance(peft, dict) else {}
    if str(given.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(
            f"peft: peft_type: expected LORA, got {given['peft_type']!r}: other adapters are given "
            "to TrOPDTrainer as peft_config"
        )
    if type(given.get("r", 1)) is not int or given.get("r", 1) < 1:
        raise ValueError(f"peft: r must be a whole number of at least 1, got {given['r']!r}")
    for key in ("lora_alpha", "lora_dropout"):
        if type(given.get(key, 1)) not in (int, float):
            raise ValueError(f"peft: {key} must be a number, got {given[key]!r}")
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    try:
        config = LoraConfig(**(options | given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft: {error}") from error
    for key, kind in get_type_hints(LoraConfig).items():
        if key in given.keys() - _OTHERWISE:
            value = given[key]
            if isinstance(value, dict):  # of some of them PEFT makes a config
                value = getattr(config, key)
            elif isinstance(value, list):  # YAML and JSON have no tuples
                value = [tuple(item) if isinstance(item, list) else item for item in value]
            try:
                type_validator(key, value, kind)
            except TypeError:
                wanted = kind.__name__ if isinstance(kind, type) else str(kind)
                wanted = wanted.replace("typing.", "")
                raise ValueError(f"peft: {key} must be {wanted}, got {given[key]!r}") from None
    return config
