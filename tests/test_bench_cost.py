"""What `tropd bench` costs on a processor slower than those that it was written on, or without
products of bfloat16. Clocks that the work moves stand for processors: nothing is measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dtypes
from benchmarks.bench import ceilings, command
from benchmarks.bench.results import read

ROOT = Path(__file__).resolve().parents[1]
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
