"""Keys of other configs and trainers, and where what they set belongs here."""

import functools
import inspect
from collections.abc import Iterable
from typing import TypeVar

from ..objectives.registry import nearest

T = TypeVar("T")

_LOADS = "in model_init_kwargs"
_QUANTISED = f"quantization_config {_LOADS}, for the student"
_COMPLETIONS = "leave it out: the loss is of the completions alone, and rows are not packed"
_OF_TRAINER = "to TrOPDTrainer"
#: What to give instead, or "leave it out" and why.
ANSWERS = {
    # Of transformers' and TRL's ways to load a model.
    "dtype": f"dtype {_LOADS}", "torch_dtype": f"dtype {_LOADS}",
    "attn_implementation": f"attn_implementation {_LOADS}",
    "device_map": f"device_map {_LOADS}", "model_revision": f"revision {_LOADS}",
    "load_in_4bit": _QUANTISED, "load_in_8bit": _QUANTISED, "use_bnb_nested_quant": _QUANTISED,
    "bnb_4bit_quant_type": _QUANTISED, "bnb_4bit_quant_storage": _QUANTISED,
    "quantization_config": _QUANTISED,
    # Of lengths.
    "max_length": "max_completion_length, which bounds what is written",
    "max_seq_length": "max_completion_length, which bounds what is written",
    "max_new_tokens": "max_completion_length", "max_tokens": "max_completion_length",
    "max_prompt_length": "a data set whose prompts are short enough: they are taken whole",
    # Of TRL's other trainers.
    "loss_type": "objective", "lambda": "lmbda", "seq_kd": "lmbda=0, for the teacher's texts",
    "epsilon": "clip_ratio_low in objective_kwargs, where the objective has it",
    "epsilon_high": "clip_ratio_high in objective_kwargs, where the objective has it",
    "num_generations_eval": "leave it out: an evaluation writes one completion of a prompt",
    "steps_per_generation": "gradient_accumulation_steps: each optimizer step writes its batch",
    "generation_batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    "sync_ref_model": "teacher_update_rate, with the teacher 'self'",
    "ref_model_mixup_alpha": "teacher_update_rate, with the teacher 'self'",
    "ref_model_sync_steps": "teacher_sync_steps, with the teacher 'self'",
    "mask_truncated_completions": "a max_completion_length that few completions reach",
    "packing": _COMPLETIONS, "padding_free": _COMPLETIONS, "eval_packing": _COMPLETIONS,
    "completion_only_loss": _COMPLETIONS, "assistant_only_loss": _COMPLETIONS,
    "dataset_text_field": "a data set with a column prompt",
    "chat_template_path": "a processing_class that has the template",
    # Of earlier versions of transformers, and of scripts.
    "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps, below 1 a share of all steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "batch_size": "per_device_train_batch_size", "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs", "lr": "learning_rate",
}  # fmt: skip
#: Arguments of the trainer, and keys of scripts that become one.
ARGUMENTS = {
    "model": "model", "model_name_or_path": "model", "teacher_model": "teacher_model",
    "dataset": "train_dataset", "dataset_name": "train_dataset", "dataset_config": "train_dataset",
    "dataset_train_split": "train_dataset", "dataset_test_split": "eval_dataset",
    "use_peft": "peft_config", "use_dora": "peft_config", "use_rslora": "peft_config",
    **{name: name for name in (
        "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers",
        "peft_config", "tools", "reward_funcs", "reward_processing_classes",
    )},
}  # fmt: skip


def answer(key: str) -> str:
    """What to give instead of another config's key; "" where that is not known."""
    if key.startswith("lora_"):
        key = "peft_config"
    argument = ARGUMENTS.get(key)
    return ANSWERS.get(key, "") if argument is None else f"{argument} {_OF_TRAINER}"


def advice(key: str, known: Iterable[str]) -> str:
    """' (give ...)' for another config's key, or ' (did you mean ...?)' for one that is spelled
    almost alike."""
    instead = answer(key)
    if not instead:
        return nearest(key, known, closeness=0.8)
    return f" ({instead})" if instead.startswith("leave") else f" (give {instead})"


def names_unknown_keys(cls: type[T]) -> type[T]:
    """Class decorator: a keyword that the constructor does not take raises TypeError with what to
    give instead."""
    init = cls.__init__
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def __init__(self, *values, **keywords):
        for key in keywords.keys() - set(known):
            raise TypeError(f"{cls.__name__}: unknown key {key!r}{advice(key, known)}")
        init(self, *values, **keywords)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls
