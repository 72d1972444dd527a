"""One provider on one loss, and the bare products in the same turns: a record for each row.

    python -m benchmarks.gpu.headline ours gkd --shape qwen3-1.7b
    python -m benchmarks.gpu.headline ours gkd --shape qwen3-1.7b --chunks 1024 8192

With --chunks a third one takes its turns: ours, with those chunk sizes in place of the plan's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from benchmarks import records
from benchmarks.bench.command import positive, say
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import make_problem
from benchmarks.bench.providers import PROVIDERS, ours, runner
from benchmarks.bench.run import Settings, measure
from benchmarks.bench.shapes import SHAPES
from benchmarks.bench.timing import reason_of
from benchmarks.bench.tuning import Sizes, with_chunks
from benchmarks.dtypes import default_dtype, dtype_name
from tropd_kernels.backends import choose_backend


def with_sizes(backend: str, sizes: Sizes) -> str:
    """The name of a provider of ours with these chunk sizes, for this process."""
    name, made = f"{backend} {sizes[0]}x{sizes[1]}", ours(backend)
    PROVIDERS[name] = replace(
        made, label=f"ours {sizes[0]}x{sizes[1]}",
        build=lambda loss: with_chunks(runner(backend, loss), sizes).forward,
    )  # fmt: skip
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every row has figures, else `records.RECORDED_FAILURE`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.headline", description=__doc__)
    parser.add_argument("who", help=f"ours or one of {', '.join(PROVIDERS)}")
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--chunks", type=positive, nargs=2, metavar=("ROWS", "SUPER_ROWS"))
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, _ = default_dtype(device)
    backend = choose_backend(None, torch.device(device))
    names = [backend if options.who == "ours" else options.who]
    if options.chunks:
        names.append(with_sizes(backend, tuple(options.chunks)))
    if names[0] not in PROVIDERS:
        parser.error(f"who: unknown {options.who!r}")
    torch.empty(1, device=device)  # a GPU's context takes a second, too
    records.wait_for_turn()
    common = {"shape": options.shape, "dtype": dtype_name(dtype)}
    try:
        problem = make_problem(options.tokens, SHAPES[options.shape], dtype, device)
    except Exception as error:  # a GPU that is too small
        reason = f"the inputs do not fit: {reason_of(error)}"
        records.emit(**common, loss=options.loss, who=names[0], tokens=options.tokens,
                     reason=reason)  # fmt: skip
        return records.RECORDED_FAILURE
    settings = Settings([options.tokens], [options.loss], names, options.repeats, device)
    whole = True
    for rows in measure(problem, settings, say):
        for row in rows:
            records.emit(**common, **{k: v for k, v in asdict(row).items() if v is not None})
            whole = whole and row.reason is None
    return 0 if whole else records.RECORDED_FAILURE


if __name__ == "__main__":
    sys.exit(main())
