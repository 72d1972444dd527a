"""The whole demonstration, in order."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.dtypes import bf16_units, default_dtype
from benchmarks.measure import machine
from examples.demo import DemoError, report
from examples.demo.compare import TIMES_EAGER, TOLERANCE, compare, make_batch, with_large_head
from examples.demo.model import load_teacher, make_student
from examples.demo.plot import draw
from examples.demo.prompts import PROMPTS
from examples.demo.rollout import sample
from examples.demo.train import train
from tropd_kernels.backends import choose_backend

STUDENT_LAYERS = 10
REPEATS = 2


def run(
    *, steps: int, new_tokens: int, seed: int, device_name: str, cache: Path, output: Path
) -> int:
    """Returns the exit status: 0 if the fused loss agrees with float64, else 1."""
    console = Console(width=None if sys.stdout.isatty() else 112)  # a log has no width of its own
    start = time.perf_counter()
    device = pick_device(device_name)
    dtype = pick_dtype(device)
    backend = choose_backend(None, device)  # the name of what the loss will pick by itself
    # Enough work to measure, and no more than the machine does in a few minutes.
    rollouts, prompts_per_step = (16, len(PROMPTS)) if device.type == "cuda" else (2, 4)
    torch.manual_seed(seed)

    facts = machine(device)
    console.print(report.machine_table(facts, backend, dtype))

    with console.status("reading SmolLM2-135M-Instruct (the first run converts it: one minute)"):
        teacher, tokenizer = load_teacher(cache)
        student = make_student(teacher, STUDENT_LAYERS).to(device)
        teacher = teacher.to(device, dtype)

    with console.status("the student writes"):
        rollout = sample(student, tokenizer, list(PROMPTS) * rollouts, new_tokens)
        batch = make_batch(student, teacher, rollout, seed=seed, dtype=dtype)

    measured = []
    for larger in (False, True):
        if larger:
            batch = with_large_head(batch, seed=seed)
        with console.status(f"eager and fused, {len(batch.weight):,} ids"):
            measured += compare(batch, REPEATS)
    del batch
    console.print(report.comparison_table(measured, backend, dtype))

    history = []
    batches = prompt_batches(PROMPTS, prompts_per_step)
    training = train(
        student,
        teacher,
        tokenizer,
        batches,
        steps=steps,
        new_tokens=new_tokens,
        seed=seed,
        dtype=dtype,
    )
    with report.training_progress(console, steps) as show:
        for step in training:
            history.append(step)
            show(step)

    picture = output / "demo.png"
    draw(measured, history, report.caption(facts, backend, dtype), picture)
    console.print(f"{picture} ({time.perf_counter() - start:.0f} s in all)", highlight=False)

    agrees = True
    for eager, fused in itertools.pairwise(measured):
        if (eager.name, fused.name) != ("eager", "fused"):
            continue
        allowed = min(TOLERANCE[dtype], TIMES_EAGER * eager.errors.largest)
        if not fused.errors.largest <= allowed:
            agrees = False
            console.print(
                f"[bold red]At V = {fused.vocabulary:,} the fused loss is off by "
                f"{fused.errors.largest:.1e}, more than {allowed:.1e}.[/]"
            )
    return 0 if agrees else 1


def pick_device(text: str) -> torch.device:
    """The device asked for; "auto" is a GPU where there is one."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device must be auto, cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(
            f"--device {text}: torch sees {torch.cuda.device_count()} GPUs here; use --device cpu"
        )
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it several times faster than float32, which on a CPU
    is so only with AMX; float32 elsewhere."""
    if device.type == "cuda":
        return default_dtype(device)[0]
    return torch.bfloat16 if bf16_units(device) == "AMX" else torch.float32


def prompt_batches(prompts: tuple[str, ...], size: int) -> Iterator[list[str]]:
    """The prompts in turn, over and over, `size` at a time."""
    endless = itertools.cycle(prompts)
    while True:
        yield list(itertools.islice(endless, size))
