"""Loss and all gradients under pytest-benchmark, for its histories and comparisons of runs:

    python -m pytest benchmarks --benchmark-columns=median,iqr,min,rounds --benchmark-autosave
    python -m pytest benchmarks --tokens 1024 --vocab-size 151936 --hidden-size 1024

Eager, `torch.compile` and our backends, one after the other. For ratios, and for other
libraries, use `tropd bench`, whose runs take turns.
"""

import pytest
import torch

from benchmarks.bench.accuracy import truth
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.providers import runner, why_not
from benchmarks.bench.results import Row
from benchmarks.measure import Times, peak_memory

#: On a CPU, Triton runs in its interpreter, whose time means nothing.
PROVIDERS = ("eager", "compile", "torch", "triton" if torch.cuda.is_available() else "native")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_loss_and_gradients(benchmark, rows, problem, name, loss):
    if reason := why_not(name, problem):
        pytest.skip(reason)
    run = runner(name, loss)

    def call():
        found = run(problem)
        if problem.hidden.is_cuda:
            torch.cuda.synchronize()
        return found

    call()
    benchmark.pedantic(call, rounds=3, warmup_rounds=0)
    stats = benchmark.stats.stats
    peak = peak_memory(call, device=problem.hidden.device)
    row = Row(
        problem.hidden.shape[0], loss, name,
        both=Times(stats.median, stats.q1, stats.q3), peak=peak,
        workspace=None if peak is None else max(0, peak - problem.gradient_bytes),
        error=truth(loss, problem).error_of(run),
    )  # fmt: skip
    benchmark.extra_info.update(loss=loss, provider=name, peak=row.peak, error=row.error)
    rows.append(row)
