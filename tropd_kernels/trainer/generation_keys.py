"""Which keys `generation_kwargs` takes.

They are those of transformers' GenerationConfig, or of vLLM's SamplingParams with use_vllm, without
the ones that would break the trainer.
"""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from ..objectives.registry import nearest

_LENGTH = "set max_completion_length"
_ONE_EACH = "each prompt gets one completion: for several repeat its row in the data set"
_IDS_ALONE = "the trainer reads the completions' ids alone: leave it out"
_NOT_COMPILED = "generation is never compiled: leave it out"
_ENDS = "completions end with a token: add it to the student's generation_config.eos_token_id"
_ASSISTED = "no assistant model is taken: leave it out"
_ENCODER = "it is of models with an encoder: leave it out"
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
    "return_dict_in_generate": _IDS_ALONE, "output_scores": _IDS_ALONE,
    "output_logits": _IDS_ALONE, "output_attentions": _IDS_ALONE,
    "output_hidden_states": _IDS_ALONE,
    **dict.fromkeys(
        ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight",
         "target_lookbehind", "is_assistant"),
        _ASSISTED,
    ),
    "forced_bos_token_id": _ENCODER, "decoder_start_token_id": _ENCODER,
    "disable_compile": _NOT_COMPILED, "compile_config": _NOT_COMPILED,
}  # fmt: skip
_OF_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty",
             "low_memory")  # fmt: skip
#: Values of such keys with which a sampler behaves as without the key. Keys that TRL sets itself
#: (lengths, eos_token_id, disable_compile) have none: None would undo TRL's value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (1, None), "n": (1,), "ignore_eos": (False,),
    "length_penalty": (1, None), "num_beam_groups": (1, None), "diversity_penalty": (0, None),
    "stop": (None, []), "stop_token_ids": (None, []),
    **dict.fromkeys(("stop_strings", "forced_eos_token_id", "max_time", "compile_config"), (None,)),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
         "output_hidden_states", "early_stopping", "low_memory"),
        (False, None),
    ),
}  # fmt: skip
_OF_NO_SAMPLER = {"_from_model_config", "transformers_version"}


def check_generation_keys(given: Mapping[str, Any], use_vllm: bool) -> None:
    """Raises ValueError for a key that would have no effect, or a wrong one.

    vLLM itself refuses unknown keys; a GenerationConfig stores them unread.
    """
    known = vars(GenerationConfig()).keys() - _OF_NO_SAMPLER
    for name, value in given.items():
        if name in _NOT_TAKEN and value not in _NEUTRAL.get(name, ()):
            raise ValueError(f"generation_kwargs: {name!r} is not taken: {_NOT_TAKEN[name]}")
        if not use_vllm and name not in known:
            raise ValueError(
                f"generation_kwargs: {name!r} is no key of transformers' GenerationConfig"
                f"{nearest(name, known)}"
            )
    beams = [name for name in _OF_BEAMS if given.get(name) not in _NEUTRAL[name]]
    if beams and not use_vllm and (given.get("num_beams") or 1) == 1:
        raise ValueError(
            f"generation_kwargs: {beams[0]!r} would have no effect: it belongs to a beam search: "
            "set num_beams, or leave it out"
        )
