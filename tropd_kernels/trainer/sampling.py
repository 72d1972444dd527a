"""How the student samples: only as the trainer's config says, and what truncated sampling costs.

transformers merges three configs: the one that `generate` is given, the model's own for keys that
are unset there, then global defaults. No list of keys to neutralize is complete: the next release
adds one. Inside `pin_sampling_defaults` the model's own config is a fresh one, which adds only the
ids and switches of `_NEEDED`, and keys that transformers does not have.

The K1 estimate assumes that completions are samples of the student's p. With top_k, top_p or min_p
they are samples of mu = p / m on the kept ids S, with m = p(S), and its expected gradient is

    1/m sum_S p (lp - lq) grad lp       instead of       sum p (lp - lq) grad lp

so that ids outside S have no effect and the rest counts 1/m times; it is still 0 where p = q on S.
Passing log mu as `old_log_probs` would be worse. It weighs by the ratio m, but adds log m to the
reward: the gradient is that of m KL(mu || q), which pushes mass out of S even where p = q. So the
trainer warns, and logs m as `tropd/sampling_mass`, unless other settings (penalties, biases, beams)
have a part in S. Objectives without K1 compare whole distributions at each token, whichever id was
sampled.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    QuantizedCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .patching import replaced
from .sides import ModelSide

#: Keys that a model needs in order to run and no sampler reads. The trainer sets ends and padding.
_NEEDED = ("bos_token_id", "decoder_start_token_id", "use_cache")
#: Values of settings that sample from the student's whole distribution.
WHOLE: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1, None),
    "top_p": (1.0, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "do_sample": (True,),
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "typical_p": (1.0, None),
    "guidance_scale": (1.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "token_healing": (False, None),
    "watermarking_config": (None,),  # {} is a watermark, by transformers' defaults
} | dict.fromkeys(
    ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens",
     "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha", "presence_penalty",
     "frequency_penalty", "min_tokens"),  # the last three are vLLM's
    (0, None),
)  # fmt: skip
#: Caches that hold keys and values as they are; of others (quantized) the student reads roundings.
_EXACT_CACHES = (
    None, "dynamic", "offloaded", "static", "offloaded_static", "sliding_window", "hybrid",
    "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked",
)  # fmt: skip
#: Keys of generation_kwargs, of transformers and vLLM, that do not change the distribution.
_HARMLESS = {
    *_NEEDED, "cache_config", "max_cache_len",
    "prefill_chunk_size", "remove_invalid_values", "renormalize_logits", "seed",
    "prompt_lookup_num_tokens", "max_matching_ngram_size",  # a token is written only if it is drawn
    "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output",
    "logprob_token_ids", "skip_clone", "skip_reading_prefix_cache", "priority", "cache_salt",
}  # fmt: skip
#: Keys that both the config and its generation_kwargs have.
SHARED = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "cache_implementation",
)  # fmt: skip
#: Settings that only act where tokens are drawn.
OF_DRAWS = {
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
}  # fmt: skip
_TRUNCATING = {"top_k", "top_p", "min_p"}
#: Number of a micro-batch's tokens whose kept mass is computed, and how many at once.
_MASS_TOKENS, _AT_ONCE = 256, 32


def settings(args: Any) -> dict[str, Any]:
    """The student's sampling settings of a `TrOPDConfig`: generation_kwargs win, as in TRL."""
    return {name: getattr(args, name) for name in SHARED} | dict(args.generation_kwargs or {})


def off_policy_settings(args: Any) -> dict[str, Any]:
    """The settings that make completions samples of another distribution than the loss's."""
    plain = (args.temperature, None) if args.temperature == 1 else (args.temperature,)
    whole = WHOLE | {"temperature": plain, "cache_implementation": _EXACT_CACHES}
    given = settings(args)
    if _is_greedy(args):
        given = {name: value for name, value in given.items() if name not in OF_DRAWS}
    return {
        name: value
        for name, value in given.items()
        if name not in _HARMLESS and value not in whole.get(name, (None, [], {}))
    }


def _is_greedy(args: Any) -> bool:
    """Whether transformers generates the likeliest token, so that nothing is drawn."""
    return not settings(args).get("do_sample", True) and not args.use_vllm


def sampling_warning(args: Any) -> str | None:
    """The warning, if any, of K1 on completions that another distribution sampled."""
    sampled = args.lmbda > 0 and not args.precomputed_teacher
    rewarded = sampled and any(rule.policy_gradient for rule in args.rules())
    off = off_policy_settings(args) if rewarded else {}
    if not off:
        return None
    given = ", ".join(f"{name} {value!r:.40}" for name, value in off.items())
    mass = (
        "; tropd/sampling_mass says how much of it the sampler keeps"
        if truncating_warpers(args)
        else ""
    )
    return (
        f"{given}: completions are not sampled from the student's own distribution, as objective "
        f"{args.objective!r} takes them to be: the expected gradient of its K1 term is biased"
        f"{mass}. Leave the setting out, or choose an objective without K1 (gkd, reverse_kl)"
    )


def temperature_warning(args: Any) -> str | None:
    """The warning, if any, that completions are sampled at another temperature than was set."""
    given = settings(args)["temperature"]
    given = 1.0 if given is None else given
    if args.temperature in (1, given) or args.precomputed_teacher or _is_greedy(args):
        return None
    return (
        f"temperature: {args.temperature:g} is the loss's alone, for generation_kwargs have "
        f"completions sampled at {given:g}: leave one of the two out to have one temperature"
    )


