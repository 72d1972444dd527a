"""How the student samples, and nothing else: no model's own `generation_config` takes part.

transformers merges three configs: what `generate` is given, then, for every key that is unset
there, the model's own, then global defaults. No list of keys to neutralise is complete: the next
release adds one. Inside `plain_defaults` the model's own config is a fresh one, so that there is
nothing to merge but the ids and switches of `_NEEDED`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

#: What a model needs in order to run, and no sampler looks at. Ends and padding are the trainer's.
_NEEDED = ("bos_token_id", "decoder_start_token_id", "use_cache")


@contextlib.contextmanager
def plain_defaults(model: Any) -> Iterator[None]:
    """Replaces the model's own `generation_config` inside, and puts it back afterwards.

    model: without the wrappers of accelerate. PEFT's has a base model with the config, but may have
    been given one of its own, which its `generate` hands down.
    """
    owners = [model.get_base_model()] if hasattr(model, "get_base_model") else []
    if not owners or "generation_config" in vars(model):
        owners.append(model)
    before = [getattr(owner, "generation_config", None) for owner in owners]
    needed = {name: getattr(before[-1], name, None) for name in _NEEDED}
    plain = GenerationConfig(**{name: value for name, value in needed.items() if value is not None})
    try:
        for owner in owners:
            owner.generation_config = plain
        yield
    finally:
        for owner, config in zip(owners, before):
            owner.generation_config = config
