"""A teacher that is given by name: how it is loaded into this process."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl.trainer.utils import create_model_from_path

from .sources import model_class, teacher_options

#: Errors of transformers that tell what is wrong, and not of which model.
_CLEAR = (ImportError, ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError)
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def dtype_option(key: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments of `from_pretrained` with the dtype under `dtype`, whichever of the two
    spellings it was given by: TRL looks at `dtype` alone.

    The dtype is "auto", None or a torch.dtype. Raises ValueError, which begins with `key`, for
    another one and for two that differ.
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


def check_quantization(key: str, value: Any) -> None:
    """Raises ValueError, which begins with `key`, for a `quantization_config` that is none."""
    if value is not None and not isinstance(value, (Mapping, QuantizationConfigMixin)):
        raise ValueError(
            f"{key}: expected a mapping with a 'quant_method', or a config of transformers' such "
            f"as BitsAndBytesConfig, got {value!r:.80}"
        )


def _read_dtype(what: str, value: Any) -> torch.dtype | str | None:
    if value is None or value == "auto":
        return value
    if isinstance(value, (str, torch.dtype)):
        name = str(value).removeprefix("torch.")
        if name in _DTYPES:
            return getattr(torch, name)
    raise ValueError(f"{what}: expected 'auto' or one of {', '.join(_DTYPES)}, got {value!r}")


def load_teacher(name: str, args: Any) -> PreTrainedModel:
    """The model of this name, by `args.teacher_model_init_kwargs`, in its checkpoint's dtype where
    those give none. args: a `TrOPDConfig`. Raises what transformers does, beginning with the key.
    """
    options = dtype_option("teacher_model_init_kwargs", teacher_options(args))
    if options.get("dtype") is None:
        options["dtype"] = "auto"  # transformers before 5 take None for float32
    # A map of devices cannot go with several processes.
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    try:
        return create_model_from_path(name, model_class(name, options), **options)
    except _CLEAR as error:
        if type(error) not in _CLEAR:  # of a kind that may hold more than its words
            raise
        raise type(error)(f"teacher_model: {name} cannot be loaded: {error}") from error