def truncating_warpers(args: Any) -> list[Any]:
    """transformers' warpers of top_k, top_p and min_p that exclude ids, in the sampler's order, for
    logits over the loss's temperature.

    An empty list beside other settings of the sampler, which change the logits that these cut, or
    the ids that are left.
    """
    given = settings(args)
    found: dict[str, Any] = {}
    if _is_greedy(args) or off_policy_settings(args).keys() - _TRUNCATING - {"temperature"}:
        return []
    if given["top_k"] not in WHOLE["top_k"]:
        found["top_k"] = TopKLogitsWarper(given["top_k"])
    if given["top_p"] not in WHOLE["top_p"]:
        found["top_p"] = TopPLogitsWarper(float(given["top_p"]))
    if given["min_p"] not in WHOLE["min_p"]:
        found["min_p"] = MinPLogitsWarper(float(given["min_p"]))
    order = ("min_p", "top_k", "top_p") if args.use_vllm else ("top_k", "top_p", "min_p")
    warpers = [found[name] for name in order if name in found]
    temperature = 1.0 if given["temperature"] is None else given["temperature"]
    if warpers and temperature != args.temperature:
        warpers.insert(0, TemperatureLogitsWarper(temperature / args.temperature))
    return warpers


def check_cache(model: Any, config: GenerationConfig, device: torch.device) -> None:
    """Raises ValueError for a cache_implementation that this model, or this machine, does not have.

    transformers would ignore it, or fail at the first step. model: without PEFT's wrapper.
    """
    kind = config.cache_implementation
    if kind is None:
        return
    if config.use_cache is None and getattr(model.generation_config, "use_cache", None) is False:
        raise ValueError(
            f"cache_implementation: {kind!r} would have no effect: the student's generation_config "
            "has use_cache False: set use_cache true in generation_kwargs, or leave it out"
        )
    takes = getattr(model, "_supports_default_dynamic_cache", None)
    if takes is not None and not takes():
        raise ValueError(
            f"cache_implementation: {kind!r} would have no effect: a {type(model).__name__} has a "
            "state of its own: leave it out"
        )
    if kind.startswith("offloaded") and device.type == "cpu":
        raise ValueError(
            f"cache_implementation: {kind!r} moves the cache off a GPU, and this run is on a CPU: "
            "leave it out"
        )
    if kind == "quantized":
        given: dict[str, Any] = {"backend": "quanto"} | dict(config.cache_config or {})
        try:
            QuantizedCache(**({"config": model.config.get_text_config(decoder=True)} | given))
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(
                f"cache_implementation: 'quantized' with cache_config {given} fails: {error}"
            ) from error


def check_processors(model: Any, config: GenerationConfig) -> None:
    """Raises ValueError for values of generation_kwargs of which transformers makes no sampler.

    It would refuse them when the first prompt is generated from. model: without PEFT's wrapper.
    """
    config = copy.deepcopy(config)
    config._eos_token_tensor = torch.tensor(config.eos_token_id)
    some = torch.ones(1, 1, dtype=torch.long)
    try:
        model._get_logits_processor(
            config, input_ids_seq_length=1, encoder_input_ids=some, device="cpu", model_kwargs={}
        )
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs: transformers refuses them: {error}") from error


@torch.no_grad()
def kept_mass(
    student: ModelSide,
    own: Tensor,  # (B, C) bool: tokens that the student sampled
    vocab_size: int,  # higher ids are suppressed
    temperature: float,
    warpers: list[Any],
) -> Tensor:
    """The student's probability mass on the ids that the sampler keeps: sum and count, (2,).

    At most 256 evenly spaced tokens are looked at, 32 at a time: that bounds the logits' memory.
    """
    rows, weight = student.hidden[own], student.weight[:vocab_size]
    bias = None if student.bias is None else student.bias[:vocab_size]
    if len(rows) > _MASS_TOKENS:
        rows = rows[torch.linspace(0, len(rows) - 1, _MASS_TOKENS, device=rows.device).long()]
    mass = torch.zeros((), dtype=torch.float32, device=rows.device)
    for part in rows.split(_AT_ONCE):
        logits = torch.nn.functional.linear(part, weight, bias).float()
        logits = logits * student.logit_scale
        if student.softcap is not None:
            logits = student.softcap * torch.tanh(logits / student.softcap)
        logits = kept = logits / temperature
        for warper in warpers:
            kept = warper(None, kept)
        kept = logits.where(kept.isfinite(), -torch.inf)
        mass += (kept.logsumexp(-1) - logits.logsumexp(-1)).exp().sum()
    return torch.stack([mass, mass.new_tensor(float(len(rows)))])


@contextlib.contextmanager
def pin_sampling_defaults(model: Any) -> Iterator[None]:
    """Replaces the model's own `generation_config` inside, and restores it afterwards.

    The configs of submodules are replaced as well: PEFT's `generate`, and that of a multimodal
    wrapper, call the language model's. model: without accelerate's wrappers.
    """
    owners = [part for part in model.modules() if "generation_config" in vars(part)]
    with contextlib.ExitStack() as configs:
        for part in owners:
            plain = _plain(part.generation_config)
            configs.enter_context(replaced(part, generation_config=plain))
        yield


def _plain(own: GenerationConfig | None) -> GenerationConfig:
    """The `_NEEDED` keys of a model's own config, and those that only its own code reads."""
    plain = GenerationConfig()
    known = vars(plain).keys() - set(_NEEDED)
    for name, value in vars(own).items() if own is not None else ():
        if name not in known and not name.startswith("_") and value is not None:
            setattr(plain, name, value)
    return plain
