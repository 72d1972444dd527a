"""The trainer on two processes, over gloo, under each engine that it runs on.

`accelerate launch` would run CPUs by MPI, and accelerate shards on accelerators alone. So the
processes are torch's own, and `use` tells accelerate that they have GPUs, whose device is the CPU;
from there on everything is accelerate's, transformers' and the engine's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ENGINES = [
    "ddp",
    "fsdp2",
    pytest.param("zero3", marks=pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: make engines"
    )),
]  # fmt: skip
_FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
_ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # tiny models are sharded too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def on_two_processes(code: str, folder: Path, *arguments: str, seconds: float = 280) -> list:
    """What each process of this program has saved under `<rank>.pt`."""
    (folder / "process.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(folder / "process.py"), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
             "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=ROOT, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def use(engine: str) -> dict:
    """Called first in a process: settings of the trainer under this engine."""
    if engine == "ddp":
        return dict(ddp_backend="gloo")
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    if engine == "zero3":
        return dict(deepspeed=_ZERO, use_cpu=False)
    os.environ.update(_FSDP, FSDP_VERSION=engine.removeprefix("fsdp"))
    return {}


def whole_parameters(model) -> list[torch.Tensor]:
    """A collective."""
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return [p.detach().clone() for p in parameters]
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in parameters]
