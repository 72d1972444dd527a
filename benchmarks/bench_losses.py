"""Loss and all gradients with a dense teacher: eager, `torch.compile`, and every backend that runs.

    make bench
    make bench ARGS="--tokens 1024 --vocab-size 151936 --hidden-size 1024"

Each row of the table is one provider's median; its peak memory is over the inputs, its gradients
included; its error is against float64. For ratios use `python -m benchmarks.compare`, whose runs
are interleaved.
"""

import pytest
import torch

from benchmarks.losses import OBJECTIVES, gradient_error, provider
from benchmarks.measure import peak_memory

from .conftest import ON_GPU

#: On a CPU, Triton runs in its interpreter, whose time means nothing.
PROVIDERS = ("eager", "compile", "torch", *(["triton"] if ON_GPU else []))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", PROVIDERS)
def bench_loss_and_gradients(benchmark, table, problem, name, objective):
    run = provider(name, objective)

    def call():
        found = run(problem)
        if ON_GPU:
            torch.cuda.synchronize()
        return found

    call()
    benchmark.pedantic(call, rounds=3, warmup_rounds=0)
    row = {
        "loss": objective,
        "provider": name,
        "median": benchmark.stats.stats.median,
        "peak": peak_memory(call, device=problem.hidden.device),
        "error": gradient_error(name, objective, problem),
    }
    benchmark.extra_info.update(row)
    table.append(row)
