"""Which keys `generation_kwargs` takes.

They are those of transformers' GenerationConfig, or of vLLM's SamplingParams with use_vllm, without
the ones that would break the trainer.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import transformers
from packaging.version import Version
from transformers import GenerationConfig

from ..objectives.registry import nearest
from .sampling import OF_DRAWS, SHARED, WHOLE, settings

_LENGTH = "set max_completion_length"
_ONE_EACH = "each prompt gets one completion: for several repeat its row in the data set"
_IDS_ALONE = "the trainer reads the completions' ids alone: leave it out"
_NOT_COMPILED = "generation is never compiled: leave it out"
_ENDS = "completions end with a token: add it to the student's generation_config.eos_token_id"
_ASSISTED = "no assistant model is taken: leave it out"
_ENCODER = "it is of models with an encoder: leave it out"
_ON_THE_HUB = "transformers does it by code from the hub, which is not run here: leave it out"
_OF_THE_TOKENIZER = "prompts come as ids and are padded by the tokenizer's token: leave it out"
#: Keys that are refused, and what to do instead.
_NOT_TAKEN = {
    "max_length": _LENGTH, "max_new_tokens": _LENGTH, "max_tokens": _LENGTH,
    "num_return_sequences": _ONE_EACH, "n": _ONE_EACH,
    # A row that ends before the others is filled up with padding, known by that end alone.
    "eos_token_id": "set the student's generation_config.eos_token_id, which is read",
    "stop_strings": _ENDS, "stop": _ENDS, "stop_token_ids": _ENDS,
    "ignore_eos": "what follows an end is cut off: leave it out",
    "forced_eos_token_id": "an end that the model did not write would be learned",
    "max_time": "how much is written would depend on the machine: lower max_completion_length",
    "min_length": "it counts the prompt with its padding: set min_new_tokens",
    "encoder_repetition_penalty": "it favours the padding before a prompt: leave it out",
    "bos_token_id": _OF_THE_TOKENIZER, "pad_token_id": _OF_THE_TOKENIZER,
    "return_dict_in_generate": _IDS_ALONE, "output_scores": _IDS_ALONE,
    "output_logits": _IDS_ALONE, "output_attentions": _IDS_ALONE,
    "output_hidden_states": _IDS_ALONE,
    **dict.fromkeys(
        ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight",
         "target_lookbehind", "is_assistant", "speculation_type", "use_mtp"),
        _ASSISTED,
    ),
    **dict.fromkeys(
        ("penalty_alpha", "dola_layers", "force_words_ids", "constraints", "num_beam_groups",
         "diversity_penalty"),
        _ON_THE_HUB,
    ),
    "low_memory": "transformers' beam search takes it no more: leave it out",
    "token_healing": "the prompt's ids would not be the data set's: leave it out",
    "continuous_batching_config": "prompts are generated from in one batch: leave it out",
    "forced_bos_token_id": _ENCODER, "decoder_start_token_id": _ENCODER,
    "disable_compile": _NOT_COMPILED, "compile_config": _NOT_COMPILED,
    # vLLM's.
    "truncate_prompt_tokens": "the loss reads the whole prompt: cut it in the data set",
    "repetition_detection": _ENDS, "flat_logprobs": _IDS_ALONE, "output_kind": _IDS_ALONE,
}  # fmt: skip
#: Values with which a sampler behaves as without the key, of keys that `WHOLE` has not. Keys that
#: TRL sets itself (lengths, eos_token_id, disable_compile) have none: None would undo TRL's value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (1, None), "n": (1,), "ignore_eos": (False,),
    "length_penalty": (1, None), "temperature": (1, None),
    "stop": (None, []), "stop_token_ids": (None, []),
    "truncate_prompt_tokens": (None,), "repetition_detection": (None,),
    "flat_logprobs": (False,),
    **dict.fromkeys(
        ("stop_strings", "forced_eos_token_id", "max_time", "compile_config", "dola_layers",
         "force_words_ids", "constraints", "speculation_type", "continuous_batching_config",
         "bos_token_id", "pad_token_id"),
        (None,),
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
         "output_hidden_states", "early_stopping", "low_memory", "use_mtp", "renormalize_logits"),
        (False, None),
    ),
}  # fmt: skip
_OF_NO_SAMPLER = {"_from_model_config", "transformers_version"}
_NO_STATIC_CACHE = (None, "dynamic", "offloaded", "quantized")


def _searches_beams(given: Mapping[str, Any]) -> bool:
    return (given.get("num_beams") or 1) > 1


#: Keys of transformers that act beside others only: by all settings of the sampler, and what to do.
_CONDITIONS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool], str], ...] = (
    (("early_stopping", "length_penalty", "renormalize_logits"), _searches_beams,
     "it belongs to a beam search: set num_beams"),
    (("prompt_lookup_num_tokens",), lambda given: not _searches_beams(given),
     "a beam search looks nothing up: leave num_beams out"),
    (("max_matching_ngram_size",), lambda given: given.get("prompt_lookup_num_tokens") is not None,
     "it belongs to prompt_lookup_num_tokens: set that"),
    (("max_cache_len",), lambda given: given["cache_implementation"] not in _NO_STATIC_CACHE,
     "it belongs to a static cache: set cache_implementation 'static'"),
    (("cache_config",), lambda given: given["cache_implementation"] == "quantized",
     "it belongs to cache_implementation 'quantized': set that"),
    (("cache_implementation",), lambda given: given.get("use_cache") is not False,
     "with use_cache False there is no cache: leave that out"),
    (tuple(sorted(OF_DRAWS)), lambda given: given.get("do_sample", True),
     "with do_sample False nothing is drawn: leave that out"),
)  # fmt: skip
#: Keys of transformers with which generation fails beside another setting: by all settings of the
#: sampler, why, and the other setting.
_FAILING: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool], str, str], ...] = (
    (("prefill_chunk_size", "prompt_lookup_num_tokens"),
     lambda given: given.get("use_cache") is False, "goes on from a cache", "use_cache"),
    (("prompt_lookup_num_tokens",),
     lambda given: given["cache_implementation"] not in _NO_STATIC_CACHE,
     "takes back what is not drawn, which a static cache does not", "cache_implementation"),
)  # fmt: skip
#: Models in which the tokens of an image, or all of a prompt with one, attend to later ones.
_IMAGES_LOOK_AHEAD = {"gemma3", "molmo2", "paligemma"}
#: The first version of transformers whose source gives each chunk of a prompt its images.
_CHUNKS_OF_IMAGES = Version("5.23.0")
#: Keys of transformers and of vLLM that act from the student's first token on, or on what was
#: written before it.
_FROM_THE_FIRST_TOKEN = (
    "min_new_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty",
    "guidance_scale", "encoder_no_repeat_ngram_size",
    "min_tokens", "presence_penalty", "frequency_penalty", "structured_outputs", "guided_decoding",
    "thinking_token_budget",
)  # fmt: skip


def check_generation_keys(given: Mapping[str, Any], use_vllm: bool) -> None:
    """Raises ValueError for a key that would have no effect, or a wrong one.

    A GenerationConfig stores unknown keys unread; `vllm_keys` asks vLLM.
    """
    known = vars(GenerationConfig()).keys() - _OF_NO_SAMPLER
    for name, value in given.items():
        if name in _NOT_TAKEN and value not in _neutral(name):
            raise ValueError(f"generation_kwargs: {name!r} is not taken: {_NOT_TAKEN[name]}")
        if not use_vllm and name not in known:
            raise ValueError(
                f"generation_kwargs: {name!r} is no key of transformers' GenerationConfig"
                f"{nearest(name, known)}"
            )


def check_generation_conditions(args: Any) -> None:
    """Raises ValueError for a key of `generation_kwargs` that does nothing beside the other
    settings, or another thing than its name says. args: a `TrOPDConfig` whose keys are known."""
    own: Mapping[str, Any] = args.generation_kwargs or {}
    _check_given_once(args, own)
    if not args.use_vllm:
        _check_values(args, own)
        given = settings(args)
        if given["cache_implementation"] == "paged":
            raise ValueError(
                "cache_implementation: 'paged' would have no effect: prompts are generated from in "
                "one batch: choose another, or leave it out"
            )
        for names, acts, remedy in _CONDITIONS:
            for name in () if acts(given) else names:
                if own.get(name) not in (None, *_neutral(name)):
                    raise ValueError(
                        f"generation_kwargs: {name!r} would have no effect: {remedy}, or leave it "
                        "out"
                    )
        for names, fails, why, other in _FAILING:
            for name in names if fails(given) else ():
                if own.get(name) is not None:
                    raise ValueError(
                        f"generation_kwargs: {name!r} {why}, but {other} is {given[other]!r}: "
                        "leave out one of the two"
                    )
    if args.prefix_schedule == "none":
        return
    for name in _FROM_THE_FIRST_TOKEN:
        if own.get(name) not in (None, [], *_neutral(name)):
            raise ValueError(_behind_a_prefix(f"generation_kwargs: {name!r}"))
    if args.vllm_structured_outputs_regex is not None:
        raise ValueError(_behind_a_prefix("vllm_structured_outputs_regex:"))


def _check_values(args: Any, own: Mapping[str, Any]) -> None:
    """Raises ValueError for values that transformers refuses once the models are loaded, and for
    lengths that no completion reaches."""
    try:  # the cache is looked at with the model
        GenerationConfig(**{k: v for k, v in own.items() if k != "cache_implementation"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs: transformers refuses them: {error}") from error
    longest = args.max_completion_length
    shortest = own.get("min_new_tokens") or 0
    if shortest > longest:
        raise ValueError(
            f"generation_kwargs: 'min_new_tokens': with {shortest} no completion would end within "
            f"max_completion_length {longest}: lower it, or leave it out"
        )
    if 0 < (own.get("max_cache_len") or 0) <= longest:
        raise ValueError(
            f"generation_kwargs: 'max_cache_len' would have no effect: a static cache has room for "
            f"a prompt and max_completion_length {longest}: raise it, or leave it out"
        )
    if (decay := own.get("exponential_decay_length_penalty")) is not None:
        key = "generation_kwargs: 'exponential_decay_length_penalty'"
        pair = isinstance(decay, (list, tuple)) and len(decay) == 2
        if not (pair and all(isinstance(one, Real) for one in decay)):
            raise ValueError(f"{key}: expected a start in tokens and a factor, got {decay!r:.80}")
        if decay[0] >= longest:
            raise ValueError(
                f"{key} would have no effect: it begins after {decay[0]} tokens, and "
                f"max_completion_length is {longest}: lower the start, or leave it out"
            )


def _check_given_once(args: Any, own: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting of which `generation_kwargs` have another value.

    That one wins. The temperature is left out: the config's is the loss's, too.
    """
    defaults = {field.name: field.default for field in fields(args)}
    # A server that writes is sent the config's values alone.
    served = args.teacher_model_server_url is not None and args.is_guided
    for name in () if served else (own.keys() & set(SHARED)) - {"temperature"}:
        first, second = getattr(args, name), own[name]
        whole = WHOLE.get(name, ())
        if first not in (defaults[name], second) and not (first in whole and second in whole):
            raise ValueError(
                f"{name}: it is {first!r}, and {second!r} in generation_kwargs, which would be "
                "taken: give one of the two"
            )
    regex = args.vllm_structured_outputs_regex
    if regex is not None and "structured_outputs" in own:
        raise ValueError(
            f"vllm_structured_outputs_regex: it is {regex!r}, and generation_kwargs have "
            f"structured_outputs {own['structured_outputs']!r:.40}: give one of the two"
        )


