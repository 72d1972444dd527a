"""Temporary changes of objects and of a model's forwards, which end with their `with` block."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def base_of(model: Any) -> Any:
    """The causal LM itself, without PEFT's wrapper."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Sets attributes of an object inside, and restores them afterwards."""
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def keeping_forward(module: nn.Module) -> Iterator[None]:
    """Undoes afterwards what is done to the module's `forward` inside.

    TRL redirects it to the loss, and back only once the wrapper has come so far as to call it.
    """
    own = vars(module).get("forward")  # accelerate may have put one there
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def added_keywords(module: nn.Module, **keywords: Any) -> Iterator[None]:
    """Passes further keyword arguments to the module's forwards inside."""

    def add(module, arguments, given):
        return arguments, given | keywords

    hook = module.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Puts all modules in evaluation mode inside: no dropout, no noise (NEFTune's, a router's).

    And no checkpointing. TRL would switch that off itself, leave it so after an exception, and
    switch it on again without the options that transformers takes out of its arguments
    (every_n_layers). Nor a router's logits, which TRL's SFT leaves in a config: in generation
    transformers fails on them beside padding.
    """
    with contextlib.ExitStack() as modes:
        for part in model.modules():
            config = getattr(part, "config", None)
            for owner, mode in (
                (part, "training"), (part, "gradient_checkpointing"),
                (config, "output_router_logits"),
            ):  # fmt: skip
                if getattr(owner, mode, False) is True:
                    modes.enter_context(replaced(owner, **{mode: False}))
        yield
