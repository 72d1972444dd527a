"""How time and workspace of our loss grow with the number of tokens: `python -m benchmarks.cpu
--growth`.

TrOPD with a dense teacher on the native backend, loss and all gradients. Time should be linear in
N; the workspace, the peak over inputs and returned gradients, should not grow, and should be what
`plan_chunks` says. The bare products hold the logits of all tokens, so they are timed at one N, in
the same interleaved runs, and scaled to the others.

Writes cpu_growth.json and cpu_growth.png.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.losses import Problem, bare_gemms, provider
from benchmarks.measure import Times, interleaved_measurements
from benchmarks.table import megabytes, seconds
from tropd_kernels import plan_chunks

TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
#: The bare products are timed at no more tokens than this.
MOST_GEMM_TOKENS = 4096
OBJECTIVE, BACKEND = "tropd", "native"


@dataclass(frozen=True)
class Point:
    """One number of tokens. Seconds and bytes; gemms: of the bare products, scaled to it."""

    tokens: int
    times: Times
    seconds_per_token: float
    gemms: float
    workspace: int | None
    planned: int


def run(problem: Problem, tokens: list[int], repeats: int, folder: Path, facts: dict) -> None:
    points, gemm_tokens = measure(problem, tokens, repeats)
    text = json.dumps(
        facts | {"gemm_tokens": gemm_tokens, "points": [asdict(p) for p in points]}, indent=1
    )
    (folder / "cpu_growth.json").write_text(text + "\n")
    print(
        f"{'tokens':>7}{'median s':>10} {'(p20 to p80)':18}{'ms a token':>11}{'× GEMMs':>9}"
        f"{'workspace MB':>14}{'planned MB':>12}"
    )
    for p in points:
        print(
            f"{p.tokens:7}{seconds(p.times.median):>10} "
            f"{f'({seconds(p.times.p20)} to {seconds(p.times.p80)})':18}"
            f"{p.seconds_per_token * 1e3:11.3f}{p.times.median / p.gemms:9.2f}"
            f"{megabytes(p.workspace):>14}{megabytes(p.planned):>12}"
        )
    print(f"× GEMMs: over the bare products of {gemm_tokens} tokens, scaled")
    draw(points, gemm_tokens, facts, folder / "cpu_growth.png")


def measure(problem: Problem, tokens: list[int], repeats: int) -> tuple[list[Point], int]:
    """The points, and the number of tokens at which the bare products were timed."""
    ours = provider(BACKEND, OBJECTIVE)
    dtype = problem.hidden.dtype
    parts = {n: problem.first(n, dtype) for n in tokens}
    gemm_tokens = max((n for n in tokens if n <= MOST_GEMM_TOKENS), default=MOST_GEMM_TOKENS)
    gemm_part = problem.first(gemm_tokens, dtype)
    calls = {str(n): partial(ours, part) for n, part in parts.items()}
    measured = interleaved_measurements(
        calls | {"gemms": partial(bare_gemms, gemm_part)}, repeats, warmup=1
    )
    gemms = measured["gemms"].times.median / gemm_tokens

    def point(n: int) -> Point:
        part, found = parts[n], measured[str(n)]
        gradients = sum(t.numel() * t.element_size() for t in (part.hidden, part.weight))
        plan = plan_chunks(
            n, part.weight.shape[0], part.weight.shape[1], part.teacher_weight.shape[1],
            dtype=dtype, device="cpu", backend=BACKEND,
        )  # fmt: skip
        return Point(
            n, found.times, found.times.median / n, gemms * n,
            None if found.peak is None else max(0, found.peak - gradients), plan.workspace_bytes,
        )  # fmt: skip

    return [point(n) for n in tokens], gemm_tokens


def draw(points: list[Point], gemm_tokens: int, facts: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # writes files; needs no display
    import matplotlib.pyplot as plt

    ours, floor = "#1f6feb", "#6e7781"
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), dpi=150, layout="constrained")
    shape, versions = facts["shape"], facts["machine"]
    figure.suptitle("TrOPD, loss and all gradients, on a CPU", weight="bold")
    figure.supxlabel(
        f"V {shape['vocab_size']:,}, widths {shape['hidden_size']:,} and "
        f"{shape['teacher_hidden_size']:,}, bf16; backend {BACKEND}; {versions['cpu']}; "
        f"torch {versions['torch']}",
        fontsize=7, color="#57606a",
    )  # fmt: skip
    n = [p.tokens for p in points]

    medians = [p.times.median for p in points]
    low = [p.times.median - p.times.p20 for p in points]
    high = [p.times.p80 - p.times.median for p in points]
    left.errorbar(n, medians, [low, high], color=ours, marker="o", capsize=3, label="ours")
    gemms = f"bare GEMMs, 3S + T\n(timed at {gemm_tokens:,} tokens, scaled)"
    left.plot([0, *n], [0, *(p.gemms for p in points)], "--", color=floor, label=gemms)
    left.set_title("time")
    left.set_ylabel("seconds, median and p20 to p80")

    known = [p for p in points if p.workspace is not None]
    right.plot(
        [p.tokens for p in known], [p.workspace / 1e6 for p in known],
        color=ours, marker="o", label="measured",
    )  # fmt: skip
    right.plot(n, [p.planned / 1e6 for p in points], "--", color=floor, label="plan_chunks")
    right.set_title("workspace")
    right.set_ylabel("MB over inputs and returned gradients")

    # The small ones would stand on each other.
    ticks = [tokens for tokens in n if tokens >= max(n) / 8]
    for axes in (left, right):
        axes.set_xlabel("tokens")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlim(0, 1.04 * max(n))
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)
