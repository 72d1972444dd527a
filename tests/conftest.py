"""Triton's interpreter stands in for a GPU where there is none, or, with TROPD_PTX, a machine that
runs what the kernels compile to (`ptx`); either has to be chosen before triton is imported."""

import gc
import logging
import os
import tempfile
from importlib.util import find_spec

import torch

if "TROPD_PTX" in os.environ:
    from ptx import launch

    launch.install(os.environ["TROPD_PTX"])
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch.distributed as dist
from pairs import mark_the_rest_slow

from tropd_kernels import native

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import interpreter

    interpreter.speed_up()

if "TORCH_EXTENSIONS_DIR" not in os.environ:
    # DeepSpeed and PEFT compile extensions there, under a lock file. In the user's cache, a build
    # that was killed leaves it behind, and every later one waits for ever. Workers share this one.
    _EXTENSIONS = tempfile.TemporaryDirectory(prefix="torch_extensions_")
    os.environ["TORCH_EXTENSIONS_DIR"] = _EXTENSIONS.name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
for device_type in (torch.cuda, torch.xpu, torch.mtia):
    if not device_type.is_available():
        # It would keep each seed, with the stack that set it, until there is such a device.
        device_type.manual_seed_all = lambda seed: None


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of this process alone."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _the_same_start():
    """Random numbers, and transformers' warnings, which an earlier test may have silenced."""
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.WARNING)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Where csrc/ is not built, for want of a compiler, the suites run over the other backends."""
    for item in items if native.WHY_NOT is not None else ():
        parameters = getattr(item, "callspec", None)
        if parameters is not None and parameters.params.get("backend") == "native":
            item.add_marker(pytest.mark.skip(reason=f"backend 'native': {native.WHY_NOT}"))
    if "TROPD_PTX" in os.environ:  # where Triton's kernels run alone, every two values meet on them
        items = [item for item in items if "triton" in item.nodeid]
    mark_the_rest_slow(items)


@pytest.fixture
def use_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _imports_stay():
    """What is there before a file's tests, imports above all, is left out of their garbage
    collections. Every end of a training makes one, which took longer than the training."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
