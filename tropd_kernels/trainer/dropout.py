"""Switches off a model's dropout, in all the forms that models of transformers have."""

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability in the model to 0, permanently.

    Some models have layers of `nn.Dropout`, or of a class of their own (PEFT's BOFT).
    Others have a number that a module passes to `nn.functional.dropout` or to its attention (OPT,
    Llama), that drops whole layers (`layerdrop`), or that a forward reads from the config
    (Persimmon), which is saved with the model; or a number for each adapter (PEFT's LoHa, LoKr).
    """
    modules = list(model.modules())
    for module in modules:
        named = "dropout" in type(module).__name__.lower()
        if isinstance(module, _DropoutNd) or (named and isinstance(vars(module).get("p"), float)):
            module.p = 0.0  # type: ignore[assignment]
    configs = [getattr(module, "config", None) for module in modules]
    for holder in [*modules, *(c for c in configs if isinstance(c, PreTrainedConfig))]:
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float | dict | list):
                setattr(holder, name, _zeroed(value))


def _zeroed(value: Any) -> Any:
    """The value with 0 for every float in it; what else is in it, a switch or a size, stays."""
    if isinstance(value, dict):
        return {key: _zeroed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_zeroed(part) for part in value]
    return 0.0 if isinstance(value, float) else value
