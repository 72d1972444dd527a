"""Ours, eager PyTorch, the field and the bare products on one CPU, in one run, in one table.

    python -m benchmarks.cpu                       1024 and 4096 tokens; writes build/bench/cpu.json
    python -m benchmarks.cpu --objectives gkd --tokens 1024 --repeats 5
    python -m benchmarks.cpu --growth              ours alone over N, see `growth.py`

Every row computes a loss and all gradients from the same hidden states and heads. Times are of
interleaved runs; every row's first run, a warm-up, is not counted. Memory is the peak over the
inputs, and again with the returned gradients taken off (see `measure.py`), of those same runs.
Errors are against float64, on the first 64 tokens.

A row that cannot run stays in the table and says why. Eager PyTorch holds the logits of all tokens:
what it would need is extrapolated from two small runs and compared with what the machine has, since
a system that runs out of memory kills the whole run. The others walk in chunks, and are tried.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks import growth
from benchmarks.losses import (
    OBJECTIVES,
    Gradients,
    Problem,
    bare_gemms,
    exact_gradients,
    gradient_error,
    make_problem,
    provider,
)
from benchmarks.measure import (
    Measurement,
    available_memory,
    interleaved_measurements,
    machine,
    peak_memory,
)
from benchmarks.rivals import BETAS, RIVALS
from benchmarks.table import Row, print_table

OURS = ("native", "torch")
GEMMS = "bare GEMMs"
#: The floor of each objective: "3S" where no teacher's head is multiplied with.
FLOORS = {"3S + T": True, "3S": False}
#: Tokens of the two runs from which eager's memory is extrapolated.
PROBES = (256, 512)

#: (objective, who): names a row of the table.
Key = tuple[str, str]


def table_keys(objectives: list[str]) -> list[Key]:
    keys = [(GEMMS, floor) for floor in FLOORS]
    for objective in objectives:
        rivals = tuple(RIVALS) if objective in BETAS else ()
        keys += [(objective, who) for who in (*OURS, "eager", *rivals)]
    return keys


def runner(key: Key) -> Callable[[Problem], Gradients]:
    objective, who = key
    if objective == GEMMS:
        return lambda problem: bare_gemms(problem, teacher=FLOORS[who])
    return provider(who, objective)


def gradient_errors(keys: list[Key], problem: Problem) -> dict[Key, float]:
    """Of the providers that can run at all."""
    errors = {}
    for objective in dict.fromkeys(objective for objective, _ in keys if objective != GEMMS):
        exact = exact_gradients(objective, problem)
        for key in keys:
            if key[0] == objective:
                try:
                    errors[key] = gradient_error(key[1], objective, problem, exact=exact)
                except Exception as error:
                    say(f"no gradient error of {' '.join(key)}: {reason_of(error)}")
    return errors


def measure(problem: Problem, keys: list[Key], repeats: int, errors: dict[Key, float]) -> list[Row]:
    """All rows at this number of tokens."""
    torch.compiler.reset()  # what was compiled for another number of tokens
    tokens = problem.hidden.shape[0]
    calls: dict[Key, Callable[[], Gradients]] = {}
    reasons: dict[Key, str] = {}
    for key in keys:
        try:
            run = runner(key)
            if key[1] == "eager":
                check_fits(run, problem)
            run(problem)  # the warm-up
        except Exception as error:  # a row that fails is a result
            reasons[key] = reason_of(error)
        else:
            calls[key] = partial(run, problem)
        say(f"{tokens} tokens, {' '.join(key)}: {reasons.get(key, 'warm')}")
    measured = interleaved_measurements(calls, repeats, warmup=0)
    gradients = sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight))

    def row(key: Key) -> Row:
        objective, who = key
        error, reason = errors.get(key), reasons.get(key)
        if key not in measured:
            return Row(tokens, objective, who, None, None, None, None, None, error, reason)
        mine = measured[key]
        ours = None if objective == GEMMS else (objective, OURS[0])
        peak = mine.peak
        return Row(
            tokens, objective, who, mine.times,
            ratio(measured, key, floor_of(key)), ratio(measured, key, ours),
            peak, None if peak is None else max(0, peak - gradients), error, None,
        )  # fmt: skip

    return [row(key) for key in keys]


def floor_of(key: Key) -> Key:
    if key[0] == GEMMS:
        return key
    return (GEMMS, "3S" if key[0] == "tropd_given" else "3S + T")


def ratio(measured: dict[Key, Measurement], key: Key, to: Key | None) -> float | None:
    if to not in measured:
        return None
    return measured[key].times.median / measured[to].times.median


def check_fits(run: Callable[[Problem], Gradients], problem: Problem) -> None:
    """Raises MemoryError where a function that holds all logits cannot have them. Checks nothing on
    a system that does not say what it has."""
    tokens, (few, more) = problem.hidden.shape[0], PROBES
    has = available_memory()
    if tokens <= more or has is None:
        return
    peaks = {}
    for n in PROBES:
        part = problem.first(n, problem.hidden.dtype)
        run(part)
        peaks[n] = peak_memory(partial(run, part))
    if peaks[few] is None:
        return
    needs = peaks[more] + (tokens - more) * (peaks[more] - peaks[few]) / (more - few)
    if needs > 0.9 * has:
        raise MemoryError(f"needs about {needs / 1e9:.1f} GB, {has / 1e9:.1f} GB are free")


def reason_of(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).split("\n")[0]
    if isinstance(error, MemoryError):
        return f"out of memory ({text})"
    if "can't allocate memory" in text:  # torch's CPU allocator, a RuntimeError
        return f"out of memory ({text[text.index('you tried') :]})" if "you tried" in text else text
    return f"{type(error).__name__}: {text}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--growth", action="store_true", help="ours alone over N, see growth.py")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--teacher-hidden-size", type=int, default=2048)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="a folder")
    args = parser.parse_args()
    args.tokens = sorted(args.tokens or (growth.TOKENS if args.growth else (1024, 4096)))
    return args


def main() -> None:
    args = parse()
    shape = (args.vocab_size, args.hidden_size, args.teacher_hidden_size)
    on = machine()
    facts = {
        "command": " ".join(["python -m benchmarks.cpu", *sys.argv[1:]]),
        "machine": on,
        "shape": dict(zip(("vocab_size", "hidden_size", "teacher_hidden_size"), shape)),
        "dtype": "bfloat16",
    }
    for name, fact in on.items():
        print(f"{name}: {fact}")
    print(f"vocabulary {shape[0]}, widths {shape[1]} and {shape[2]}, bf16 inputs", flush=True)
    problem = make_problem(max(args.tokens), *shape)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.growth:
        growth.run(problem, args.tokens, args.repeats, args.out, facts)
        return
    keys = table_keys(args.objectives)
    errors = gradient_errors(keys, problem)
    rows: list[Row] = []
    for tokens in args.tokens:
        rows += measure(problem.first(tokens, problem.hidden.dtype), keys, args.repeats, errors)
        found = facts | {"rows": [asdict(row) for row in rows]}  # a run cut short keeps these
        (args.out / "cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
