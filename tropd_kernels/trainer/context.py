"""How many tokens a model reads, as its config says, and what is refused for exceeding it.

`max_position_embeddings` alone does not decide it: rotary positions may be scaled beyond it, and a
model without positions has no such limit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedTokenizerBase

#: Models whose config states a maximum although no layer has a limited table of positions: they
#: are recurrent, or their attention uses only distances or the causal order.
_POSITION_FREE = {
    "bloom", "falcon_mamba", "inkling_text", "inkling2_text", "inkling2_loop_text", "jamba",
    "kimi_linear", "mamba", "mamba2", "nemotron_h", "rwkv", "zamba",
}  # fmt: skip
#: Decoders that count positions from the beginning of a padded row, ignore the attention mask in
#: that, and take no position_ids. DeepSeek-V4 counts so the windows that it compresses keys in.
_COUNT_PADDING = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "deepseek_v4", "marian", "mbart",
    "mvp", "pegasus", "plbart", "prophetnet", "roformer", "trocr", "whisper",
}  # fmt: skip
#: Models whose tables of distances or of masks are as long as a padded row.
_AS_WIDE_AS_THE_BATCH = {"mpt", "gpt_neo", "openai-gpt"} | _COUNT_PADDING


def counts_padding(config: Any) -> bool:
    """Whether padding on the left shifts a model's positions, and so changes its hidden states."""
    return config.get_text_config().model_type in _COUNT_PADDING


def context_of(config: Any) -> int | None:
    """The longest text in tokens, prompt and completion.

    A rotary scaling factor multiplies the length of pretraining (YaRN, linear, Gemma 4's), unless
    `max_position_embeddings` includes it already (Llama 3, LongRoPE). Command-R's config states its
    context as `model_max_length`. None where there is no limit or the config does not tell it.
    """
    config = config.get_text_config()
    if config.model_type == "mpt":  # its table of distances ends there
        return config.max_seq_len
    limit = getattr(config, "max_position_embeddings", None) or 0
    limit = limit or getattr(config, "max_target_positions", None) or 0  # Whisper's decoder
    if limit < 1 or _is_position_free(config):
        return None
    bounds, ropes = [], _rope_parameters(config)
    if any(ropes):  # there is no table of positions that would end
        limit = max(limit, getattr(config, "model_max_length", None) or 0)
    for rope in ropes:
        # Gemma 3's maximum has its linear factor already.
        included = config.model_type == "gemma3_text" and rope.get("rope_type") == "linear"
        bounds.append(limit if included else _scaled(rope, limit))
    # The widest, for the other kinds of layers are those of a sliding window.
    return max((b for b in bounds if b is not None), default=None) if all(bounds) else None


def padded_context_of(config: Any) -> int | None:
    """The largest width of a padded batch, or None where the padding does not count."""
    config = config.get_text_config()
    return context_of(config) if config.model_type in _AS_WIDE_AS_THE_BATCH else None


def scale_changes_at(config: Any) -> int | None:
    """The length above which a row of a batch changes the rotary scale of all its rows, as in
    LongRoPE; None where no length does. Of several kinds of layers the first to change counts."""
    return min((length for _, length in _changing_scales(config)), default=None)


def _changing_scales(config: Any) -> Iterator[tuple[str, int]]:
    """The rotary scalings that depend on the text's length, "longrope" or "dynamic", and the length
    at which each begins to differ."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for rope in _rope_parameters(config):
        kind, length = _rope_type(rope), None
        if kind in ("longrope", "su"):
            kind, length = "longrope", rope.get("original_max_position_embeddings") or limit
        elif kind == "dynamic" and not _has_one_scale(config, rope):
            length = limit
        if length is not None:
            yield kind, length


def _has_one_scale(config: Any, rope: Mapping[str, Any]) -> bool:
    """Whether "dynamic" is HunYuan's name for one scale at all lengths, alpha's."""
    hunyuan = config.model_type.startswith("hunyuan") and rope.get("alpha")
    # Before, it was alpha's only up to the limit.
    return bool(hunyuan) and Version(transformers.__version__) >= Version("5.20.0")


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """The rotary parameters of a text config: one for each kind of layer, or one for all."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [part for part in rope.values() if isinstance(part, Mapping)] or [rope]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _is_position_free(config: Any) -> bool:
    if config.model_type in _POSITION_FREE or getattr(config, "alibi", False):
        return True
    # Rotary positions that are switched off, in the whole model or layer by layer.
    if config.model_type == "olmo_hybrid":
        return (config.rope_parameters or {}).get("rope_theta") is None
    for layers in ("layer_rope_theta", "no_rope_layers"):  # the latter has 1 where a layer has them
        if (flags := getattr(config, layers, None)) and not any(flags):
            return True
    kind = getattr(config, "position_embedding_type", "rope")
    if config.model_type == "granitemoehybrid":
        return kind != "rope"
    return str(kind).lower() == "alibi" or getattr(config, "use_mem_rope", True) is False


