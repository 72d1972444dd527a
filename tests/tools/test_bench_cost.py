"""What `tropd bench` costs on a processor slower than those that it was written on, or without
products of bfloat16. Clocks that the work moves stand for processors: nothing is measured."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dtypes, products
from benchmarks.bench import accuracy, budget, ceilings, command, eager, run
from benchmarks.bench.budget import OutOfTime
from benchmarks.bench.problem import Problem
from benchmarks.bench.providers import PROVIDERS, Provider
from benchmarks.bench.results import read

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--vocab-size", "96", "--hidden-size", "16", "--teacher-hidden-size", "24"]


class Clock:
    """Seconds that pass by what is done, at `rate` FLOP or bytes a second."""

    def __init__(self, rate: float = 1.0):
        self.now, self.rate = 0.0, rate

    def __call__(self) -> float:
        return self.now

    def does(self, work: float) -> None:
        self.now += work / self.rate


def bench(tmp_path: Path, *options: str) -> tuple[int, Path]:
    out = tmp_path / "cpu.json"
    status = command.main(
        [*SIZES, "--device", "cpu", "--repeats", "1", "--out", str(out), *options]
    )
    return status, out


# --- the roof of the roofline ------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e8, 1e9, 1e10, 1e12, 1e14])
def test_the_probe_takes_a_second_on_any_processor(rate):
    """2048 x 2048 x 2048 six times is 100 seconds at 1 GFLOP/s."""
    clock, sizes = Clock(rate), []

    def make(size):
        sizes.append(size)
        return lambda: clock.does(2.0 * size**3)

    found = ceilings.highest_rate(
        [64, 128, 256, 512, 1024, 2048], lambda size: 2.0 * size**3, make, clock=clock
    )
    assert found == pytest.approx(rate)
    assert clock.now < 0.5 and sizes == sorted(sizes)
    assert (sizes[-1] == 2048) == (rate >= 1e12)


def test_the_probe_counts_a_processors_own_work():
    found = ceilings.ceilings("cpu", torch.float32)
    assert found["flop_per_second"] > 0 < found["bytes_per_second"]


def test_only_who_draws_the_roof_pays_for_it(tmp_path, monkeypatch, capsys):
    """The roof belongs to the machine that measured, so that nobody makes it up later: the picture
    of a file without one says so."""
    plain = tmp_path / "plain"
    plain.mkdir()
    options = ["--losses", "sft", "--providers", "torch", "--tokens", "4"]
    with FlopCounterMode(display=False) as counter:
        status, out = bench(plain, *options)
    assert status == 0 and "ceilings" not in json.loads(out.read_text("utf-8"))
    assert counter.get_total_flops() < 1e7

    pytest.importorskip("matplotlib")
    from benchmarks.bench import plot

    said = {}
    for folder, more in ((plain, []), (tmp_path / "drawn", ["--plot"])):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(command, "ceilings", lambda *_: {"flop_per_second": 4e12,
                                                             "bytes_per_second": 2e10})  # fmt: skip
        _, out = bench(folder, *options, *more)
        results = read(out)
        axis = plot.roofline(results, [row for row in results.rows if row.both]).axes[0]
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        said[folder.name] = (axis.get_title(), "4 TFLOP/s, 20 GB/s" in labels)
    assert said == {"plain": ("no roof: measured without --plot", False), "drawn": ("", True)}


def test_without_matplotlib_plot_ends_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.bench.plot", None)
    import benchmarks.bench

    monkeypatch.delattr(benchmarks.bench, "plot", raising=False)
    status, out = bench(tmp_path, "--losses", "sft", "--tokens", "4", "--plot")
    assert status == 2 and not out.exists()
    assert "matplotlib is not installed" in capsys.readouterr().err


# --- the dtype that nobody asked for -----------------------------------------------------------


@pytest.mark.parametrize(
    ("onednn", "hardware", "machine", "expected"),
    [
        (True, True, "x86_64", torch.bfloat16),
        (True, False, "x86_64", torch.float32),  # AVX-512 alone: oneDNN multiplies in float32
        (False, True, "x86_64", torch.float32),  # ONEDNN_MAX_CPU_ISA below what the CPU has
        (True, False, "aarch64", torch.bfloat16),
        (None, True, "arm64", torch.float32),  # torch without oneDNN
    ],
)
def test_bfloat16_where_the_processor_multiplies_it(
    onednn, hardware, machine, expected, monkeypatch
):
    class Operators:
        if onednn is not None:
            _is_mkldnn_bf16_supported = staticmethod(lambda: onednn)

    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    monkeypatch.setattr(dtypes, "bf16_in_hardware", lambda: hardware)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    dtype, reason = dtypes.default_dtype("cpu")
    assert dtype == expected
    assert ("does not multiply bfloat16" in reason) == (expected == torch.float32)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's caps are of x86"
)
def test_a_capped_process_takes_float32():
    """The CPU's own flags say bf16 still, and torch's products of it are 50 times slower."""
    code = "from benchmarks.dtypes import default_dtype; print(default_dtype('cpu')[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "torch.float32"


@pytest.mark.parametrize("units", ["AMX", None])
def test_the_heading_says_which_dtype_and_why(units, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dtypes, "bf16_units", lambda device: units)
    options = ["--losses", "sft", "--providers", "torch", "--tokens", "4"]
    chosen, other = ("bfloat16", "float32") if units else ("float32", "bfloat16")
    assert json.loads(bench(tmp_path, *options)[1].read_text("utf-8"))["dtype"] == chosen
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(f"{chosen}: ")]
    assert line.endswith("; --dtype takes another") and (units or "does not multiply") in line
    _, out = bench(tmp_path, *options, "--dtype", other)
    assert json.loads(out.read_text("utf-8"))["dtype"] == other
    assert f"{other}: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("units", "asked", "expected"),
    [("AMX", [], True), (None, [], False), (None, ["--mm"], True), ("AMX", ["--no-mm"], False)],
)
def test_torchs_bf16_products_are_measured_where_they_end(
    units, asked, expected, monkeypatch, capsys
):
    seen = []
    monkeypatch.setattr(products, "bf16_units", lambda: units)
    monkeypatch.setattr(products, "measure_products", lambda args: seen.append(args.mm))
    products.main(asked)
    assert seen == [expected]
    assert ("no mm: " in capsys.readouterr().out) == (not expected and not asked)


# --- the budget of a row -----------------------------------------------------------------------


def call_of(clock: Clock, fixed: float, per_token: float, loading: float = 0.0):
    """`Cost.check`'s make: calls of which the first loads something; and the tokens of all."""
    runs: list[int] = []

    def make(tokens):
        def call():
            clock.does(fixed + per_token * tokens + (0 if runs else loading))
            runs.append(tokens)

        return call

    return make, runs


