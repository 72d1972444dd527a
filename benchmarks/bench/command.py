"""`tropd bench`: options, what is checked before anything runs, and the run itself.

A name that is not known costs one line with the nearest known one, and the rest of the table still
comes; the exit status is then 2. Where nothing is left to measure, the command ends there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.bench import budget, page, table
from benchmarks.bench.budget import OutOfTime
from benchmarks.bench.ceilings import ceilings
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import make_problem
from benchmarks.bench.providers import OURS, PROVIDERS, default_providers
from benchmarks.bench.results import Results, Row, read
from benchmarks.bench.run import Settings, measure
from benchmarks.bench.shapes import DEFAULTS, SHAPES, Shape
from benchmarks.bench.timing import check_room, reason_of
from benchmarks.dtypes import default_dtype, dtype_name
from benchmarks.measure import machine
from tropd_kernels.objectives.registry import nearest

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("cpu", "cuda")
#: Options that name files: they do not affect the measurement, and paths stay out of the results.
FILES = ("--out", "--memory-snapshot")
REPEATS = {"cuda": 10, "cpu": 3}


class UsageError(Exception):
    """An error of the user's, printed without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 where something that was asked for is unknown or cannot be had."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    try:
        if options.page:
            page.write()
            return 0
        if options.plot:
            return draw([Path(file) for file in options.plot])
        return bench(options, command_of(arguments))
    except UsageError as error:
        say(f"tropd bench: {error}")
        return 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tropd bench", allow_abbrev=False,
        description="Time, memory and gradient error of the losses: ours, eager PyTorch's, the "
        "field's, and the bare products.",
    )  # fmt: skip
    add = parser.add_argument
    add("--shape", help=f"one of {', '.join(SHAPES)}; default: {_default('shape')}")
    add("--vocab-size", type=positive, help="in place of the shape's, as the next two")
    add("--hidden-size", type=positive)
    add("--teacher-hidden-size", type=positive)
    add("--tokens", type=positive, nargs="+", metavar="N", help=f"default: {_default('tokens')}")
    add("--mask", type=share, default=0.0, metavar="SHARE", help="of tokens that are ignored")
    add("--losses", nargs="+", metavar="LOSS", help=f"of {', '.join(LOSSES)}; default: all")
    add("--providers", nargs="+", metavar="WHO",
        help=f"of ours, {', '.join(PROVIDERS)}; default: all that mean something here")  # fmt: skip
    often = f"{REPEATS['cuda']} on a GPU, {REPEATS['cpu']} on a CPU"
    add("--budget", type=limit, metavar="SECONDS",
        help="of a row: what a small run shows to take longer is left out, and the row says what "
        "it needs; so is float64, for gradient errors; 0: no limit; default: "
        f"{budget.DEFAULTS['cpu']:g} on a CPU, 0 on a GPU")  # fmt: skip
    add("--repeats", type=positive, help=f"timed runs of each; default: {often}")
    add("--device", help="cpu or cuda; default: a GPU if there is one")
    add("--dtype", help=f"of the inputs: {', '.join(DTYPES)}; default: bfloat16 where the "
        "processor multiplies it in hardware, else float32")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="default: build/bench/DEVICE.json")
    add("--plot", nargs="*", metavar="FILE",
        help="draw time, memory and roofline beside the results, and one loss at several sizes "
        "in one picture; for the roof the machine is probed for a second; of stored files if any "
        "are given, which then are all that is done")  # fmt: skip
    add("--memory-snapshot", type=Path, metavar="FILE",
        help="who allocated what in the first loss, whose times suffer by it; for "
        "pytorch.org/memory_viz, on a GPU")  # fmt: skip
    add(
        "--page",
        action="store_true",
        help="renew the tables of docs/benchmarks.md and README from benchmarks/results",
    )
    return parser.parse_args(arguments)


