"""The head of a served teacher, from its checkpoint: the rest of the weights is not read."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from ..heads import Head, read_head
from .sources import CODE, PLACE, adapter_base, model_class, named_errors, pick, teacher_options

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_head(name: str, args: Any) -> Head:
    """The head of the model of this name or folder, on the CPU, in the checkpoint's dtype.

    args: a `TrOPDConfig`. Of a checkpoint in several files only those are fetched that hold the
    head. Raises OSError for a checkpoint without safetensors, and ValueError for a head that cannot
    be found there or read without running the model.
    """
    options = teacher_options(args)
    place = pick(options, PLACE)
    with named_errors(f"teacher_model: the head of {name}"):
        if (base := adapter_base(name, options)) is not None:
            raise ValueError(
                f"it is an adapter: merge it into {base} (merge_and_unload, save_pretrained), and "
                "serve and give that merged checkpoint"
            )
        kind = model_class(name, options)
        config = AutoConfig.from_pretrained(name, **pick(options, (*PLACE, *CODE)))
        with torch.device("meta"):
            if hasattr(kind, "from_config"):
                model = kind.from_config(config, **pick(options, ("trust_remote_code",)))
            else:
                model = kind(config)
        linear, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        files = _files_of_tensors(name, place)
        tied = config.get_text_config().tie_word_embeddings
        found = _find(model, linear, "weight", files)
        if found is None and tied:
            found = _find(model, embedding, "weight", files)
        bias = None if linear.bias is None else _find(model, linear, "bias", files)
        if found is None or (bias is None) != (linear.bias is None):
            raise ValueError(
                f"the checkpoint has no tensor of {_name(model, linear)!r}: save it by "
                "save_pretrained, or load the teacher in this process"
            )
        linear.weight = nn.Parameter(_read(name, place, files, found), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(_read(name, place, files, bias), requires_grad=False)
        return read_head(model)


def on_device(head: Head, device: Any) -> Head:
    bias = None if head.bias is None else head.bias.to(device)
    return replace(head, weight=head.weight.to(device), bias=bias)


def _files_of_tensors(name: str, place: Mapping[str, Any]) -> dict[str, str]:
    """Of each tensor of a checkpoint the name of its file."""
    index = cached_file(name, _INDEX, **place, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        return json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    with safe_open(_path(name, place, _ONE_FILE), framework="pt") as opened:
        return dict.fromkeys(opened.keys(), _ONE_FILE)


def _path(name: str, place: Mapping[str, Any], file: str) -> str:
    found = cached_file(name, file, **place)
    assert found is not None  # it raises OSError instead
    return found


def _find(model: nn.Module, module: nn.Module, part: str, files: Mapping[str, str]) -> str | None:
    """The name of a module's tensor in a checkpoint, whose prefixes may be other ones."""
    name = f"{_name(model, module)}.{part}"
    if name in files:
        return name
    last = ".".join(name.split(".")[-2:])
    found = [key for key in files if key == last or key.endswith(f".{last}")]
    return found[0] if len(found) == 1 else None


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)


def _read(name: str, place: Mapping[str, Any], files: Mapping[str, str], tensor: str) -> Tensor:
    with safe_open(_path(name, place, files[tensor]), framework="pt") as opened:
        return opened.get_tensor(tensor)