def check_lookup(args: Any, evaluates: bool) -> None:
    """Raises ValueError where transformers would look up tokens in several prompts at once.

    args: a `TrOPDConfig`. evaluates: whether there is a data set for that.
    """
    if args.use_vllm or (args.generation_kwargs or {}).get("prompt_lookup_num_tokens") is None:
        return
    for rows, keys in (
        (args.per_device_train_batch_size * args.gradient_accumulation_steps,
         "per_device_train_batch_size and gradient_accumulation_steps"),
        (args.per_device_eval_batch_size if evaluates else 1, "per_device_eval_batch_size"),
    ):  # fmt: skip
        if rows != 1:
            raise ValueError(
                "generation_kwargs: 'prompt_lookup_num_tokens' goes with one prompt at a time, not "
                f"with {rows}: set {keys} to 1, or leave it out"
            )


def check_prefill(args: Any, config: Any, sees_images: bool) -> None:
    """Raises ValueError where a prompt that is read in chunks is not the one that the loss reads.

    args: a `TrOPDConfig`. config: the student's. sees_images: whether prompts go through a
    processor.
    """
    if args.use_vllm or (args.generation_kwargs or {}).get("prefill_chunk_size") is None:
        return
    text = config.get_text_config()
    images_look_ahead = (
        config.model_type in _IMAGES_LOOK_AHEAD
        or getattr(text, "use_bidirectional_attention", None) == "vision"  # Gemma 4's
    )
    if getattr(text, "prefix_lm", False) or (sees_images and images_look_ahead):
        raise ValueError(
            "generation_kwargs: 'prefill_chunk_size': in prompts some tokens of a "
            f"{config.model_type} model attend to later ones, which in chunks they would not, "
            "unlike in the loss: leave it out"
        )
    if sees_images and Version(transformers.__version__) < _CHUNKS_OF_IMAGES:
        raise ValueError(
            f"generation_kwargs: 'prefill_chunk_size': transformers {transformers.__version__} "
            f"loses the images of prompts that are read in chunks: take {_CHUNKS_OF_IMAGES} or a "
            "later one, or leave it out"
        )