@pytest.mark.parametrize(
    ("fixed", "per_token", "loading", "runs"),
    [
        (0.0, 0.001, 0.0, [2]),  # one small run says enough
        (0.0, 0.001, 20.0, [2, 2]),  # a compiler's work is not the call's
        (0.5, 0.001, 20.0, [2, 2, 8]),  # nor is what it does for any number of tokens
        (1.0, 0.02, 0.0, [2, 2, 8]),
    ],
)
def test_a_row_that_fits_is_let_in(fixed, per_token, loading, runs):
    clock = Clock()
    make, done = call_of(clock, fixed, per_token, loading)
    budget.Cost(clock=clock).check(make, [64, *[1024] * 5], 120.0)
    assert done == runs
    assert clock.now + loading + 6 * fixed + per_token * (64 + 5 * 1024) <= 120


@pytest.mark.parametrize(
    ("fixed", "per_token"), [(0.0, 0.05), (0.0, 2.0), (0.0, 100.0), (60.0, 0.0), (2.0, 0.03)]
)
def test_a_row_that_does_not_fit_is_known_by_small_runs(fixed, per_token):
    """What a warm-up would show after hours: the runs stop where they would cost a tenth of the
    budget, and the smallest is of two tokens."""
    clock = Clock()
    make, done = call_of(clock, fixed, per_token)
    cost = budget.Cost(clock=clock)
    with pytest.raises(budget.OutOfTime) as left_out:
        cost.check(make, [64, *[1024] * 5], 120.0)
    smallest = 2 * (fixed + 2 * per_token)
    spent = clock.now
    assert spent <= max(smallest, 12.0)
    needs = 6 * fixed + per_token * (64 + 5 * 1024)
    assert left_out.value.needs >= needs
    if len(set(done)) > 1:
        assert left_out.value.needs == pytest.approx(needs + spent)
    assert 1.15 * left_out.value.needs <= left_out.value.sufficient <= 1.5 * left_out.value.needs
    with pytest.raises(budget.OutOfTime):  # the next number of tokens, by what is known
        cost.check(make, [2048] * 5, 120.0)
    assert clock.now == spent


