"""A teacher that is given by name: how it is loaded into this process."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path

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


def _read_dtype(what: str, value: Any) -> torch.dtype | str | None:
    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return value
    if isinstance(value, str) and (name := value.removeprefix("torch.")) in _DTYPES:
        return getattr(torch, name)
    raise ValueError(f"{what}: expected 'auto' or one of {', '.join(_DTYPES)}, got {value!r}")


def load_teacher(name: str, args: Any) -> PreTrainedModel:
    """The model of this name, by `args.teacher_model_init_kwargs`, in its checkpoint's dtype where
    those give none. args: a `TrOPDConfig`."""
    options = dtype_option("teacher_model_init_kwargs", args.teacher_model_init_kwargs or {})
    if options.get("dtype") is None:
        options["dtype"] = "auto"  # transformers before 5 take None for float32
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        options.setdefault("revision", args.teacher_model_revision)
    # A map of devices cannot go with several processes.
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return create_model_from_path(name, **options)
