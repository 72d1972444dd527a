"""Memory and time of verl's training step, with its own loss and with ours, on a CPU.

    build/engines/bin/python -m benchmarks.verl_step --tokens 2048

verl's own FSDP 2 engine runs forward and backward of one micro-batch with a top-k teacher, once for
each way of forming the loss, each in a process of its own, one after the other. What is reported is
the process's largest resident set during the step, beyond what it was before, so model and batch
are left out and gradients are in. The time is that of a second step. Needs `make engines` and
Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from .markdown import table

HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"
#: (verl's loss_mode, fused, settings of distillation_loss), by what the table calls it.
WAYS = {
    "verl, forward KL on logits": ("forward_kl_topk", False, {}),
    "verl, the same in chunks": ("forward_kl_topk", False, dict(use_chunked_topk=True)),
    "ours, forward KL on verl's logits": ("tropd_forward_kl", False, {}),
    "ours, forward KL from hidden states": ("tropd_forward_kl", True, {}),
    "ours, TrOPD from hidden states": ("tropd", True, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    rows = []
    for way in WAYS:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.verl_step", "--way", way]
        for name in ("tokens", "vocab", "hidden", "top_k"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        rows.append([way, f"{found['bytes'] / 2**30:.2f}", f"{found['seconds']:.1f}",
                     f"{found['loss']:.5f}"])  # fmt: skip
    print(table(["loss", "peak, GiB", "step, s", "value"], rows))
    print(
        f"\n{options.tokens} tokens, V = {options.vocab}, H = {options.hidden}, k = "
        f"{options.top_k}, float32; logits of {options.tokens * options.vocab * 4 / 2**30:.2f} GiB"
        f"; {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Of one way: bytes, seconds and the loss's value."""
    sys.path.insert(0, str(HELPERS))
    warnings.simplefilter("ignore")
    import pytest
    import verl_engine as helper

    from tropd_kernels.integrations import verl as _  # noqa: F401  it registers
    from tropd_kernels.integrations import verl_fused

    loss_mode, fused, settings = WAYS[options.way]
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        os.environ["RANK"] = "0"
        helper.use_cpu(pytest.MonkeyPatch())
        verl_fused.register_engines((("cpu", "any"),))
        model = helper.make_model(
            Path(folder) / "model", vocab_size=options.vocab, hidden_size=options.hidden,
            num_hidden_layers=1, max_position_embeddings=options.tokens,
            tie_word_embeddings=True, initializer_range=0.02,
        )  # fmt: skip
        engine = helper.make_engine(model, fused)
        lengths = dict(prompts=(16, 16), responses=(options.tokens // 2 - 16,) * 2)
        batch = helper.make_batch(
            "top_k", fused, vocab=options.vocab, k=options.top_k, drawn=True, **lengths
        )
        function = helper.loss_function(loss_mode, k=options.top_k, **settings)
        before = reset_peak()
        loss = step(engine, batch, function)
        found = {"bytes": peak() - before, "loss": loss}
        start = time.perf_counter()
        step(engine, batch, function)
        found["seconds"] = time.perf_counter() - start
        torch.distributed.destroy_process_group()
    return found


def step(engine, batch, function) -> float:
    """Forward and backward of a micro-batch, and the loss."""
    with engine.train_mode():
        return float(sum(engine.forward_backward_batch(batch.clone(), function)["loss"]))


def reset_peak() -> int:
    """Sets the largest resident set to the one of now, and returns it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The largest resident set since `reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