def test_what_was_measured_serves_the_next_number_of_tokens():
    """Without the first run, of which nobody knows what of it was loading."""
    clock = Clock()
    make, done = call_of(clock, 0.1, 0.01, loading=5.0)
    cost = budget.Cost(clock=clock)
    cost.check(make, [8] * 5, 120.0)
    cost.add(8, 0.1 + 0.01 * 8)
    assert cost.of(16) == pytest.approx(2 * 0.18)
    cost.add(16, 0.1 + 0.01 * 16)
    assert cost.of(1024) == pytest.approx(0.1 + 0.01 * 1024) and done == [2]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (179, "179 s"), (181, "3 min"), (11000, "3 h")]
)
def test_durations(seconds, text):
    assert budget.duration(seconds) == text


@pytest.fixture
def slow(monkeypatch):
    """A provider "slow" that takes a second a token by the benchmark's clock, and the tokens of its
    runs."""
    clock, runs = Clock(), []

    def loss(problem):
        runs.append(len(problem.labels))
        clock.does(runs[-1])
        return eager.eager("sft")(problem)

    monkeypatch.setitem(PROVIDERS, "slow", Provider("slow", ("sft",), lambda _: loss))
    monkeypatch.setattr(run, "Cost", partial(budget.Cost, clock=clock))
    return runs


def test_a_row_over_the_budget_is_left_out_and_says_what_it_needs(slow, tmp_path, capsys):
    options = ["--losses", "sft", "--providers", "slow", "torch", "--tokens", "40", "80"]
    status, out = bench(tmp_path, *options, "--budget", "30")
    printed = capsys.readouterr()
    rows = {(row.tokens, row.who): row for row in read(out).rows}
    assert status == 0 and rows[40, "torch"].both and rows[80, "torch"].both
    # Gradient error, warm-up, one turn, memory; small runs of 2.
    assert slow == [2, 2]
    assert rows[40, "slow"].reason == "out of time (needs about 164 s, --budget is 30 s)"
    assert rows[80, "slow"].reason.startswith("out of time (needs about 5 min")
    assert "slow: out of time (needs about 164 s, --budget is 30 s); --budget 200 takes it" in (
        printed.err
    )
    assert "left out: rows of more than 30 s" in printed.out
    assert "out of time (needs about 164 s" in printed.out
    assert json.loads(out.read_text("utf-8"))["budget"] == 30


def test_no_budget_no_small_runs(slow, tmp_path):
    options = ["--losses", "sft", "--providers", "slow", "--tokens", "4", "--budget", "0"]
    _, out = bench(tmp_path, *options)
    assert slow == [4] * 4 and all(row.both for row in read(out).rows)


def test_the_budget_takes_what_it_says_is_enough(slow, tmp_path):
    options = ["--losses", "sft", "--providers", "slow", "--tokens", "40", "--budget", "200"]
    _, out = bench(tmp_path, *options)
    assert slow == [2, 40, 40, 40, 40] and all(row.both for row in read(out).rows)