def check_padding_is_no_end(args: Any, pad: int | None, ends: Collection[int]) -> None:
    """Raises ValueError for settings that take the padding before a prompt for tokens written.

    They would keep a padded row from ending where the padding is an end. args: a `TrOPDConfig`.
    """
    if pad not in ends:
        return
    given = settings(args)
    for name, counts in (
        ("repetition_penalty", given.get("repetition_penalty") not in WHOLE["repetition_penalty"]),
        ("no_repeat_ngram_size", given.get("no_repeat_ngram_size") == 1),
        ("encoder_no_repeat_ngram_size", given.get("encoder_no_repeat_ngram_size") == 1),
    ):
        if counts:
            raise ValueError(
                f"{name}: transformers counts the padding before a prompt as written, and the "
                f"tokenizer pads with {pad}, an end of completions, which padded rows would write "
                "less: give the tokenizer a pad_token of its own, or leave it out"
            )


def check_generation_ids(given: Mapping[str, Any], ends: Collection[int], vocab_size: int) -> None:
    """Raises ValueError for entries of which transformers drops a part without a word.

    given: `generation_kwargs` of which a sampler can be made. ends: Ids that end a completion.
    vocab_size: The student has the ids below.
    """
    for name, ids in _id_lists(given):
        key = f"generation_kwargs: {name!r}"
        if not ids:
            raise ValueError(f"{key}: an entry without ids has no effect: leave it out")
        for one in ids:
            if not isinstance(one, Integral) or not 0 <= int(one) < vocab_size:
                raise ValueError(
                    f"{key}: {one!r} is none of the student's ids, 0 to {vocab_size - 1}: leave it "
                    "out"
                )
        if name == "bad_words_ids" and len(ids) == 1 and ids[0] in ends:
            raise ValueError(
                f"{key}: {list(ids)} would have no effect: {ids[0]} ends a completion, and "
                "transformers lets an end pass: use 'suppress_tokens'"
            )
    biases = given.get("sequence_bias") or {}
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    seen: dict[tuple[int, ...], float] = {}
    for ids, bias in pairs:
        if tuple(ids) in seen:
            raise ValueError(
                f"generation_kwargs: 'sequence_bias': {list(ids)} has two biases, "
                f"{seen[tuple(ids)]} and {bias}: give one of the two"
            )
        if bias == 0:
            raise ValueError(
                f"generation_kwargs: 'sequence_bias': {list(ids)} has the bias 0, which has no "
                "effect: leave it out"
            )
        seen[tuple(ids)] = bias


