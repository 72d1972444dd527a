"""How the student samples: by the trainer's config alone, and what it costs to cut ids off.

transformers merges three configs: what `generate` is given, then, for every key that is unset
there, the model's own, then global defaults. No list of keys to neutralise is complete: the next
release adds one. Inside `plain_defaults` the model's own config is a fresh one, so that there is
nothing to merge but the ids and switches of `_NEEDED`, and keys that transformers does not have.

The K1 estimate takes completions for samples of the student's p. With top_k, top_p or min_p they
are samples of mu = p / m on the ids S that are kept, m = p(S), and its expected gradient is

    1/m sum_S p (lp - lq) grad lp       instead of       sum p (lp - lq) grad lp

so that ids outside S teach nothing and the rest counts 1/m times; it is still 0 where p = q on S.
log mu in the place of `old_log_probs` would be worse. It weighs by the ratio m, but adds log m to
the reward: the gradient is that of m KL(mu || q), which pushes mass out of S even where p = q. So
the trainer warns, and logs m as `tropd/sampling_mass`. Objectives without K1 compare whole
distributions at each token, whichever one was sampled.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

#: What a model needs in order to run, and no sampler looks at. Ends and padding are the trainer's.
_NEEDED = ("bos_token_id", "decoder_start_token_id", "use_cache")
#: Sampling from the student's whole distribution, as settings.
_WHOLE: dict[str, tuple[Any, ...]] = {
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
} | dict.fromkeys(
    ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens",
     "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha", "presence_penalty",
     "frequency_penalty", "min_tokens"),  # the last three are vLLM's
    (0, None),
)  # fmt: skip
#: Keys of generation_kwargs, transformers' and vLLM's, that change no distribution.
_HARMLESS = {
    *_NEEDED, "pad_token_id", "cache_implementation", "cache_config", "max_cache_len",
    "prefill_chunk_size", "remove_invalid_values", "renormalize_logits", "seed",
    "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens",
}  # fmt: skip
#: Settings that act on what is drawn alone.
_OF_DRAWS = {
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
}  # fmt: skip
#: Tokens of a micro-batch whose kept mass is looked at, and how many at once.
_LOOKED_AT, _AT_ONCE = 256, 32


def settings(args: Any) -> dict[str, Any]:
    """What decides how the student samples, of a TrOPDConfig: generation_kwargs win, as in TRL."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(args, name) for name in names} | dict(args.generation_kwargs or {})


def off_policy_settings(args: Any) -> dict[str, Any]:
    """Those settings under which completions are no samples of the distribution in the loss."""
    plain = (args.temperature, None) if args.temperature == 1 else (args.temperature,)
    whole, given = _WHOLE | {"temperature": plain}, settings(args)
    if is_greedy(given) and not args.use_vllm:  # nothing is drawn, of whichever ids
        given = {name: value for name, value in given.items() if name not in _OF_DRAWS}
    return {
        name: value
        for name, value in given.items()
        if name not in _HARMLESS and value not in ([], *whole.get(name, (None,)))
    }


def is_greedy(given: Mapping[str, Any]) -> bool:
    """Whether transformers writes the likeliest token: of `settings`."""
    return not given.get("do_sample", True)


def sampling_warning(args: Any) -> str | None:
    """What to warn of, once: K1 on completions that are sampled from another distribution."""
    sampled = args.lmbda > 0 and not args.precomputed_teacher
    off = off_policy_settings(args) if sampled and args.rule().policy_gradient else {}
    if not off:
        return None
    given = ", ".join(f"{name} {value!r:.40}" for name, value in off.items())
    mass = "; tropd/sampling_mass says how much of it the sampler keeps" if cuts(args) else ""
    return (
        f"{given}: completions are not sampled from the student's own distribution, as objective "
        f"{args.objective!r} takes them to be: the expected gradient of its K1 term is biased"
        f"{mass}. Leave the setting out, or choose an objective without K1 (gkd, reverse_kl)"
    )


def cuts(args: Any) -> list[Any]:
    """transformers' warpers of top_k, top_p and min_p, as far as they cut ids off, in the order in
    which the sampler applies them."""
    given = settings(args)
    found: dict[str, Any] = {}
    if is_greedy(given) and not args.use_vllm:
        return []
    if given["top_k"] not in _WHOLE["top_k"]:
        found["top_k"] = TopKLogitsWarper(given["top_k"])
    if given["top_p"] not in _WHOLE["top_p"]:
        found["top_p"] = TopPLogitsWarper(float(given["top_p"]))
    if given["min_p"] not in _WHOLE["min_p"]:
        found["min_p"] = MinPLogitsWarper(float(given["min_p"]))
    order = ("min_p", "top_k", "top_p") if args.use_vllm else ("top_k", "top_p", "min_p")
    return [found[name] for name in order if name in found]


@torch.no_grad()
def kept_mass(
    hidden: Tensor,  # (B, C, H)
    own: Tensor,  # (B, C) bool: tokens that the student sampled
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V)
    form: Mapping[str, Any],  # logit_scale, softcap, temperature
    warpers: list[Any],
) -> Tensor:
    """(2,): sum and count of the student's probability of the ids that the sampler keeps, over at
    most 256 evenly spaced tokens. The logits of 32 of them exist at once."""
    rows = hidden[own]
    if len(rows) > _LOOKED_AT:
        rows = rows[torch.linspace(0, len(rows) - 1, _LOOKED_AT, device=rows.device).long()]
    mass = torch.zeros((), device=hidden.device)
    for part in rows.split(_AT_ONCE):
        logits = torch.nn.functional.linear(part, weight, bias).float() * form["logit_scale"]
        if form["softcap"] is not None:
            logits = form["softcap"] * torch.tanh(logits / form["softcap"])
        logits = kept = logits / form["temperature"]
        for warper in warpers:
            kept = warper(None, kept)
        mass += (kept.logsumexp(-1) - logits.logsumexp(-1)).exp().sum()
    return torch.stack([mass, mass.new_tensor(float(len(rows)))])


@contextlib.contextmanager
def plain_defaults(model: Any) -> Iterator[None]:
    """Replaces the model's own `generation_config` inside, and puts it back afterwards.

    model: without the wrappers of accelerate. Those of its parts are replaced as well: PEFT's
    `generate` and that of a model around a language model call the one inside.
    """
    owners = [part for part in model.modules() if "generation_config" in vars(part)]
    before = [part.generation_config for part in owners]
    try:
        for part, own in zip(owners, before):
            part.generation_config = _plain(own)
        yield
    finally:
        for part, own in zip(owners, before):
            part.generation_config = own


def _plain(own: GenerationConfig | None) -> GenerationConfig:
    """What a model needs of its own config: of transformers' keys `_NEEDED`, and all that are none
    of transformers', since only code of the model reads those."""
    plain = GenerationConfig()
    known = vars(plain).keys() - set(_NEEDED)
    for name, value in vars(own).items() if own is not None else ():
        if name not in known and not name.startswith("_") and value is not None:
            setattr(plain, name, value)
    return plain


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts all modules in evaluation mode inside: neither dropout nor noise of training
    (NEFTune's, a router's) has a part in what is written."""
    training = [part for part in model.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
