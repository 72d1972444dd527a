"""Which chunk sizes are fastest here: a sweep over the plan's two sizes.

    python -m benchmarks.bench.tuning --shape qwen3-1.7b --tokens 8192 --out build/bench/tuning.json

`rows` tokens of float32 logits at a time, gradients of `super_rows` tokens in a pair of products
(`tropd_kernels/loss/plan.py`). The best backend of the device, one loss; each pair of sizes takes
turns with the defaults, which are first among them and marked. Prints milliseconds, ratios to the
defaults in the same turns, and peak memory over inputs and gradients; a record for each as it comes
(`benchmarks.records`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.bench.command import (
    UsageError,
    check_choice,
    check_writable,
    device_of,
    dtype_of,
    positive,
    say,
)
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import Gradients, Problem, make_problem
from benchmarks.bench.providers import Runner, runner
from benchmarks.bench.shapes import DEFAULTS, SHAPES, Shape
from benchmarks.bench.table import megabytes, seconds
from benchmarks.bench.timing import empty_cache, reason_of, take_turns
from benchmarks.dtypes import dtype_name
from benchmarks.measure import machine
from benchmarks.records import emit, wait_for_turn
from tropd_kernels import plan_chunks
from tropd_kernels.backends import choose_backend
from tropd_kernels.loss import plan as chunking

ROWS = (256, 512, 1024, 2048)
SUPER_ROWS = (1024, 2048, 4096, 8192)

Sizes = tuple[int, int]


@contextmanager
def chunks_of(sizes: Sizes) -> Iterator[None]:
    """These sizes in place of the plan's, for the time being, on either kind of device."""
    before, chunking.FIXED_SIZES = chunking.FIXED_SIZES, sizes
    try:
        yield
    finally:
        chunking.FIXED_SIZES = before


def defaults(tokens: int, shape: Shape, dtype: torch.dtype, device: str) -> Sizes:
    """The plan's own for a loss with the teacher's hidden states."""
    plan = plan_chunks(
        tokens, shape.vocab_size, shape.hidden_size, shape.teacher_hidden_size, dtype=dtype,
        device=device,
    )  # fmt: skip
    return plan.rows, plan.super_rows


def with_chunks(run: Runner, sizes: Sizes) -> Runner:
    def forward(problem: Problem):
        with chunks_of(sizes):
            return run.forward(problem)

    def backward(problem: Problem, state) -> Gradients:
        with chunks_of(sizes):
            return run.backward(problem, state)

    return Runner(forward, backward)


def sweep(
    problem: Problem, loss: str, sizes: Sequence[Sizes], standard: Sizes, repeats: int, device: str
) -> Iterator[dict]:
    """A row for each as soon as it is there; sizes that cannot run give the reason."""
    run = runner(choose_backend(None, torch.device(device)), loss)
    for pair in sizes:
        calls = {"default": (with_chunks(run, standard), problem)}
        if pair != standard:
            calls["these"] = (with_chunks(run, pair), problem)
        row = {"rows": pair[0], "super_rows": pair[1], "default": pair == standard}
        try:
            for call, _ in calls.values():
                call(problem)
            measured, failed = take_turns(calls, repeats, device)
            mine = measured.get("these" if "these" in calls else "default")
        except Exception as error:  # what does not fit is a result
            mine, failed = None, {"these": reason_of(error)}
            empty_cache(device)
        if mine is None:
            yield row | {"reason": next(iter(failed.values()))}
            continue
        over = None if mine.peak is None else max(0, mine.peak - problem.gradient_bytes)
        row |= {"seconds": vars(mine.both), "workspace": over}
        if "default" in measured:
            row["over_default"] = mine.both.median / measured["default"].both.median
        yield row


def fastest_first(rows: Iterable[dict]) -> list[dict]:
    """Those that could not run last."""
    return sorted(rows, key=lambda row: row["seconds"]["median"] if "seconds" in row else 1e9)


def render(rows: list[dict]) -> str:
    lines = [f"{'rows':>6}{'super_rows':>12}{'median':>11}{'/ default':>11}{'over MB':>9}"]
    for row in rows:
        mark = "  default" if row["default"] else ""
        text = f"{row['rows']:>6}{row['super_rows']:>12}"
        if "seconds" in row:
            ratio = f"{row['over_default']:.3f}" if "over_default" in row else "-"
            text += f"{seconds(row['seconds']['median']):>11}{ratio:>11}"
            text += f"{megabytes(row['workspace']):>9}"
        else:
            text += f"  {row['reason']}"
        lines.append(text + mark)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape")
    parser.add_argument("--tokens", type=positive)
    parser.add_argument("--loss", default="tropd")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS)
    parser.add_argument("--super-rows", type=positive, nargs="+", default=SUPER_ROWS)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, default=Path("build/bench/tuning.json"))
    options = parser.parse_args(arguments)
    try:
        device = device_of(options.device)
        shape_name, tokens = DEFAULTS[torch.device(device).type]
        shape_name = check_choice("--shape", options.shape or shape_name, SHAPES)
        loss = check_choice("--loss", options.loss, LOSSES)
        dtype, _ = dtype_of(options.dtype, device)
        check_writable("--out", options.out)
    except UsageError as error:
        say(f"tuning: {error}")
        return 2
    tokens = options.tokens or tokens[0]
    standard = defaults(tokens, SHAPES[shape_name], dtype, device)
    sizes = {standard} | {
        (rows, many) for rows in options.rows for many in options.super_rows if many >= rows
    }
    torch.empty(1, device=device)  # before its turn: a GPU's context takes a second
    wait_for_turn()
    problem = make_problem(tokens, SHAPES[shape_name], dtype, device)
    problem.ready_for(LOSSES[loss].teacher)
    facts = {
        "machine": machine(device), "shape": shape_name, "dtype": dtype_name(dtype),
        "tokens": tokens, "loss": loss,
    }  # fmt: skip
    rows = []
    # Largest first, of which most is hoped: a sweep may be cut short.
    in_order = sorted(sizes, key=lambda pair: (pair != standard, -pair[1], -pair[0]))
    for row in sweep(problem, loss, in_order, standard, options.repeats, device):
        emit(shape=shape_name, loss=loss, tokens=tokens, **row)
        rows.append(row)
    rows = fastest_first(rows)
    options.out.write_text(json.dumps(facts | {"sweep": rows}, indent=1) + "\n", "utf-8")
    print(f"chunk sizes, {loss}, {tokens} tokens, {SHAPES[shape_name]}, {dtype_name(dtype)}")
    print(render(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