def _id_lists(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each key's lists of ids, with the key."""
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if given.get(name):
            yield name, given[name]
    for ids in given.get("bad_words_ids") or ():
        yield "bad_words_ids", ids
    biases = given.get("sequence_bias") or ()
    for entry in biases:
        yield "sequence_bias", entry if isinstance(biases, Mapping) else entry[0]


def in_other_ids(config: GenerationConfig, ids: Sequence[int]) -> dict[str, Any]:
    """The attributes that hold ids, with `ids[i]` for each i; None for one that is empty.

    An entry with an i for which there is none cannot be written, and is left out.
    """

    def others(entry: Iterable[int]) -> list[int]:
        return [ids[i] for i in entry if i < len(ids)]

    def whole(entry: Iterable[int]) -> bool:
        return all(i < len(ids) for i in entry)

    biases = config.sequence_bias or {}
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    translated: dict[str, list[Any]] = {
        "suppress_tokens": others(config.suppress_tokens or ()),
        "begin_suppress_tokens": others(config.begin_suppress_tokens or ()),
        "bad_words_ids": [others(words) for words in config.bad_words_ids or () if whole(words)],
        "sequence_bias": [[others(words), bias] for words, bias in pairs if whole(words)],
    }
    return {name: value or None for name, value in translated.items()}


def _neutral(name: str) -> tuple[Any, ...]:
    return _NEUTRAL.get(name) or WHOLE.get(name, ())


def _behind_a_prefix(key: str) -> str:
    return (
        f"{key} goes by where the student begins to write, and would take the teacher's prefix for "
        "a part of the prompt: set prefix_schedule 'none', or leave it out"
    )
