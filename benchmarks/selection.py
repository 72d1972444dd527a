"""What a selection of tokens saves: time of a call with `select_fraction`, against all tokens.

    python -m benchmarks.selection         4096 tokens at a vocabulary of 151,936; 5 minutes
    python -m benchmarks.selection --tokens 512 --vocab-size 8192 --json build/selection.json

Each rule is run with and without its selection, in turns, on random hidden states; the ratio is of
medians, and stands beside that of the matrix products by `plan_chunks`. Random numbers suffice: the
work follows from the share that is selected, whichever tokens those are.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.dtypes import default_dtype
from benchmarks.measure import machine
from tropd_kernels import (
    GKD,
    OPD,
    HiddenTeacher,
    SampledTeacher,
    linear_distillation_loss,
    plan_chunks,
)

#: A rule, its form of teacher, and the scores by which it selects.
CASES = (
    ("OPD", OPD(), "sampled", ("entropy", "scores")),
    ("GKD", GKD(), "hidden", ("entropy", "teacher_entropy", "reverse_kl", "scores")),
)


def measure(options: argparse.Namespace) -> list[dict]:
    """One entry for each rule and score."""
    if options.dtype is None:
        options.dtype = str(default_dtype(options.device)[0]).removeprefix("torch.")
    dtype = getattr(torch, options.dtype)
    device, n = torch.device(options.device), options.tokens
    torch.manual_seed(0)

    def head(width: int) -> list[torch.Tensor]:
        shapes, scales = ((n, width), (options.vocab_size, width)), (1.0, 3 / width**0.5)
        made = zip(shapes, scales, strict=True)
        return [(torch.randn(s, device=device) * scale).to(dtype) for s, scale in made]

    hidden, weight = (t.requires_grad_() for t in head(options.hidden_size))
    teachers = {
        "hidden": HiddenTeacher(*head(options.teacher_hidden_size)),
        "sampled": SampledTeacher(-5 * torch.rand(n, device=device)),
    }
    labels = torch.randint(options.vocab_size, (n,), device=device)
    scores = torch.rand(n, device=device)
    entries = []
    for name, rule, form, selects in CASES:
        rules = {None: rule} | {
            by: replace(rule, select_by=by, select_fraction=options.fraction) for by in selects
        }
        seconds: dict = {by: [] for by in rules}
        for _ in range(options.repeats):
            for by, each in rules.items():
                hidden.grad = weight.grad = None
                start = time.perf_counter()
                out = linear_distillation_loss(
                    hidden, weight, labels, teachers[form], each, backend=options.backend,
                    scores=scores if by == "scores" else None,
                )  # fmt: skip
                out.loss.backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[by].append(time.perf_counter() - start)
        width = options.teacher_hidden_size if form == "hidden" else None
        flop = {
            by: plan_chunks(
                n, options.vocab_size, options.hidden_size, width, dtype=dtype, device=device,
                backend=options.backend, objective=each,
            ).gemm_flop
            for by, each in rules.items()
        }  # fmt: skip
        times = {by: statistics.median(each) for by, each in seconds.items()}
        for by in rules:
            entries.append({
                "objective": name, "teacher": form, "select_by": by, "seconds": seconds[by],
                "ratio": times[by] / times[None], "product_ratio": flop[by] / flop[None],
            })  # fmt: skip
            print(
                f"{name:<4} {form:<8} {by or 'all tokens':<16} {times[by]:8.2f} s   "
                f"{entries[-1]['ratio']:.2f} of all tokens, products {flop[by] / flop[None]:.2f}",
                flush=True,
            )
    return entries


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--tokens", type=int, default=4096)
    add("--vocab-size", type=int, default=151_936)
    add("--hidden-size", type=int, default=1024)
    add("--teacher-hidden-size", type=int, default=2048)
    add("--fraction", type=float, default=0.1, help="share of the tokens that is selected")
    add("--repeats", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="default: what the device multiplies")
    add("--backend", help="default: the one that a call takes by itself")
    add("--json", type=Path, help="a file to write")
    options = parser.parse_args(arguments)
    entries = measure(options)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        shape = {k: v for k, v in vars(options).items() if k != "json"}
        text = json.dumps({"machine": machine(), "options": shape, "entries": entries}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
