"""Reads from a Hugging Face causal language model what a fused loss needs.

A fused loss never sees logits. It takes hidden states and the head's weight, and computes

    logits = cap(logit_scale * (hidden @ weight.T + bias)),     cap(x) = softcap * tanh(x / softcap)

So everything that a model does to its logits after the matrix product must be read from the model
and passed on, or the loss trains a distribution that the model never samples from. Cohere
multiplies its logits, Granite divides them, HyperCLOVA X multiplies them by the attribute that
Granite divides by, MiniCPM divides the hidden states, Gemma caps, some models cut or mask columns,
and a multimodal wrapper may or may not do what its text model does.

`read_head` reads all this without running the model. One table, `_PATHS`, says for each model type
known to do more than a matrix product what it does and which attribute holds the number. Nothing
else is guessed: a config entry that looks as if it changed the logits, or a module that may lie
between backbone and head, is an error unless `verify=True` lets a tiny forward (`check_head`)
decide. Models are read by duck typing: neither transformers nor peft is imported here.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import FLOATS, without_autocast
from .gathering import gathered
from .summary import Summarized

__all__ = ["Head", "check_head", "read_head"]


@dataclass(frozen=True, eq=False, repr=False)
class Head(Summarized):
    """The output side of a causal language model, as a fused loss takes it.

    `weight` and `bias` are the model's own parameters, not copies, so gradients reach them. Rows
    from `vocab_size` on are padding (an embedding rounded up to a multiple, a config with a smaller
    vocabulary): pass `weight[:vocab_size]`, a view, to leave them out.

    Attributes:
        backbone: module whose `backbone(input_ids, ...).last_hidden_state` is `hidden`, (B, T, H).
        weight: (V, H), floating point.
        bias: (V,) or None.
        logit_scale: factor on `hidden @ weight.T + bias`, 1.0 for most models. A factor that the
            model applies to the hidden states instead is folded in.
        softcap: bound of the tanh that follows the scale, or None.
        vocab_size: number of usable ids: the smaller of V and the config's vocabulary.
    """

    backbone: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    vocab_size: int

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of `hidden` (*, H) by definition: (*, vocab_size), float32 or wider."""
        weight = _rows(self.weight, self.vocab_size)
        bias = None if self.bias is None else _rows(self.bias, self.vocab_size)
        with without_autocast(weight.device.type):
            logits = F.linear(hidden.to(weight.device, weight.dtype), weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class _Path:
    """How a model gets from hidden states to logits: names of attributes of its text config.

    An attribute that is None or absent is a step that the model leaves out.
    """

    times: str | None = None  # the logits, or the hidden states, are multiplied by it
    over: str | None = None  # they are divided by it
    cap: str | None = None  # then capped: cap * tanh(logits / cap)
    cut: str | None = None  # columns from here on are dropped
    harmless: str | None = None  # looks like a change of the logits, but is none


# Path: the values of config.model_type that take it. A multimodal model has a row only if all
# releases of transformers since 5.17 agree on it; else its text model's row is a mere candidate.
_ROWS = {
    _Path(times="logit_scale"): "cohere cohere2 cohere2_moe cohere_compass cohere_compass_text",
    _Path(over="logits_scaling"): "granite granite_swa granitemoe granitemoe_swa granitemoeshared "
    "granitemoehybrid granite4_vision granite_docling",
    _Path(times="logits_scaling"): "hyperclovax hyperclovax_vision_v2",
    _Path(times="lm_head_multiplier"): "falcon_h1",
    _Path(times="dim_model_base", over="hidden_size"): "minicpm minicpm3",
    _Path(cap="final_logit_softcapping"): "gemma2 gemma3_text gemma3n gemma3n_text gemma4 "
    "gemma4_text gemma4_unified gemma4_unified_text vaultgemma nanochat beam mistral_large4",
    _Path(cap="logits_soft_cap"): "recurrent_gemma",
    _Path(cap="output_logit_soft_cap"): "xlstm",
    _Path(times="output_multiplier", cap="final_logit_softcapping"): "muse_glimmer muse_spark",
    _Path(over="logits_mup_width_multiplier", cut="unpadded_vocab_size"): "inkling_text "
    "inkling_mm_model",
    _Path(cap="final_logit_softcapping", cut="unpadded_vocab_size"): "inkling2 inkling2_text",
    _Path(harmless="mup_enabled"): "afmoe",  # it scales the embeddings
}
_PATHS = {kind: path for path, kinds in _ROWS.items() for kind in kinds.split()}

# What no scale and no cap can express.
_REFUSED = {
    "chameleon": "it masks the logits of its image tokens",
    "prophetnet": "its head reads the predicting streams, not the last hidden state",
}

# Names of config entries that may change the logits, and of those that only sound like it.
_SUSPECT = re.compile(
    r"logit|soft_?cap|lm_head|mup|output_mult|output_scal|head_scal|head_mult|dim_model_base|unpad"
)
_INNOCENT = re.compile(r"attn|attention|router|gate|mlp|init|head_bias|tie|to_keep|logits$|loss")

_INSTEAD = "materialise its logits and use a loss that takes logits"


def read_head(model: nn.Module, verify: bool = False) -> Head:
    """Read backbone, head weight, logit scale, soft cap and usable vocabulary from a model.

    PEFT models are unwrapped; adapters inside the backbone stay at work. A head in
    `modules_to_save` is read as the active adapter's copy, or as the original while adapters are
    disabled: read it again after a switch.

    Args:
        model: a causal LM in the manner of Hugging Face: `.config`, `.base_model` and
            `.get_output_embeddings()`. Decoder-only; a multimodal one will do.
        verify: run `check_head` on the result. This settles what the config leaves open (an error
            otherwise), and only this sees a step that is hard-coded in a model unknown here, or
            what a hook on its head does.

    Returns:
        Head, with weight (V, H) and bias (V,) or None, sharing the model's memory.

    Raises:
        TypeError: not a causal LM; a DataParallel or DistributedDataParallel wrapper; a head that
            is not a plain `nn.Linear` (an adapter on it, a custom layer).
        ValueError: no output head; an encoder-decoder; prompt-learning adapters; a weight that is
            empty (partitioned), quantised, on the meta device or not 2-D; logits that a scale and a
            cap cannot express, or that the config leaves open; a failed check (with `verify`).
    """
    base = _unwrap(model)
    holder = base.get_output_embeddings()
    linear = _plain_linear(base, holder)
    backbone = _backbone(base, holder, linear)
    paths, doubts = _candidates(base, holder, backbone)
    if doubts and not verify:
        raise ValueError(
            f"{_name(base)}: the config does not settle how its logits are formed: "
            f"{'; '.join(doubts)}. Call read_head(model, verify=True): a tiny forward decides"
        )
    heads = [_assemble(base, path, backbone, linear) for path in paths]
    if not verify:
        return heads[0]
    for head in heads:
        try:
            check_head(base, head)
            return head
        except ValueError as error:
            failure = error
    raise failure


def current(head: Head, model: nn.Module) -> Head:
    """`head` with the parameters that `model` holds now: FSDP2 and ZeRO-3 put others in the place
    of those that `read_head` saw. A DTensor is gathered (see `gathering`): a collective.

    Raises what `read_head` raises for a weight that is not whole or no longer plain.
    """
    base = _unwrap(model)
    linear = _plain_linear(base, base.get_output_embeddings())
    bias = None if linear.bias is None else gathered(linear.bias)
    return replace(head, weight=gathered(linear.weight), bias=bias)


@torch.no_grad()
def check_head(model: nn.Module, head: Head | None = None, *, rtol: float | None = None) -> float:
    """Compare what `head` makes of the backbone's hidden states with the model's own logits.

    Runs the backbone once and the model once on eight token ids, in eval mode and without
    gradients, and leaves the model as it was. In the second run the hidden states are stretched
    until logits reach about ±64, so that a cap shows even with fresh weights. With FSDP or a
    sharded head every rank has to call it.

    Args:
        model: as in `read_head`.
        head: what to check; None reads it.
        rtol: largest difference allowed, relative to the largest value. None takes 2e-3, or 4 eps
            of the logits' or weight's dtype where that is more (bfloat16).

    Returns:
        The largest absolute difference between the two sets of logits.

    Raises:
        ValueError: a larger difference, shapes that do not fit, or logits that are all zero.
    """
    base = _unwrap(model)
    head = read_head(model) if head is None else head
    device = next(head.backbone.parameters()).device
    ids = torch.tensor([_probe_ids(base.config, head.vocab_size, 8)], device=device)
    inside: list[Tensor] = []

    def stretch(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        inside[:] = hidden, hidden * factor
        if isinstance(output, tuple):
            return (inside[1], *output[1:])
        output.last_hidden_state = inside[1]
        return output

    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        alone = _hidden(head.backbone(input_ids=ids))
        if alone.shape != (*ids.shape, head.weight.shape[1]):
            raise ValueError(
                f"{_name(base)}: its backbone gives hidden states {tuple(alone.shape)}, expected "
                f"{(*ids.shape, head.weight.shape[1])} to fit ids and head: {_INSTEAD}"
            )
        reach = replace(head, bias=None, softcap=None).logits(alone).abs().amax().item()
        if not 0.0 < reach < float("inf"):
            raise ValueError(
                f"{_name(base)}: the largest logit of a probe is {reach}, expected a finite "
                f"number above 0: load or initialise the weights first"
            )
        factor = 64.0 / reach
        with head.backbone.register_forward_hook(stretch):
            output = base(input_ids=ids)
    finally:
        for module in training:
            module.training = True

    theirs = output.logits if hasattr(output, "logits") else output[0]
    if theirs.shape[:-1] != ids.shape or theirs.shape[-1] < head.vocab_size:
        raise ValueError(
            f"{_name(base)}: its logits have shape {tuple(theirs.shape)}, expected "
            f"{tuple(ids.shape)} and at least vocab_size={head.vocab_size} columns: {_INSTEAD}"
        )
    eps = max(torch.finfo(t.dtype).eps for t in (theirs, head.weight))
    rtol = max(2e-3, 4 * eps) if rtol is None else rtol
    # A model that reaches into its backbone without calling it is compared as it stands.
    called, probe = inside or (alone, alone)
    _compare(f"{_name(base)}: its backbone called alone gives hidden states", alone, called, rtol)
    what = f"{_name(base)}: logit_scale={head.logit_scale:g} and softcap={head.softcap} give logits"
    return _compare(what, head.logits(probe), theirs[..., : head.vocab_size], rtol)


def _compare(what: str, ours: Tensor, theirs: Tensor, rtol: float) -> float:
    # Relative to ours, which are about 64: theirs may hold the huge negative numbers of a mask.
    allowed = rtol * ours.abs().amax().item()
    difference = (ours - theirs.to(ours.device)).abs().amax().item()
    if difference <= allowed:  # false for NaN too
        return difference
    raise ValueError(
        f"{what} that differ from the model's own by up to {difference:.3g}, where {allowed:.3g} "
        f"is allowed: the model does something that is not read here. Pass check_head a Head with "
        f"the right numbers, or {_INSTEAD}"
    )


def _unwrap(model: Any) -> Any:
    """The causal LM inside torch.compile and PEFT wrappers; an error for other wrappers."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"got a model in {_name(model)}, expected the bare model: pass model.module. Under "
            f"DistributedDataParallel call the backbone through the wrapper, or gradients are not "
            f"synchronised; DataParallel cannot do that: train with one process per GPU instead"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return _unwrap(model._orig_mod)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        adapter = model.active_peft_config
        kind = str(getattr(adapter, "peft_type", "")).rpartition(".")[2]
        why = None
        if getattr(adapter, "is_prompt_learning", False):
            why = "its virtual tokens shift hidden states against labels"
        elif _acts_around_the_model(model.base_model, adapter):
            why = "it works through the PEFT wrapper, which a call of the backbone skips"
        if why:
            tokens = getattr(adapter, "alora_invocation_tokens", None)
            activated = " with alora_invocation_tokens" if tokens else ""
            raise ValueError(
                f"got a {kind} adapter{activated}, expected plain LoRA or another in the layers: "
                f"{why}"
            )
        return _unwrap(model.get_base_model())
    wanted = ("config", "base_model", "get_output_embeddings")
    if missing := [name for name in wanted if not hasattr(model, name)]:
        raise TypeError(
            f"got a {_name(model)} without {', '.join(missing)}, expected a Hugging Face causal "
            f"LM: pass the model itself, not what holds it, or make a Head by hand"
        )
    return model


def _acts_around_the_model(tuner: Any, adapter: Any) -> bool:
    """Whether a PEFT adapter does something in the wrapper's forward: X-LoRA and Poly mix there,
    Shadow has a second network, aLoRA looks for its tokens, AdaLoRA adds a loss where it learns."""
    if getattr(adapter, "alora_invocation_tokens", None):
        return True
    owner = next(kind for kind in type(tuner).__mro__ if "forward" in vars(kind))
    if owner.__name__ == "AdaLoraModel":
        return not getattr(adapter, "inference_mode", False)
    return owner.__name__ not in ("BaseTuner", "Module")  # of the last: AdaptionPromptModel


def _plain_linear(base: Any, head: Any) -> nn.Linear:
    """The linear layer that makes the logits, with a whole floating-point weight (V, H)."""
    if head is None:
        raise ValueError(
            f"got a {_name(base)} without output head (get_output_embeddings() is None), expected "
            f"a causal LM: load it with AutoModelForCausalLM"
        )
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        copies, active = head.modules_to_save, head.active_adapters
        original = head.disable_adapters or not active or any(a not in copies for a in active)
        head = head.original_module if original else copies[active[0]]
    weight: Any = getattr(head, "weight", None)
    got = f"{_name(base)}: got a {_name(head)} as head"
    if hasattr(head, "token_adapter"):
        raise TypeError(
            f"{got}, which adds PEFT's trainable_token_indices of a tied embedding to the weight, "
            f"expected a plain nn.Linear: leave trainable_token_indices out and name the embedding "
            f"and the head in modules_to_save, or call merge_and_unload()"
        )
    if hasattr(head, "base_layer"):
        raise TypeError(
            f"{got}, an adapter layer, expected the bare linear layer: leave the head out of "
            f"target_modules (modules_to_save is fine), or call merge_and_unload()"
        )
    if isinstance(weight, Tensor):
        got += f", weight {_name(weight)} {tuple(weight.shape)}, {weight.dtype} on {weight.device}"
        if weight.numel() == 0 or weight.is_meta:
            raise ValueError(
                f"{got}, expected a whole (V, H) in memory: a weight partitioned by ZeRO-3 or FSDP "
                f"has to be gathered first (deepspeed.zero.GatheredParameters, FSDP."
                f"summon_full_params) and read inside; an offloaded one has to be loaded"
            )
        whole = type(weight) in (nn.Parameter, Tensor) or hasattr(weight, "full_tensor")
        if weight.dtype not in FLOATS or not whole:
            raise ValueError(
                f"{got}, expected floating point, not quantised: leave the head out of the "
                f"quantisation (llm_int8_skip_modules or modules_to_not_convert)"
            )
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or hasattr(head, "parametrizations"):
        raise TypeError(
            f"{got}, expected a plain nn.Linear (own forward, no parametrisation): replace it by "
            f"one, or {_INSTEAD}"
        )
    bias = None if head.bias is None else tuple(head.bias.shape)
    if weight.dim() != 2 or bias not in (None, tuple(weight.shape[:1])):
        raise ValueError(
            f"{got}, bias {bias}, expected (V, H) and (V,): gather flattened or sharded parameters"
        )
    return head


def _backbone(base: Any, holder: nn.Module, linear: nn.Linear) -> nn.Module:
    """The module that yields hidden states; get_decoder() would skip the tokens of images."""
    if any(getattr(config, "is_encoder_decoder", False) for config in _configs(base)):
        raise ValueError(f"got encoder-decoder {_name(base)}, expected decoder-only: {_INSTEAD}")
    backbone = base.base_model
    if backbone is base:  # base_model_prefix names no child, as in Llama 4
        others = [child for child in base.children() if child is not holder]
        backbone = others[0] if len(others) == 1 else base
    if any(module is linear for module in backbone.modules()):
        raise ValueError(
            f"got a {_name(base)} whose base_model ({_name(backbone)}) contains the output head, "
            f"expected one that stops before it: pass the language model inside, or {_INSTEAD}"
        )
    return backbone


def _candidates(base: Any, holder: nn.Module, backbone: nn.Module) -> tuple[list[_Path], list[str]]:
    """Paths that the logits may take, likeliest first, and reasons to doubt the first."""
    config, text = _configs(base)
    kind = str(getattr(config, "model_type", None))
    if kind in _REFUSED:
        raise ValueError(
            f"got {_name(base)} (model type {kind!r}), expected logits that a scale and a soft cap "
            f"express, but {_REFUSED[kind]}: {_INSTEAD}"
        )
    own = _PATHS.get(kind)
    path = own or _PATHS.get(str(getattr(text, "model_type", None)), _Path())
    read: list[str] = [name for name in vars(path).values() if name] if own else []
    doubts = [f"{_name(text)} has no {name}" for name in read if own and not hasattr(text, name)]
    for owner in (config,) if text is config else (config, text):
        for name, value in vars(owner).items():
            # A scale of 1, a cap of 0 and a switch that is off change nothing.
            telling = isinstance(value, int | float | list) and value not in (0, 1, [])
            suspect = _SUSPECT.search(name) and not _INNOCENT.search(name) and name not in read
            if suspect and (telling or value is True):
                doubts.append(f"{_name(owner)}.{name} = {value} may change them")
    for name, child in base.named_children():
        if child not in (holder, backbone) and next(child.parameters(), None) is not None:
            doubts.append(f"the module {name!r} may stand between backbone and logits")
    return [path] if own or path == _Path() else [path, _Path()], doubts


def _assemble(base: Any, path: _Path, backbone: nn.Module, linear: nn.Linear) -> Head:
    text = _configs(base)[1]
    names = (path.times, path.over, path.cap, path.cut)
    times, over, cap, cut = (getattr(text, name, None) if name else None for name in names)
    rows = (linear.weight.shape[0], getattr(text, "vocab_size", None), cut)
    scale = (1.0 if times is None else float(times)) / (1.0 if over is None else float(over))
    cap = None if cap is None else float(cap)
    return Head(backbone, linear.weight, linear.bias, scale, cap, min(n for n in rows if n))


def _configs(base: Any) -> tuple[Any, Any]:
    """The model's config, and the part of it for the text model (often the same)."""
    config = base.config
    if hasattr(config, "get_text_config"):
        return config, config.get_text_config(decoder=True)
    return config, getattr(config, "text_config", config)


def _probe_ids(config: Any, vocab_size: int, count: int) -> list[int]:
    """The first ids that no config entry names as a special token."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    values = [v for part in parts for name, v in vars(part).items() if "token" in name]
    special = [i for v in values for i in (v if isinstance(v, list | tuple) else [v])]
    return [i for i in range(vocab_size) if i not in special][:count]


def _rows(tensor: Any, count: int) -> Tensor:
    # A DTensor is gathered: all its ranks have to come here.
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)[:count]


def _hidden(output: Any) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def _name(value: Any) -> str:
    return type(value).__name__
