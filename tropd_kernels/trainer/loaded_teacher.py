"""A teacher in this process: loaded by its name, and refused where it cannot teach the student."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl.trainer.utils import create_model_from_path

from ..objectives.registry import nearest
from .sources import Loader, model_class, named_errors, teacher_options
from .student_checks import check_prepared

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def dtype_option(key: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with the dtype under `dtype`, the only spelling TRL reads.

    The dtype is "auto", None, a torch.dtype or its name. Raises ValueError, which begins with
    `key`, for another one and for two that differ.
    """
    options = dict(options)
    spelled = {name: options.pop(name) for name in ("dtype", "torch_dtype") if name in options}
    if not spelled:
        return options
    found = {name: _read_dtype(f"{key}: {name}", value) for name, value in spelled.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{key}: dtype {spelled['dtype']!r} and torch_dtype {spelled['torch_dtype']!r} are two "
            "spellings of one setting: give dtype"
        )
    return options | {"dtype": next(iter(found.values()))}


def check_options(key: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError, which begins with `key`, for configs among these arguments of
    `from_pretrained` that it could not take."""
    check_quantization(f"{key}: quantization_config", options.get("quantization_config"))
    check_generation_config(f"{key}: generation_config", options.get("generation_config"))


def check_quantization(key: str, value: Any) -> None:
    """Raises ValueError, which begins with `key`, for an invalid `quantization_config`."""
    if value is not None and not isinstance(value, (Mapping, QuantizationConfigMixin)):
        raise ValueError(
            f"{key}: expected a mapping with a 'quant_method', or a config of transformers' such "
            f"as BitsAndBytesConfig, got {value!r:.80}"
        )


def check_generation_config(key: str, value: Any) -> None:
    """Raises ValueError, which begins with `key`, for an invalid `generation_config`."""
    if value is None or isinstance(value, GenerationConfig):
        return
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{key}: expected a mapping, such as {{'eos_token_id': [2, 3]}}, got {value!r:.80}"
        )
    known = vars(GenerationConfig()).keys()
    for name in value:
        if name not in known:
            raise ValueError(f"{key}: it has no {name!r}{nearest(name, known)}: leave it out")
    try:
        GenerationConfig(**value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


def _read_dtype(what: str, value: Any) -> torch.dtype | str | None:
    if value is None or value == "auto":
        return value
    if isinstance(value, (str, torch.dtype)):
        name = str(value).removeprefix("torch.")
        if name in _DTYPES:
            return getattr(torch, name)
    raise ValueError(f"{what}: expected 'auto' or one of {', '.join(_DTYPES)}, got {value!r}")


def load_teacher(name: str, args: Any) -> PreTrainedModel:
    """Loads the model of this name with `args.teacher_model_init_kwargs`.

    Its dtype is the checkpoint's where those give none. args: a `TrOPDConfig`. Raises what
    transformers raises, with the key in front.
    """
    options = dtype_option("teacher_model_init_kwargs", teacher_options(args))
    if options.get("dtype") is None:
        options["dtype"] = "auto"  # transformers before 5 take None for float32
    # A device map does not work with several processes.
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    with named_errors(f"teacher_model: {name}", options):
        loader: Any = Loader(model_class(name, options))
        return create_model_from_path(name, loader, **options)


def check_own_weights(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Raises ValueError for a teacher that shares parameters with the student.

    Training, or an adapter, would change both, and they would never differ.
    """
    ours = {id(parameter) for parameter in student.parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in ours:
            raise ValueError(
                f"teacher_model: its {name} is the student's own tensor, so that the teacher would "
                "change with the student: load the teacher a second time"
            )


def check_dtypes(student: torch.dtype, teacher: torch.dtype) -> None:
    """Raises TypeError where only one head is float64, which the loss would refuse."""
    if (student == torch.float64) != (teacher == torch.float64):
        raise TypeError(
            f"teacher_model: its head is {teacher}, the student's {student}: float64 on one side "
            "alone; cast one of the models, or train under bf16"
        )


def check_models(model: Any, teacher: Any, args: Any, quantization: Any, peft_config: Any) -> None:
    """Raises TypeError for a model that cannot generate, ValueError for options of a loaded one,
    and for a `peft_config` that the model was not prepared for."""
    if not isinstance(model, str) and not hasattr(model, "generation_config"):
        raise TypeError(
            f"model: a {type(model).__name__} writes no text: load it with AutoModelForCausalLM"
        )
    for whose, given, key, value in (
        ("student", model, "model_init_kwargs", args.model_init_kwargs),
        ("student", model, "quantization_config", quantization),
        ("teacher", teacher, "teacher_model_init_kwargs", args.teacher_model_init_kwargs),
    ):
        if isinstance(given, torch.nn.Module) and value is not None:
            raise ValueError(
                f"{key}: the {whose} is already a model; leave {key} out, or give the {whose} "
                "by its name"
            )
    check_quantization("quantization_config", quantization)
    check_prepared(model, peft_config)
    refuse_compiled("model", model)
    refuse_compiled("teacher_model", teacher)


def refuse_compiled(key: str, model: Any) -> None:
    """Raises ValueError, which begins with `key`, for a model that torch.compile wraps."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{key}: torch.compile wraps it, and would compile nothing: the loss reaches the model "
            "below the wrapper: give that model, and compile its layers in their place "
            "(layer.compile())"
        )
