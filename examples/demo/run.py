"""The whole demonstration, in order."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.dtypes import bf16_units, default_dtype
from benchmarks.measure import machine
from examples.demo import DemoError, report
from examples.demo.compare import (
    TIMES_EAGER,
    TOLERANCE,
    Measured,
    compare,
    make_batch,
    with_large_head,
)
from examples.demo.damage import STUDENT, damaged
from examples.demo.judge import judge, write
from examples.demo.model import load_teacher
from examples.demo.page import write_page
from examples.demo.plot import draw
from examples.demo.prompts import HELD_OUT, MORE_PROMPTS, PROMPTS
from examples.demo.record import Record
from examples.demo.rollout import sample
from examples.demo.train import train
from tropd_kernels.backends import choose_backend

REPEATS = 2
#: Completions a step.
BATCH = 12
LEARNING_RATE = 3e-4


def run(
    *, steps: int, new_tokens: int, seed: int, device_name: str, cache: Path, output: Path
) -> int:
    """Returns the exit status: 0 if the fused loss agrees with float64, else 1."""
    console = Console(width=None if sys.stdout.isatty() else 112)  # a log has no width of its own
    start = time.perf_counter()
    device = pick_device(device_name)
    dtype = pick_dtype(device)
    backend = choose_backend(None, device)  # the name of what the loss will pick by itself
    torch.manual_seed(seed)

    facts = machine(device)
    console.print(report.machine_table(facts, backend, dtype))

    with console.status("reading SmolLM2-135M-Instruct (the first run converts it: one minute)"):
        teacher, tokenizer = load_teacher(cache)
        teacher = teacher.to(device)
    with console.status("a copy is damaged"):
        student = damaged(teacher, tokenizer)
        teacher = teacher.to(dtype)

    measured = measure(student, teacher, tokenizer, new_tokens, seed, dtype, console)
    console.print(report.comparison_table(measured, backend, dtype))

    record = heal(
        student,
        teacher,
        tokenizer,
        steps=steps,
        new_tokens=new_tokens,
        seed=seed,
        dtype=dtype,
        console=console,
        facts=facts,
        caption=report.caption(facts, backend, dtype),
        measured=measured,
    )
    console.print(report.completions_table(record))
    show(record, output)
    for name in ("demo.html", "demo.png", "demo.json"):
        console.print(output / name, highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s in all", highlight=False)
    return 0 if agrees(measured, dtype, console) else 1


def measure(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    seed: int,
    dtype: torch.dtype,
    console: Console,
) -> list[Measured]:
    """Eager against fused, at the model's own vocabulary and at a large one."""
    # Enough work to measure, and no more than the machine does in a minute.
    rollouts = 16 if student.device.type == "cuda" else 2
    with console.status("the student writes"):
        rollout = sample(student, tokenizer, list(PROMPTS) * rollouts, new_tokens)
        batch = make_batch(student, teacher, rollout, seed=seed, dtype=dtype)
    measured = []
    for larger in (False, True):
        if larger:
            batch = with_large_head(batch, seed=seed)
        with console.status(f"eager and fused, {len(batch.weight):,} ids"):
            measured += compare(batch, REPEATS)
    return measured


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    new_tokens: int,
    seed: int,
    dtype: torch.dtype,
    console: Console,
    prompts: tuple[str, ...] = PROMPTS + MORE_PROMPTS,
    held_out: tuple[str, ...] = HELD_OUT,
    **of_record: Any,
) -> Record:
    """Judges, trains, judges again. of_record: what the record says of the machine."""
    settings = {"steps": steps, "tokens": new_tokens, "batch": BATCH, "seed": seed}
    judged = {"new_tokens": new_tokens, "seed": seed, "dtype": dtype}
    with console.status("student and teacher answer"):
        before = judge(student, teacher, tokenizer, held_out, **judged)
        said = write(teacher, tokenizer, held_out, new_tokens)
    training = train(
        student,
        teacher,
        tokenizer,
        prompt_batches(prompts, BATCH),
        steps=steps,
        new_tokens=new_tokens,
        seed=seed,
        dtype=dtype,
        learning_rate=LEARNING_RATE,
        decay=True,
    )
    history = []
    with report.training_progress(console, steps) as shown:
        for step in training:
            history.append(step)
            shown(step)
    with console.status("the student answers again"):
        after = judge(student, teacher, tokenizer, held_out, **judged)
    return Record(
        student=STUDENT,
        settings=settings | {"learning_rate": LEARNING_RATE},
        steps=history,
        prompts=held_out,
        before=before,
        after=after,
        teacher=said,
        **of_record,
    )


def show(record: Record, folder: Path) -> None:
    """Picture, page and record, as files."""
    draw(record, folder / "demo.png")
    write_page(record, folder / "demo.html")
    record.save(folder / "demo.json")


def agrees(measured: list[Measured], dtype: torch.dtype, console: Console) -> bool:
    """Whether the fused loss is as exact as it must be; says where it is not."""
    right = True
    for eager, fused in itertools.pairwise(measured):
        if (eager.name, fused.name) != ("eager", "fused"):
            continue
        allowed = min(TOLERANCE[dtype], TIMES_EAGER * eager.errors.largest)
        if not fused.errors.largest <= allowed:
            right = False
            console.print(
                f"[bold red]At V = {fused.vocabulary:,} the fused loss is off by "
                f"{fused.errors.largest:.1e}, more than {allowed:.1e}.[/]"
            )
    return right


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
