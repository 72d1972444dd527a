"""Generation settings that save time and change nothing that is written, in models that take them.

`prefill_chunk_size` reads a prompt in parts, `prompt_lookup_num_tokens` several tokens at once.
Some models with a recurrent state fail at that (Mamba), others lose the state between two chunks
without a word (Jamba). No list says which: the model is asked, with a prompt of a few tokens.
Where processes share parameters, every forward is all processes', and a longer prompt has more of
them: there the settings are refused.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .patching import base_of, evaluation_mode
from .sampling import pin_sampling_defaults

_SHORTCUTS = ("prefill_chunk_size", "prompt_lookup_num_tokens")
#: Long enough for a lost state to show, and for chunks of two tokens; and what is written after it.
_PROMPT, _NEW = 17, 3
#: Relative deviation of logits that TF32 makes of another order of operations; halves make more.
_ROUNDING = 5e-3


@torch.no_grad()
def check_shortcuts(model: Any, config: GenerationConfig, sharded: bool) -> None:
    """Raises ValueError for a shortcut with which a model fails or writes another text, and for
    any of a model in shards.

    It takes a few forwards, and no random numbers.

    Args:
        model: Without accelerate's wrappers.
        config: How it is to generate.
        sharded: Whether its parameters are, or will be, shared among processes.
    """
    given = [name for name in _SHORTCUTS if getattr(config, name) is not None]
    if not given:
        return
    if sharded:
        raise ValueError(
            f"generation_kwargs: {given[0]!r}: under FSDP and ZeRO-3 all processes take part in "
            "each forward, and with it some would have more of them than others: leave it out"
        )
    kind = type(base_of(model)).__name__
    with pin_sampling_defaults(model), evaluation_mode(model):
        try:
            plain = _logits(model, config)
        except Exception:  # whatever fails without a shortcut has errors of its own
            return
        for name in given:
            # Two tokens stand for any number: what is lost is lost between two forwards.
            value = getattr(config, name)
            value = min(value, 2) if name == "prefill_chunk_size" else value
            key = f"generation_kwargs: {name!r}: a {kind}"
            try:
                found = _logits(model, config, **{name: value})
            except Exception as error:
                raise ValueError(f"{key} fails with it: {error}: leave it out") from error
            if config.cache_implementation != "quantized" and _differ(plain, found, model.dtype):
                raise ValueError(f"{key} writes another text with it than without: leave it out")


def _logits(model: Any, config: GenerationConfig, **shortcut: Any) -> Tensor:
    """Logits (T, V) of the likeliest continuation of two tokens in turn, T up to `_NEW`."""
    middle = base_of(model).config.get_text_config().vocab_size // 2
    ids = middle + torch.arange(_PROMPT, device=model.device)[None] % 2
    shared = ("use_cache", "cache_implementation", "cache_config", "max_matching_ngram_size")
    asked = GenerationConfig(
        do_sample=False, max_new_tokens=_NEW, pad_token_id=config.pad_token_id,
        disable_compile=True, return_dict_in_generate=True, output_logits=True, **shortcut,
        **{name: getattr(config, name) for name in shared},
    )  # fmt: skip
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                            generation_config=asked)  # fmt: skip
    return torch.cat(output.logits).float()


def _differ(plain: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by more than rounding, as far as they follow the same tokens."""
    rows = min(len(plain), len(found))
    plain, found = plain[:rows], found[:rows]
    same = (plain.argmax(-1) == found.argmax(-1)).cumprod(0)
    read = 1 + int(same[:-1].sum())  # the first row always follows the prompt
    bound = max(torch.finfo(dtype).eps ** 0.5, _ROUNDING)
    return bool((found[:read] - plain[:read]).norm() > bound * plain[:read].norm())
