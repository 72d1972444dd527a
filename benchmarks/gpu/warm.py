"""Compiles the kernels of one loss into Triton's cache, by a call with the headline's vocabulary.

    python -m benchmarks.gpu.warm tropd --shape qwen3-1.7b

Few tokens and small widths suffice: one chunk of gradients, and heads that leave the memory to the
checks that run at the same time; no kernel is compiled for a width.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch

from benchmarks import records
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import make_problem
from benchmarks.bench.providers import runner
from benchmarks.bench.shapes import SHAPES
from tropd_kernels.backends import choose_backend

TOKENS, WIDTH = 2048, 256


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm", description=__doc__)
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    options = parser.parse_args()
    widths = {"hidden_size": WIDTH, "teacher_hidden_size": WIDTH}
    problem = make_problem(TOKENS, replace(SHAPES[options.shape], **widths), device="cuda")
    problem.ready_for(LOSSES[options.loss].teacher)
    torch.cuda.synchronize()
    start = time.perf_counter()
    runner(choose_backend(None, problem.hidden.device), options.loss)(problem)
    torch.cuda.synchronize()
    records.emit(loss=options.loss, seconds=round(time.perf_counter() - start, 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
