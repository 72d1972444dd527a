"""What is installed here and what can run: the rows of `tropd env`."""

import platform
from importlib import metadata

import torch

from . import __version__
from .backends import available_backends


def environment() -> dict[str, str]:
    """Names and versions of packages, the machine's devices, and the state of each backend."""
    rows = {"tropd-kernels": __version__, "Python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets"):
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["platform"] = platform.platform()
    rows["CPU"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows[f"GPU {i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    rows |= {f"backend {name}": state for name, state in available_backends().items()}
    return rows