def test_float64_is_in_the_budget(tmp_path, monkeypatch, capsys):
    """On a small machine the truth takes longer than what it judges."""
    clock = Clock(0.1)
    whole = accuracy.runner

    def slow_runner(*names):
        made = whole(*names)
        return lambda problem: (clock.does(len(problem.labels)), made(problem))[1]

    monkeypatch.setattr(accuracy, "runner", slow_runner)
    monkeypatch.setattr(accuracy, "Cost", partial(budget.Cost, clock=clock))
    options = ["--losses", "sft", "--providers", "torch", "--tokens", "40", "--budget", "100"]
    _, out = bench(tmp_path, *options)
    rows = {row.who: row for row in read(out).rows}
    assert rows["torch"].both and rows["torch"].error is None
    said = "no gradient errors of sft: out of time (needs about 7 min, --budget is 100 s)"
    assert said in capsys.readouterr().err


def test_a_teacher_that_takes_too_long_costs_its_losses(tmp_path, monkeypatch, capsys):
    """Its log-probs are made before anybody is timed."""
    whole, seen = run.Cost.check, []

    def check(self, make, calls, seconds, what=""):
        seen.append((list(calls), what))
        if what:
            raise budget.OutOfTime(500.0, seconds, what)
        return whole(self, make, calls, seconds, what)

    monkeypatch.setattr(run.Cost, "check", check)
    made = []
    monkeypatch.setattr(Problem, "ready_for", lambda self, form: made.append(form) or self)
    options = ["--losses", "opd", "sft", "--providers", "torch", "--tokens", "40"]
    _, out = bench(tmp_path, *options)
    rows = {(row.loss, row.who): row for row in read(out).rows}
    assert rows["sft", "torch"].both and "opd" not in str(made)
    expected = "the teacher's log-probs, made for all: needs about 8 min, --budget is 120 s"
    for who in ("gemms", "torch"):
        assert rows["opd", who].reason == f"out of time ({expected})"
    assert ([40], "the teacher's log-probs, made for all: ") in seen
    assert f"opd: out of time ({expected}); --budget 600 takes it" in capsys.readouterr().err


def test_inputs_that_take_too_long_end_the_run(tmp_path, monkeypatch, capsys):
    clock = Clock()
    pace = budget.Pace(640, 120.0, clock=clock)
    clock.does(12.0)
    pace.after(64)
    clock.does(13.0)
    with pytest.raises(budget.OutOfTime, match=r"needs about 125 s"):
        pace.after(128)
    budget.Pace(640, None, clock=clock).after(1)

    def too_long(*_, budget, **__):
        raise OutOfTime(1234.0, budget)

    monkeypatch.setattr(command, "make_problem", too_long)
    status, out = bench(tmp_path, "--losses", "sft", "--tokens", "40", "--budget", "60")
    assert status == 2 and not out.exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "tropd bench: the inputs alone: needs about 21 min, --budget is 60 s; take fewer tokens, a "
        "smaller shape, or --budget 1500"
    )


@pytest.mark.parametrize("given", ["-1", "inf", "nan"])
def test_a_budget_is_seconds(given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench(tmp_path, "--budget", given)
    assert f"must be seconds, or 0 for no limit, got {given}" in capsys.readouterr().err


def test_rows_are_printed_as_soon_as_they_are_there(tmp_path, monkeypatch, capsys):
    """A table that waits for its last row is none for an hour."""
    seen = []
    whole = run.measure_loss

    def measure_loss(loss, *rest):
        seen.append(capsys.readouterr().out)
        return whole(loss, *rest)

    monkeypatch.setattr(run, "measure_loss", measure_loss)
    options = ["--losses", "opd", "sft", "--providers", "torch", "--tokens", "4"]
    assert bench(tmp_path, *options)[0] == 0
    assert "--- 4 tokens, sft" not in seen[1] and "--- 4 tokens, opd" in seen[1]
    assert re.search(r"^ours, torch +\d", seen[1], re.M)
    last = capsys.readouterr().out
    assert "--- 4 tokens, sft" in last and "--- 4 tokens, opd" not in last
