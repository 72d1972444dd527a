"""Eager against fused at one shape, in interleaved runs: the figures that the README quotes.

    python -m benchmarks.compare --tokens 1024 --vocab-size 151936 --hidden-size 1024 \\
        --teacher-hidden-size 2048

Prints time (median, 20th and 80th percentile), its ratio to eager's, peak memory over the inputs,
and the gradient's error against float64 on the first 64 tokens; then the plan's own figure of the
workspace. Runs on a GPU where there is one.
"""

import argparse

import torch

from benchmarks.losses import OBJECTIVES, gradient_error, make_problem, provider
from benchmarks.measure import interleaved_times, machine, peak_memory
from tropd_kernels import plan_chunks
from tropd_kernels.backends import choose_backend


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--teacher-hidden-size", type=int, default=2048)
    parser.add_argument("--objective", choices=OBJECTIVES, default="tropd")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    problem = make_problem(
        args.tokens, args.vocab_size, args.hidden_size, args.teacher_hidden_size, dtype, device
    )
    backend = choose_backend(None, torch.device(device))
    names = ("eager", backend)
    calls = {name: provider(name, args.objective) for name in names}
    times = interleaved_times(
        {name: (lambda run=run: run(problem)) for name, run in calls.items()},
        args.repeats,
        device=device,
    )
    for name, fact in machine(device).items():
        print(f"{name}: {fact}")
    print(f"{args.objective}, {args.tokens} tokens, vocabulary {args.vocab_size}, {args.dtype}")
    print(f"{'':10}{'median s':>10}{'p20':>8}{'p80':>8}{'ratio':>8}{'peak MB':>10}{'error':>10}")
    for name, run in calls.items():
        t = times[name]
        peak = peak_memory(lambda run=run: run(problem), device=device)
        error = gradient_error(name, args.objective, problem)
        memory = "-" if peak is None else f"{peak / 1e6:.0f}"
        print(
            f"{name:10}{t.median:>10.2f}{t.p20:>8.2f}{t.p80:>8.2f}"
            f"{t.median / times['eager'].median:>8.2f}{memory:>10}{error:>10.1e}"
        )
    print(
        plan_chunks(
            args.tokens, args.vocab_size, args.hidden_size,
            None if args.objective == "tropd_given" else args.teacher_hidden_size,
            dtype=dtype, device=device, backend=backend,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
