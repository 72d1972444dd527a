"""Students that are refused before training: nothing to train, an optimizer of other parameters,
configs that cannot be saved, or a further loss, of the model itself or of its adapters."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub.errors import StrictDataclassError

from ..objectives.registry import nearest
from .patching import base_of
from .sampling import OF_DRAWS

#: PEFT's LoRA options with a loss that a training loop has to add, and the weights of that loss.
_OWN_LOSSES = {
    "kasa_config": ("beta", "gamma"),
    "monteclora_config": ("kl_loss_weight", "use_entropy"),
}


def check_trainable(model: torch.nn.Module) -> None:
    """Raises ValueError for a student in which no parameter would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: none of its parameters requires a gradient, so that nothing would be trained: "
            "an adapter is loaded for training by PeftModel.from_pretrained(..., "
            "is_trainable=True), other weights by requires_grad_(True)"
        )


def check_optimized(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises ValueError for a given optimizer without any of the parameters to train."""
    if optimizer is None:
        return
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if trained and trained.isdisjoint(held):
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} has none of the student's parameters that "
            "require a gradient: make it from the model that is given, with its adapter if there "
            "is one"
        )


def meet_student(model: torch.nn.Module, args: Any) -> list[str | None]:
    """Mends what would not be saved, and returns warnings. args: a `TrOPDConfig`."""
    return [_make_savable(model), _generate_warning(model, args), _targets_warning(model)]


def _make_savable(model: torch.nn.Module) -> str | None:
    """Mends a generation_config that transformers would not save, and returns a warning of it.

    Some published ones have values of sampling without do_sample. transformers refuses to save them
    once another value was set, as TRL sets the padding: a run would end at its first checkpoint, or
    after its last step. Such a config is made to sample; a greedy one loses the values.

    Raises ValueError for other configs that cannot be saved, unless adapters alone are saved.
    """
    base: Any = base_of(model)
    generation, warning = base.generation_config, None
    try:
        generation.validate(strict=True)
    except ValueError:
        before = dict(vars(generation))
        if generation.do_sample is None and generation.temperature != 0:
            generation.do_sample, what = True, "do_sample is now True in it"
        else:
            vars(generation).update(dict.fromkeys(OF_DRAWS & vars(generation).keys()))
            what = "being greedy it lost them"
        try:
            generation.validate(strict=True)
            warning = (
                "model: its generation_config has values of sampling without do_sample, with which "
                f"transformers would not save it: {what}. Completions are sampled as the trainer's "
                "own settings say"
            )
        except ValueError:  # for another reason, which transformers may let pass
            vars(generation).update(before)
    for name in () if is_peft_model(model) else ("generation_config", "config"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                getattr(base, name).save_pretrained(folder)
            except (ValueError, StrictDataclassError) as error:
                raise ValueError(
                    f"model: its {name} could not be saved after training, mend it: {error}"
                ) from error
    return warning


def _generate_warning(model: torch.nn.Module, args: Any) -> str | None:
    """The warning, if any, where something else than transformers' `generate` writes completions:
    the custom_generate of a repository whose code is trusted."""
    if args.use_vllm or args.precomputed_teacher or "generate" not in vars(base_of(model)):
        return None
    return (
        "model: it has a generate of its own, as from custom_generate/generate.py beside its "
        "weights, which writes the completions by settings of its own, though the loss takes them "
        "for the student's samples: `del model.generate` restores transformers'; or load it "
        "without trust_remote_code"
    )


def check_z_loss(model: torch.nn.Module) -> None:
    """Raises ValueError for a model that adds a z-loss to its own loss (Bamba)."""
    base = base_of(model)
    if weight := getattr(base, "z_loss_coefficient", None):
        raise ValueError(
            f"model: {type(base).__name__} has a z_loss_coefficient of {weight:g}, the weight of a "
            "loss over all tokens of prompts, completions and padding, which is not computed here: "
            "set model.z_loss_coefficient = 0, or for a model by name model_init_kwargs "
            '{"z_loss_coefficient": 0}; the z_loss of a rule is that loss over the tokens that '
            "count"
        )


@contextlib.contextmanager
def adapter_errors(config: Any) -> Iterator[None]:
    """Words for errors of making an adapter by this `peft_config` that say what to do for any
    model: TRL's of one on the head advises to take `lm_head` out of target_modules, where it need
    not be; PEFT's of a token beyond the embeddings names neither."""
    try:
        yield
    except IndexError as error:
        key, given = _trained_tokens(config)
        if not given:
            raise
        raise ValueError(
            f"peft_config: {key}: {error}: the embeddings have no such row: give ids that they "
            "have, or call model.resize_token_embeddings(len(tokenizer)) first"
        ) from error
    except ValueError as error:
        if not str(error).startswith("Applying a PEFT adapter to `lm_head`"):
            raise
        raise ValueError(
            "model: an adapter is on its output head, whose weight the loss reads without it: "
            "leave the head out of target_modules (and the embeddings, where ensure_weight_tying "
            "ties the head's adapter to theirs), or train head and embeddings whole by "
            "modules_to_save"
        ) from error


def check_saved_modules(model: torch.nn.Module) -> None:
    """Raises ValueError for names in an active adapter's modules_to_save that no module has: PEFT
    trains nothing more for them, and says nothing."""
    names = [name for name, _ in model.named_modules()]
    for adapter in _active_adapters(model):
        for wanted in getattr(adapter, "modules_to_save", None) or ():
            if not any(name.endswith(wanted) for name in names):
                known = {name.rpartition(".")[2] for name in names}
                raise ValueError(
                    f"peft_config: modules_to_save: no module is called {wanted!r}"
                    f"{nearest(wanted, known)}, so nothing would be trained for it: mend the name, "
                    "or leave it out"
                )


def _targets_warning(model: torch.nn.Module) -> str | None:
    """For names in an active adapter's target_modules that no module has, beside some that have:
    lists for many models are common."""
    names = [f".{name}" for name, _ in model.named_modules()]
    for adapter in _active_adapters(model):
        wanted = getattr(adapter, "target_modules", None)
        for target in sorted(wanted) if isinstance(wanted, (list, set, tuple)) else ():
            if not any(name.endswith(f".{target}") for name in names):
                return (
                    f"peft_config: target_modules: no module is called {target!r}, so nothing is "
                    "adapted for it: mend the name, or leave it out"
                )
    return None


def check_causal(model: torch.nn.Module, side: str, sees_images: bool) -> None:
    """Raises ValueError for a model of which tokens attend to later ones unless a processor says
    which are written (PaliGemma). side: how errors call it."""
    config: Any = base_of(model).config
    text = config.get_text_config()
    looks_ahead = getattr(text, "use_bidirectional_attention", None) is True
    causal = getattr(text, "is_causal", True) is not False
    if not causal or (looks_ahead and not sees_images):
        key = "use_bidirectional_attention" if causal else "is_causal False"
        raise ValueError(
            f"{side}: the tokens of this {config.model_type} model attend to later ones (its "
            f"config's {key}), so that the loss would read what was not written yet: choose "
            "another model, or, if it sees images, give its processor as processing_class"
        )


def check_task_type(model: torch.nn.Module) -> None:
    """Raises ValueError for an active adapter that says it is of a classifier or the like: it would
    be saved so, and loaded under a head that was not trained."""
    for adapter in _active_adapters(model):
        kind = getattr(adapter.task_type, "value", adapter.task_type)
        if kind not in (None, "CAUSAL_LM"):
            raise ValueError(
                f"peft_config: task_type {kind} is of another kind of model: set it to CAUSAL_LM, "
                "or leave it out"
            )


def check_prepared(model: Any, config: Any) -> None:
    """Raises ValueError for a `peft_config` that PEFT takes without a word and does not carry out:
    an initialisation from data (EVA, LoRA-GA) for which the model was not prepared, and negative
    ids of trained tokens."""
    key, tokens = _trained_tokens(config)
    if any(token < 0 for token in tokens):
        raise ValueError(
            f"peft_config: {key}: expected ids of 0 or more, got {min(tokens)}: give the ids of "
            "tokens in the embeddings"
        )
    init = getattr(config, "init_lora_weights", None)
    if init == "eva":
        remedy = "give as model the PeftModel on which initialize_lora_eva_weights was called"
    elif init == "lora_ga" and not _has_gradients(model):
        remedy = "give as model the one on which preprocess_loraga was called"
    else:
        return
    raise ValueError(
        f"peft_config: init_lora_weights={init!r} would have no effect, for it begins from data: "
        f"{remedy} (PEFT's), or leave it out"
    )


def _trained_tokens(config: Any) -> tuple[str, list[int]]:
    """The key of a `peft_config` with single tokens that are trained, and their ids."""
    for key in ("trainable_token_indices", "token_indices"):
        if given := getattr(config, key, None):
            parts = given.values() if isinstance(given, Mapping) else [given]
            return key, [token for part in parts for token in part]
    return "", []


def _has_gradients(model: Any) -> bool:
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return any(hasattr(module, "_peft_loraga_grad") for module in modules)


def check_adapters(model: torch.nn.Module, callbacks: Sequence[Any]) -> None:
    """Raises ValueError for an active PEFT adapter that needs more of a step than the task's loss.

    It has a further loss, or a budget that is redistributed between steps.
    """
    for adapter in _active_adapters(model):
        for key, weights in _OWN_LOSSES.items():
            given = getattr(adapter, key, None)
            if given is not None and any(getattr(given, weight) for weight in weights):
                raise ValueError(
                    f"peft_config: {key} has a loss of its own, which is not added here: switch "
                    f"{' and '.join(weights)} off in it, or leave {key} out"
                )
        classes = {one.__name__ for callback in callbacks for one in type(callback).__mro__}
        if getattr(adapter, "use_asa", False) and "AdamssAsaCallback" not in classes:
            raise ValueError(
                "peft_config: use_asa has no effect without PEFT's AdamssAsaCallback, which deals "
                "the subspaces out: add one to callbacks, or leave use_asa out"
            )


def _active_adapters(model: Any) -> list[Any]:
    """Their configs; none for a model without PEFT, or below one of PEFT's."""
    known = getattr(model, "peft_config", {})
    names = model.active_adapters if known else []
    if callable(names):  # transformers' own, for adapters that it has added itself
        names = names() if model._hf_peft_config_loaded else []
    return [known[name] for name in names]