def _scaled(rope: Mapping[str, Any], limit: int) -> int | None:
    """The limit under these rotary parameters, where `limit` is the config's maximum."""
    kind = _rope_type(rope)
    factor = max(float(rope.get("factor") or 1.0), 1.0)
    original = rope.get("original_max_position_embeddings") or limit
    if kind in ("default", "mrope"):
        return limit
    if kind in ("yarn", "linear", "proportional"):
        return max(limit, int(factor * original))
    if kind in ("llama3", "longrope", "su"):
        if original < limit:
            return limit
        # Without a factor nothing says where it ends, as in MiniCPM4's card.
        return int(factor * limit) if rope.get("factor") else None
    # "dynamic" follows the text's length. The scale by HunYuan's alpha may reach beyond the maximum
    # (Hunyuan-A13B reads 256K tokens by its authors). Of other rules nothing is known.
    return None


def check_context(
    prompt_ids: list[list[int]],
    completion: int,  # tokens
    configs: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[int] = (),
) -> None:
    """Raises ValueError where a prompt and a completion of full length exceed a model's context.

    An unknown context (`context_of`) is no limit. completion is 0 where the ids include it.
    prefixes: Lengths of the prefixes at the ends of the ids, if there are any; completion is what
    follows them.
    """
    for side, config in configs.items():
        context = context_of(config)
        for row, ids in enumerate(prompt_ids if context is not None else ()):
            if len(ids) + completion > context:
                start = tokenizer.decode(ids[:16])
                what, remedy = f"a prompt with its completion, {len(ids)} tokens,", ""
                if prefixes:
                    what = (
                        f"a prompt of {len(ids) - prefixes[row]} tokens, its prefix of "
                        f"{prefixes[row]} and {completion} more, which the batch's shortest prefix "
                        "leaves of max_completion_length,"
                    )
                    remedy = ", or lower max_completion_length or the prefixes' length"
                elif completion:
                    what = f"a prompt of {len(ids)} tokens and max_completion_length {completion}"
                    remedy = ", or lower max_completion_length"
                raise ValueError(
                    f"{what} exceed the {side}'s context of {context}: drop or cut the prompt that "
                    f"begins with {start!r}{remedy}"
                )


def check_lengths(
    prompt_ids: list[list[int]], configs: Mapping[str, Any], pad_to_multiple_of: int | None
) -> None:
    """Raises ValueError for prompts that need padding where a model's positions count it."""
    lengths = {len(ids) for ids in prompt_ids}
    if len(lengths) == 1 and not any(n % (pad_to_multiple_of or 1) for n in lengths):
        return
    for side, config in configs.items():
        if counts_padding(config):
            raise ValueError(
                f"the {side} is a {config.model_type} model, whose positions count the padding in "
                "front of a prompt, so that its hidden states would not be those of the prompt "
                "alone: choose another model, or give prompts of one length, without "
                "pad_to_multiple_of"
            )


def check_width(width: int, config: Any) -> None:
    """Raises ValueError for a micro-batch that is, with its padding, too wide for the model."""
    most = padded_context_of(config)
    if most is not None and width > most:
        raise ValueError(
            f"a micro-batch of {width} tokens a row, padding included, exceeds the {most} of a "
            f"{config.model_type} model, which counts padding: set per_device_train_batch_size 1, "
            "or leave pad_to_multiple_of out"
        )


def check_generated_width(
    prompt_ids: list[list[int]], tokens: int, config: Any, pad_to_multiple_of: int | None
) -> None:
    """Raises ValueError for prompts that, padded, leave too little room for so many new tokens."""
    most, multiple = padded_context_of(config), pad_to_multiple_of or 1
    kind = config.get_text_config().model_type
    width = -(-max(map(len, prompt_ids)) // multiple) * multiple
    if most is not None and width + tokens > most:
        raise ValueError(
            f"pad_to_multiple_of: prompts of {width} tokens, padding included, and {tokens} new "
            f"ones exceed the {most} of a {kind} model, which counts padding: leave it out, "
            f"give a divisor of {multiple}, or lower max_completion_length"
        )


def scale_warning(
    prompts: Sequence[int], rows: Sequence[int], configs: Mapping[str, Any]
) -> str | None:
    """The warning, if any, where positions of these rows are scaled by something else than the row.

    LongRoPE has one scale up to a length and another beyond, dynamic scaling one for each length
    beyond. transformers takes that of the longest row of a batch (dynamic: also of the batches
    before), and a text that grows over the length in generation keeps the keys of its beginning.
    A second forward for rows on the other side would mend the first of these alone, and hang where
    processes share parameters.

    Args:
        prompts: Lengths of the prompts, in tokens.
        rows: Of prompts and completions.
        configs: By side.
    """
    if not rows:
        return None
    for side, config in configs.items():
        for kind, change in _changing_scales(config):
            if max(rows) <= change or (kind == "longrope" and min(prompts) > change):
                continue
            apart = "otherwise than up to them" if kind == "longrope" else "by each length"
            remedy = " on one side" if kind == "longrope" else " within it"
            return (
                f"the {side} scales the positions of a whole batch by its longest row, beyond "
                f"{change} tokens {apart}, and this one has rows of {min(rows)} to {max(rows)} and "
                f"prompts from {min(prompts)} on: the others' losses are not those of the rows "
                "alone, and what was generated across that length was read at another scale. Keep "
                f"prompts and completions{remedy}, or choose a scaling that is the same at all "
                "lengths (YaRN)"
            )
    return None
