"""Switches off a model's dropout, in all the forms that models of transformers have."""

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability in the model to 0, permanently.

    Some models have layers of `nn.Dropout`. Others have a number that a module passes to
    `nn.functional.dropout` or to its attention (OPT, Llama), that drops whole layers (`layerdrop`),
    or that a forward reads from the config (Persimmon), which is saved with the model.
    """
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    configs = [getattr(module, "config", None) for module in modules]
    for holder in [*modules, *(c for c in configs if isinstance(c, PreTrainedConfig))]:
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)
