"""The table of `cpu.py`: a row for each objective and who computes it, 112 columns at most."""

from dataclasses import dataclass

from benchmarks.measure import Times

LABELS = {"native": "ours, native", "torch": "ours, torch", "liger": "Liger", "trl": "TRL"}
MEANING = {
    "tropd": "TrOPD, dense teacher: K1 where trusted, else forward KL on the teacher's top 64",
    "tropd_exact": "the same, its forward KL over the whole vocabulary",
    "tropd_given": "the same, given the teacher's top 64 ids and log-probs; its floor is 3S",
    "gkd": "Jensen-Shannon divergence, beta 0.5, over the whole vocabulary",
    "reverse_kl": "KL(student || teacher) over the whole vocabulary",
}


@dataclass(frozen=True)
class Row:
    """One row. Memory in bytes; `reason` says why there are no figures."""

    tokens: int
    objective: str
    who: str
    times: Times | None
    to_gemms: float | None  # ratio of medians to the floor
    to_ours: float | None  # and to ours, native, on the same objective
    peak: int | None  # over the inputs
    workspace: int | None  # over the inputs and the returned gradients
    error: float | None
    reason: str | None


def print_table(rows: list[Row]) -> None:
    print(
        f"{'objective':12}{'who':14}{'median s':>9} {'(p20 to p80)':18}{'× GEMMs':>8}{'× ours':>8}"
        f"{'peak MB':>9}{'over grads':>12}{'error':>9}"
    )
    last = None
    for row in rows:
        if row.tokens != last:
            print(f"{row.tokens} tokens".center(100, "-"))
            last = row.tokens
        print(f"{row.objective:12}{LABELS.get(row.who, row.who):14}", end="")
        error = "-" if row.error is None else f"{row.error:.1e}"
        if row.times is None:
            print(f"  {shorten(row.reason, 62):63}{error:>9}")
            continue
        t = row.times
        print(
            f"{seconds(t.median):>9} {f'({seconds(t.p20)} to {seconds(t.p80)})':18}"
            f"{figure(row.to_gemms):>8}{figure(row.to_ours):>8}"
            f"{megabytes(row.peak):>9}{megabytes(row.workspace):>12}{error:>9}"
        )
    print("× GEMMs: over the bare products of the same shapes; × ours: over ours, native")
    for objective in dict.fromkeys(row.objective for row in rows):
        if objective in MEANING:
            print(f"{objective}: {MEANING[objective]}")


def seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
