"""How many tokens a model reads, as its config says.

`max_position_embeddings` alone is not the answer: rotary positions may be scaled beyond it, and a
model without positions has no such bound.
"""

from collections.abc import Mapping
from typing import Any

#: Models whose config gives a maximum though their layers have no positions that could run out:
#: recurrent ones, and those whose attention looks at distances or at the order alone.
_POSITION_FREE = {
    "bloom", "inkling_text", "inkling2_text", "inkling2_loop_text", "jamba", "kimi_linear",
    "nemotron_h", "rwkv", "zamba",
}  # fmt: skip
#: Decoders that count positions from the beginning of a padded row, whatever the attention mask
#: says, and take none from outside.
_COUNT_PADDING = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
    "pegasus", "plbart", "prophetnet", "roformer", "trocr", "whisper",
}  # fmt: skip
#: Models whose tables of distances or of masks are as long as a padded row.
_AS_WIDE_AS_THE_BATCH = {"mpt", "gpt_neo", "openai-gpt"} | _COUNT_PADDING


def counts_padding(config: Any) -> bool:
    """Whether padding on the left moves a model's positions, so that it gives other hidden states
    than for the row alone."""
    return config.get_text_config().model_type in _COUNT_PADDING


def context_of(config: Any) -> int | None:
    """The longest text in tokens, prompt and completion, or None where there is no bound or none
    that the config tells.

    config: of transformers. Scaling follows the convention that a factor multiplies the length of
    pretraining (YaRN, linear), unless `max_position_embeddings` has it already (Llama 3, LongRoPE).
    """
    config = config.get_text_config()
    if config.model_type == "mpt":  # its table of distances ends there
        return config.max_seq_len
    limit = getattr(config, "max_position_embeddings", None) or 0
    limit = limit or getattr(config, "max_target_positions", None) or 0  # Whisper's decoder
    if limit < 1 or _is_position_free(config):
        return None
    bounds = []
    for rope in _rope_parameters(config):
        # Gemma 3's maximum has its linear factor already.
        included = config.model_type == "gemma3_text" and rope.get("rope_type") == "linear"
        bounds.append(limit if included else _scaled(rope, limit))
    # The widest, for the other kinds of layers are those of a sliding window.
    return max((b for b in bounds if b is not None), default=None) if all(bounds) else None


def padded_context_of(config: Any) -> int | None:
    """How wide a batch may be with its padding, where a model counts that; else None."""
    config = config.get_text_config()
    return context_of(config) if config.model_type in _AS_WIDE_AS_THE_BATCH else None


def scale_changes_at(config: Any) -> int | None:
    """The length above which a row of a batch changes the rotary scale of all its rows, as in
    LongRoPE; None where no length does. Of several kinds of layers the first to change counts."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    changes = []
    for rope in _rope_parameters(config):
        kind = _rope_type(rope)
        if kind in ("longrope", "su"):
            changes.append(rope.get("original_max_position_embeddings") or limit)
        # HunYuan's alpha stands for one scale at all lengths.
        elif kind == "dynamic" and not (
            config.model_type.startswith("hunyuan") and rope.get("alpha")
        ):
            changes.append(limit)
    return min((length for length in changes if length is not None), default=None)


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
    """The bound under these rotary parameters, of which `limit` is the config's maximum."""
    kind = _rope_type(rope)
    factor = max(float(rope.get("factor") or 1.0), 1.0)
    original = rope.get("original_max_position_embeddings") or limit
    if kind in ("default", "proportional", "mrope"):
        return limit
    if kind in ("yarn", "linear"):
        return max(limit, int(factor * original))
    if kind in ("llama3", "longrope", "su"):
        return limit if original < limit else int(factor * limit)
    return None  # "dynamic" follows the text's length; of others nothing is known
