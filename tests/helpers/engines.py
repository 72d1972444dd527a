"""The trainer under `accelerate launch`: two processes, over gloo, on each engine that it runs on.

accelerate runs CPUs by MPI and shards on accelerators alone. So it is told to launch on GPUs, and
`use` tells it in the processes that it has some, whose device is the CPU; from there on everything
is accelerate's, transformers' and the engine's.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
#: Where the processes find the package, the helpers and the test's own module.
IMPORTED = (ROOT, ROOT / "tests" / "helpers", ROOT / "tests" / "trainer")
ENGINES = [
    "ddp",
    "fsdp2",
    pytest.param("zero3", marks=pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: make engines"
    )),
]  # fmt: skip
_FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "cpu_ram_efficient_loading": "false",
    "reshard_after_forward": "true",
    "state_dict_type": "FULL_STATE_DICT",
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


#: Without it a process may be gone while the other still talks to it. Python is not taken down: a
#: thread of torch's that wants the interpreter then is ended inside of C++, and with it, once in
#: some hundred runs, the process ("terminate called without an active exception").
_END = """
import os
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(other and os.waitpid(other, 0)[1] != 0)
"""


def launch_flags(engine: str) -> list[str]:
    if engine == "ddp":
        return ["--multi_gpu"]
    if engine == "zero3":
        return ["--use_deepspeed"]
    flags = _FSDP | {"version": engine.removeprefix("fsdp")}
    if engine == "fsdp1":
        flags |= {"reshard_after_forward": "FULL_SHARD", "sync_module_states": "false"}
    return ["--use_fsdp", *(f"--fsdp_{name}={value}" for name, value in flags.items())]


def on_two_processes(code: str, folder: Path, engine: str, *arguments: str) -> list:
    """What each process of this program has saved under `<rank>.pt`. Its arguments are the folder,
    the engine, and these."""
    launch(code, folder, engine, *arguments)
    return saved_by(folder)


def launch(code: str, folder: Path, engine: str, *arguments: str) -> None:
    (folder / "process.py").write_text(f"other = 0\n{code}{_END}")
    run_python(
        ["-m", "accelerate.commands.launch", *launch_flags(engine), "--num_processes=2",
         "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
         "--main_process_port=0", str(folder / "process.py"), str(folder), engine, *arguments]
    )  # fmt: skip


def run_python(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, IMPORTED)),
             "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=280)
    finally:
        if process.poll() is None:  # with the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]


#: Modules of tests whose program `ONE_STEP` runs under DDP, and its arguments behind the engine's.
#: They share two processes, which fork once all is imported: to start them takes longer than all
#: the programs. From the environment on, which torchrun would make, they are as launched.
TOGETHER = {
    "test_trainer_features": [],
    "test_trainer_processes": [],
    "test_trainer_several_teachers": [],
    "test_trainer_self_teacher": ["adapters"],
    "test_trainer_verifier": [],
}
_TOGETHER = """
import importlib, os, socket, sys, torch
from engines import TOGETHER
folder = sys.argv[1]
programs = {name: importlib.import_module(name).ONE_STEP for name in TOGETHER}
with socket.create_server(("127.0.0.1", 0)) as free:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
other = os.fork()
rank = "0" if other else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
for name, arguments in TOGETHER.items():
    sys.argv = [name, f"{folder}/{name}", "ddp", *arguments]
    os.makedirs(sys.argv[1], exist_ok=True)
    exec(compile(programs[name], name, "exec"), {})
"""


def saved_together(name: str, factory: pytest.TempPathFactory) -> list:
    """What each process has saved in the program of this module of `TOGETHER`. The first test that
    asks runs all programs; tests in other workers of pytest-xdist wait for it."""
    folder = factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "together"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            run_python(["-c", _TOGETHER + _END, str(folder)])
            (folder / "done").touch()
    return saved_by(folder / name)


def saved_by(folder: Path) -> list:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def use(engine: str) -> dict:
    """Called first in a process: settings of the trainer under this engine."""
    if engine == "ddp":
        return dict(ddp_backend="gloo")
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=200))
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    return dict(deepspeed=_ZERO, use_cpu=False) if engine == "zero3" else {}


def whole_parameters(model) -> list[torch.Tensor]:
    """A collective."""
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return [p.detach().clone() for p in parameters]
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in parameters]
