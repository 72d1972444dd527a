"""The passes over rows of logits that exist: time, and what share of the machine's bandwidth.

    python -m benchmarks.rows                    the fastest backend here
    python -m benchmarks.rows --backend torch
    python -m benchmarks.rows --sweep            of the Triton kernels, with other launches

Bytes are what a pass has to move, each once: float32 logits of student and teacher read, bf16
d_logits written. 100 % is a large copy on the same machine. A pass that reads a row again may find
it in a cache, and exceed that; one that computes much cannot reach it.

On a GPU the time is the GPU's, of a CUDA graph's replays (`benchmarks.device_times`): what the host
takes to launch a pass is more than a pass over a few hundred rows takes. Each pass, and each other
launch, is a record as it comes (`benchmarks.records`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.bench.ceilings import bytes_per_second
from benchmarks.bench.command import UsageError, check_writable, device_of, positive, say
from benchmarks.bench.timing import reason_of
from benchmarks.device_times import device_times
from benchmarks.measure import machine
from benchmarks.records import emit, wait_for_turn
from tropd_kernels import GKD, OPD, Divergence, TrOPD
from tropd_kernels.backends import choose_backend, engine_for
from tropd_kernels.rows.layout import LogitTransform, RowBatch, RowOptions

#: Of the rows, in `TrOPD`'s case.
OUTLIERS = 0.1
#: Values that are tried one at a time, the others as they are.
SWEEP = {
    "WARPS": (4, 16),
    "STATISTICS_UNROLL": (1, 2, 8),
    "SUMS_UNROLL": (1, 4),
    "ASKED_WARPS": (8,),
    "GRADIENT_BLOCK": (1024, 4096),
    "PROGRAMS": (0, 2048, 8192),
}


@dataclass(frozen=True)
class Pass:
    """A call, and the bytes that it has to move for each id of a row."""

    call: Callable[[], object]
    bytes_an_id: float


def passes(backend: str, n: int, vocab_size: int, device: str) -> dict[str, Pass]:
    """Those of the objectives whose tables `tropd bench` prints, by name."""
    engine = engine_for(backend)
    generator = torch.Generator(device).manual_seed(0)

    def logits():
        return 4 * torch.randn(n, vocab_size, device=device, generator=generator)

    z, t = logits(), logits()
    # A student sure of a token that its teacher would not write: an outlier where the draw is high.
    labels = z.argmax(1)
    uniforms = torch.zeros(n, device=device)
    uniforms[: int(OUTLIERS * n)] = 1 - 2**-20
    two_sided = RowBatch(z, t, labels, uniforms=uniforms)
    student_only = RowBatch(z, None, labels, label_log_probs=torch.full((n,), -3.0, device=device))
    out = torch.empty(n, vocab_size, dtype=torch.bfloat16, device=device)

    d_logits, hidden = logits().bfloat16(), torch.rand(2, n, device=device)

    def options(rule):
        return RowOptions(rule, LogitTransform(), LogitTransform())

    def gradient(batch, rule):
        coefs = engine.forward(batch, options(rule))[1]
        return partial(engine.gradient, batch, coefs, options(rule), out)

    tropd, opd, gkd, reverse = TrOPD(), OPD(), GKD(), Divergence("reverse_kl")
    return {
        "statistics, student": Pass(partial(engine.forward, student_only, options(opd)), 4),
        "statistics, both": Pass(partial(engine.forward, two_sided, options(reverse)), 8),
        f"... and top 64 of {OUTLIERS:.0%}": Pass(
            partial(engine.forward, two_sided, options(tropd)), 8 + OUTLIERS * 12
        ),
        "... and JSD": Pass(partial(engine.forward, two_sided, options(gkd)), 16),
        "gradient, K1": Pass(gradient(student_only, opd), 6),
        f"gradient, TrOPD ({OUTLIERS:.0%})": Pass(gradient(two_sided, tropd), 6 + OUTLIERS * 4),
        "gradient, reverse KL": Pass(gradient(two_sided, reverse), 10),
        "gradient, JSD": Pass(gradient(two_sided, gkd), 10),
        "column sums": Pass(partial(engine.column_sums, d_logits, hidden), 2),
    }


def measure(
    todo: Mapping[str, Pass], n: int, vocab_size: int, repeats: int, device: str
) -> Iterator[tuple[str, dict]]:
    """By name, each as it is there: seconds, how they were taken, and bytes a second."""
    for name, one in todo.items():
        times, how = device_times(one.call, repeats, device)
        yield (
            name,
            {
                "seconds": vars(times),
                "timed_by": how,
                "bytes_per_second": n * vocab_size * one.bytes_an_id / times.median,
            },
        )


@contextmanager
def launched_with(**constants: int) -> Iterator[None]:
    """Triton's launch configurations with other constants."""
    from tropd_kernels.rows import triton_launch

    before = {name: getattr(triton_launch, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(triton_launch, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(triton_launch, name, value)


def render(found: dict[str, dict], most: float) -> str:
    lines = [f"{'pass':<24}{'median ms':>11}{'GB/s':>8}{'% of copy':>11}"]
    for name, row in found.items():
        rate = row["bytes_per_second"]
        milliseconds = 1e3 * row["seconds"]["median"]
        lines.append(f"{name:<24}{milliseconds:>11.3f}{rate / 1e9:>8.0f}{100 * rate / most:>11.0f}")
    return "\n".join(lines)


def render_sweep(found: dict[str, dict], default: dict[str, dict]) -> str:
    """Times over those of the configuration in use."""
    lines = [f"{'launched with':<24}" + "".join(f"{i:>8}" for i in range(1, len(default) + 1))]
    for label, rows in found.items():
        if "reason" in rows:
            lines.append(f"{label:<24}  {rows['reason']}")
            continue
        ratios = (
            rows[name]["seconds"]["median"] / default[name]["seconds"]["median"] for name in default
        )
        lines.append(f"{label:<24}" + "".join(f"{ratio:>8.2f}" for ratio in ratios))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=positive, help="default: 4096 on a GPU, 512 on a CPU")
    parser.add_argument("--vocab-size", type=positive, default=151_936)
    parser.add_argument("--backend")
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/bench/rows.json"))
    options = parser.parse_args(arguments)
    try:
        device = device_of(options.device)
        backend = choose_backend(options.backend, torch.device(device))
        check_writable("--out", options.out)
        if options.sweep and backend != "triton":
            raise UsageError(f"--sweep is of Triton's launches; the backend here is {backend}")
    except (UsageError, ValueError, RuntimeError) as error:
        say(f"rows: {error}")
        return 2
    on_gpu = torch.device(device).type == "cuda"
    n, v = options.tokens or (4096 if on_gpu else 512), options.vocab_size
    torch.empty(1, device=device)  # before its turn: a GPU's context takes a second
    wait_for_turn()
    most = bytes_per_second(device)
    found = {}
    for name, row in measure(passes(backend, n, v, device), n, v, options.repeats, device):
        found[name] = row
        emit(**{"pass": name}, **row, of_copy=row["bytes_per_second"] / most)
    facts = {
        "machine": machine(device), "backend": backend, "tokens": n, "vocab_size": v,
        "copy_bytes_per_second": most, "passes": found,
    }  # fmt: skip
    print(f"{n} rows of {v} ids, {backend}; a copy moves {most / 1e9:.0f} GB/s")
    print(render(found, most), flush=True)
    if options.sweep:
        swept: dict[str, dict] = {}
        for name, values in SWEEP.items():
            for value in values:
                label = f"{name} {value}"
                try:
                    with launched_with(**{name: value}):
                        todo = passes(backend, n, v, device)
                        swept[label] = dict(measure(todo, n, v, options.repeats, device))
                except Exception as error:  # what does not fit the chip is a result
                    swept[label] = {"reason": reason_of(error)}
                    emit(launch=label, **swept[label])
                    continue
                emit(launch=label, over_default={
                    key: row["seconds"]["median"] / found[key]["seconds"]["median"]
                    for key, row in swept[label].items()
                })  # fmt: skip
        facts["sweep"] = swept
        print(render_sweep(swept, found))
    options.out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
