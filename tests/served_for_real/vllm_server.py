"""vLLM's own server in a process, on a CPU."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import urllib3

PORT, CONTEXT, MOST = 18764, 128, 32
URL = f"http://127.0.0.1:{PORT}"
STARTUP = 300  # seconds at most
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


@contextlib.contextmanager
def vllm(python: str, model: Path, log: Path, *flags: str) -> Iterator[subprocess.Popen]:
    """The server of a model while the block runs. python: of vLLM's environment."""
    # The module, for the command `vllm` finds no metadata under the package's name.
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(PORT),
        "--max-logprobs", str(MOST), "--dtype", "float32", "--max-model-len", str(CONTEXT),
        "--max-num-seqs", "32", "--enforce-eager", "--enable-scale-out", *flags,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        _wait(process, log)
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Ends the server at once, and with it its engine, which is a process of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + STARTUP
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            if urllib3.request("GET", f"{URL}/health", retries=False).status == 200:
                return
        time.sleep(1)
    raise RuntimeError(f"vLLM did not start: see {log}")