def _default(what: str) -> str:
    index = ("shape", "tokens").index(what)
    gpu, cpu = DEFAULTS["cuda"][index], DEFAULTS["cpu"][index]
    text = lambda value: value if isinstance(value, str) else " ".join(map(str, value))
    return f"{text(gpu)}, and {text(cpu)} without a GPU"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def limit(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds, or 0 for no limit, got {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


# --- the run -----------------------------------------------------------------------------------


def bench(options: argparse.Namespace, command: str) -> int:
    device = device_of(options.device)
    dtype, why_dtype = dtype_of(options.dtype, device)
    shape = shape_of(options, device)
    losses, bad_losses = known("--losses", options.losses or list(LOSSES), LOSSES)
    names, bad_names = known("--providers", providers_of(options.providers, device), PROVIDERS)
    kind = torch.device(device).type
    tokens = sorted(set(options.tokens or DEFAULTS[kind][1]))
    repeats = options.repeats or REPEATS[kind]
    seconds = budget.DEFAULTS[kind] if options.budget is None else options.budget or None
    out = options.out or Path("build/bench") / f"{kind}.json"
    check_writable("--out", out)
    if options.plot is not None:
        import_plot()
    status = 2 if bad_losses or bad_names else 0
    snapshot = options.memory_snapshot
    if snapshot and kind != "cuda":
        say("--memory-snapshot needs a GPU: on a CPU no allocator sees all; the table comes anyway")
        status, snapshot = 2, None
    if snapshot:
        check_writable("--memory-snapshot", snapshot)

    on = machine(device)
    lines = heading(options, on, shape, device, tokens, dtype, why_dtype, seconds)
    print("\n".join(lines), flush=True)
    facts = {
        "command": command, "machine": on, "shape": vars(shape), "dtype": dtype_name(dtype),
        "device": kind, "ignored": options.mask, "repeats": repeats, "budget": seconds,
    }  # fmt: skip
    if options.plot is not None:
        facts["ceilings"] = ceilings(device, dtype)
    try:
        # Drawn in float32, the teacher's head from a second draw.
        rows_of_heads = shape.hidden_size + 2 * shape.teacher_hidden_size
        check_room(4 * shape.vocab_size * rows_of_heads, device)
        problem = make_problem(
            max(tokens), shape, dtype, device, ignored=options.mask, budget=seconds
        )
    except OutOfTime as error:
        raise UsageError(
            f"the inputs alone: {error}; take fewer tokens, a smaller shape, or --budget "
            f"{error.sufficient}"
        ) from None
    except (RuntimeError, MemoryError) as error:
        reason = reason_of(error)
        raise UsageError(f"the inputs do not fit: {reason}; take a smaller shape") from None
    rows: list[Row] = []
    settings = Settings(tokens, losses, names, repeats, device, seconds)
    try:
        for more in measure(problem, settings, say, snapshot):
            print(table.block(more, head=not rows), flush=True)
            rows += more
            Results(facts, rows).write(out)
    except KeyboardInterrupt:
        say("interrupted: the table has what was finished")
        status = 130
    print(table.notes(rows))
    if options.plot is not None and rows:
        draw([out])
    return status


def heading(
    options: argparse.Namespace, on: dict[str, str], shape: Shape, device: str, tokens: list[int],
    dtype: torch.dtype, why_dtype: str, seconds: float | None,
) -> list[str]:  # fmt: skip
    lines = []
    if not torch.cuda.is_available() and (options.shape or options.vocab_size) is None:
        lines.append("no GPU: small shapes, whose ratios are not those of a model; see --shape")
    if options.providers is None:
        left_out = [name for name in PROVIDERS if name not in default_providers(device)]
        lines.append(f"not by default on {device}: {', '.join(left_out)}; --providers takes them")
    lines += [f"{name}: {fact}" for name, fact in on.items()]
    if why_dtype:
        lines.append(f"{dtype_name(dtype)}: {why_dtype}; --dtype takes another")
    if seconds is not None:
        lines.append(f"left out: rows of more than {seconds:g} s; --budget takes other limits")
    ignored = f", {options.mask:.0%} of the tokens ignored" if options.mask else ""
    size = f"{' and '.join(map(str, tokens))} tokens, {shape}"
    return [*lines, f"{size}, {dtype_name(dtype)}{ignored}"]


def import_plot() -> ModuleType:
    try:
        from benchmarks.bench import plot
    except ImportError:
        raise UsageError("--plot: matplotlib is not installed: pip install matplotlib") from None
    return plot


def draw(files: list[Path]) -> int:
    plot = import_plot()
    for file in files:
        try:
            results = read(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"--plot: {error}") from None
        for picture in plot.draw(results, file):
            print(f"drew {picture}")
    return 0


# --- what was asked for ------------------------------------------------------------------------


def command_of(arguments: Sequence[str]) -> str:
    """The command without the options that name files, as a reader would repeat it."""
    kept, skip = [], False
    for argument in arguments:
        if skip and not argument.startswith("--"):
            continue
        name = argument.split("=")[0]
        skip = name in FILES and "=" not in argument
        if name not in FILES:
            kept.append(argument)
    return " ".join(["tropd bench", *kept])


def device_of(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_choice("--device", name.partition(":")[0], DEVICES)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:INDEX, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UsageError(f"--device: torch sees {there} GPUs here, so there is no {name!r}")
    return name


def dtype_of(name: str | None, device: str) -> tuple[torch.dtype, str]:
    """(dtype, why it was chosen); no reason where it was asked for."""
    if name is None:
        return default_dtype(device)
    return getattr(torch, check_choice("--dtype", name, DTYPES)), ""


def shape_of(options: argparse.Namespace, device: str) -> Shape:
    name = options.shape or DEFAULTS[torch.device(device).type][0]
    shape = SHAPES[check_choice("--shape", name, SHAPES)]
    given = {
        key: getattr(options, key)
        for key in ("vocab_size", "hidden_size", "teacher_hidden_size")
        if getattr(options, key) is not None
    }
    return Shape(**{**vars(shape), **given})


def providers_of(names: list[str] | None, device: str) -> list[str]:
    """ "ours" is every backend that runs on the device."""
    default = default_providers(device)
    if names is None:
        return default
    here = [name for name in default if name in OURS]
    return [one for name in names for one in (here if name == "ours" else [name])]


def check_choice(option: str, name: str, among: Iterable[str]) -> str:
    if name not in among:
        raise UsageError(unknown(option, name, among))
    return name


def known(option: str, names: list[str], among: Iterable[str]) -> tuple[list[str], list[str]]:
    """(the known, the unknown names). Prints a line for each unknown one; raises UsageError if all
    are."""
    bad = [name for name in names if name not in among]
    for name in bad:
        say(unknown(option, name, among))
    good = list(dict.fromkeys(name for name in names if name in among))
    if not good:
        raise UsageError(f"{option}: none of those named is known, so there is nothing to measure")
    return good, bad


def unknown(option: str, name: str, among: Iterable[str]) -> str:
    return f"{option}: unknown {name!r}{nearest(name, among)}. Known: {', '.join(among)}"


def check_writable(option: str, file: Path) -> None:
    """Raises UsageError for a file that cannot be written: before hours of measuring, not after."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; name a file")
    except OSError as error:
        raise UsageError(f"{option}: {error}") from None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
