"""What the terminal shows: the machine, the comparison, and the training as it goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmarks.measure import Times
from examples.demo.compare import (
    CHECKED_TOKENS,
    LARGE_VOCABULARY,
    TIMES_EAGER,
    TOLERANCE,
    Measured,
)
from examples.demo.record import WATCH, Record
from examples.demo.train import Step

#: Prompts whose completions the terminal shows; the page has all.
PRINTED = 4


def machine_table(facts: dict[str, str], backend: str, dtype: torch.dtype) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("backend", f"[bold]{backend}[/], {_name(dtype)}")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def comparison_table(measured: list[Measured], backend: str, dtype: torch.dtype) -> Table:
    """A row for each implementation and vocabulary. Errors are against float64."""
    tolerance = TOLERANCE[dtype]
    table = Table(
        title=f"TrOPD loss and all gradients, {measured[0].tokens:,} tokens, {_name(dtype)}",
        caption=(
            f"Errors: relative, against float64, over {CHECKED_TOKENS} tokens; the fused ones must "
            f"stay within {tolerance:.0e}, and within {TIMES_EAGER} times eager's. "
            "Gate: tokens that fall on the other side of the trust gate than in float64. "
            "Memory: above the inputs, gradients included. "
            f"V = {LARGE_VOCABULARY:,}: rows beyond the model's own are synthetic, "
            "its own rows with noise added."
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("V", justify="right")
    table.add_column("")
    for name in ("loss", "d_hidden", "d_weight", "gate"):
        table.add_column(name, justify="right")
    table.add_column("median (p20 to p80)", justify="right")
    table.add_column("memory", justify="right")
    for row in measured:
        errors = row.errors
        fused = row.name == "fused"
        table.add_row(
            f"{row.vocabulary:,}",
            f"fused, {backend}" if fused else "eager",
            *(f"{e:.1e}" for e in (errors.loss, errors.d_hidden, errors.d_weight)),
            str(errors.gate),
            _spread(row.times),
            "unknown" if row.memory is None else f"{row.memory / 2**30:.2f} GiB",
            style="bold" if fused else None,
            end_section=fused,
        )
    return table


@contextmanager
def training_progress(console: Console, steps: int) -> Iterator[Callable[[Step], None]]:
    """A bar below and a line for each step above it."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console.print(WATCH)
    console.print("step   KL(student || teacher)   trust ratio    loss   entropy", style="bold")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps)

        def show(step: Step) -> None:
            progress.console.print(
                f"{step.number:4} {step.reverse_kl:24.3f} {step.trust:13.3f} {step.loss:7.3f} "
                f"{step.entropy:9.3f}",
                highlight=False,
            )
            progress.advance(task)

        yield show


def completions_table(record: Record) -> Table:
    """What the student said before and after, beside its teacher, on held-out prompts."""
    table = Table(title=record.verdict, title_justify="left", title_style="bold", show_lines=True)
    table.add_column("prompt", style="dim")
    for name in ("before", "after", "teacher"):
        table.add_column(name, ratio=1)
    sayings = (record.before.completions, record.after.completions, record.teacher)
    for prompt, *said in list(zip(record.prompts, *sayings))[:PRINTED]:
        table.add_row(prompt, *(Text(" ".join(words.split())) for words in said))
    return table


def caption(facts: dict[str, str], backend: str, dtype: torch.dtype) -> str:
    """Two lines for the foot of the picture."""
    hardware = facts.get("gpu") or facts["cpu"]
    versions = ", ".join(
        f"{name} {facts[name]}"
        for name in ("tropd_kernels", "torch", "triton", "transformers", "python", "commit")
        if name in facts
    )
    return f"backend {backend}, {_name(dtype)}, {hardware}\n{versions}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(time: float) -> str:
    """Three figures, in seconds or milliseconds."""
    return f"{time:.3g} s" if time >= 1 else f"{time * 1000:.3g} ms"


def _spread(times: Times) -> str:
    return f"{seconds(times.median)} ({seconds(times.p20)} to {seconds(times.p80)})"
