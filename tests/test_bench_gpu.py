"""The one call for a GPU, in sizes that a CPU runs: its steps, its time-boxes, the chunk sizes."""

from __future__ import annotations

import json
import re
import sys
import time
import zipfile

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, rows
from benchmarks.bench import results, tuning
from benchmarks.bench.shapes import SHAPES, Shape
from tropd_kernels import chunking, plan_chunks

TINY = Shape(vocab_size=96, hidden_size=16, teacher_hidden_size=24)


def test_chunk_sizes_are_swept_and_put_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    before = tuning.defaults("cpu"), tuning.defaults("cuda")
    with tuning.chunks_of((128, 256)):
        plan = plan_chunks(4096, 96, 16, 24, device="cuda")
        assert (plan.rows, plan.super_rows) == (128, 256)
    seen = []
    whole = chunking.plan_chunks
    monkeypatch.setattr(
        "tropd_kernels.linear_loss.plan_chunks",
        lambda *a, **k: seen.append(whole(*a, **k).rows) or whole(*a, **k),
    )
    out = tmp_path / "tuning.json"
    status = tuning.main(
        ["--shape", "tiny", "--tokens", "600", "--repeats", "1", "--rows", "128", "384",
         "--super-rows", "384", "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    assert status == 0 and {128, 256, 384} <= set(seen)
    assert (tuning.defaults("cpu"), tuning.defaults("cuda")) == before
    swept = json.loads(out.read_text("utf-8"))["sweep"]
    assert [row["default"] for row in swept].count(True) == 1 and len(swept) == 3
    medians = [row["seconds"]["median"] for row in swept]
    assert medians == sorted(medians)
    assert capsys.readouterr().out.count("default") == 1
    assert not results.is_results(out)


def test_row_passes_are_told_by_their_bytes(tmp_path, capsys):
    out = tmp_path / "rows.json"
    tiny = ["--tokens", "8", "--vocab-size", "64", "--repeats", "1", "--device", "cpu"]
    with FlopCounterMode(display=False) as counter:
        assert rows.main([*tiny, "--backend", "torch", "--out", str(out)]) == 0
    assert counter.get_total_flops() < 1e6  # a copy is the bar: no product is probed
    stored = json.loads(out.read_text("utf-8"))
    row = stored["passes"]["gradient, reverse KL"]
    moved = row["bytes_per_second"] * row["seconds"]["median"]
    assert moved == pytest.approx(8 * 64 * (4 + 4 + 2))
    share = 100 * row["bytes_per_second"] / stored["copy_bytes_per_second"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "reverse KL" in line)
    assert line.split()[-1] == f"{share:.0f}"
    assert not results.is_results(out)
    assert rows.main([*tiny, "--backend", "torch", "--sweep", "--out", str(out)]) == 2
    assert "--sweep is of Triton's launches; the backend here is torch" in capsys.readouterr().err


def test_launches_are_swept_and_put_back(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from tropd_kernels.rows import triton_launch

    before = triton_launch.tile_options(9999, torch.float32, 4, 4)
    monkeypatch.setattr(rows, "SWEEP", {"WARPS": (4,), "PROGRAMS": (0,)})
    seen = set()
    whole = triton_launch.power_of_two
    monkeypatch.setattr(
        triton_launch,
        "power_of_two",
        lambda *a, **k: seen.add(triton_launch.WARPS) or whole(*a, **k),
    )
    out = tmp_path / "rows.json"
    arguments = ["--tokens", "1", "--vocab-size", "64", "--repeats", "1", "--out", str(out)]
    assert rows.main([*arguments, "--backend", "triton", "--sweep"]) == 0
    assert seen == {4, 8}
    assert triton_launch.tile_options(9999, torch.float32, 4, 4) == before
    swept = json.loads(out.read_text("utf-8"))["sweep"]
    assert set(swept) == {"WARPS 4", "PROGRAMS 0"} and "reason" not in swept["WARPS 4"]


@pytest.mark.slow
def test_every_step_of_the_gpu_call(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "wheels" / "rival-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("rival/__init__.py", "")
    monkeypatch.setenv(gpu.RIVALS, str(wheel.parent))
    status = gpu.main(["--tiny", "--minutes", "60", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "rivals: rival" in printed
    states = printed.splitlines()[-5:]
    names = ["tests", "table", "rows", "chunks", "compiled"]
    assert [line.split(":")[0] for line in states] == names
    assert "gradient, reverse KL" in printed
    assert all(": done in" in line for line in states) and "passed" in states[0]
    # The table, and the step with the compiled one.
    assert len(re.findall(r"^tropd +ours, torch +96", printed, re.M)) == 2 and "default" in printed


def test_a_step_has_its_time_and_no_more(tmp_path):
    environment = gpu.environment_with(tmp_path)
    start = time.monotonic()
    state = gpu.run(
        gpu.Step("x", ["sh", "-c", "echo begun; sleep 600"], 1), 2, tmp_path, environment
    )
    assert state == "stopped after 2 s; last line: begun" and time.monotonic() - start < 200
    code = "import rival, sys; print('bad'); sys.exit(3)"
    (tmp_path / "rival.py").touch()
    state = gpu.run(gpu.Step("x", [sys.executable, "-c", code], 1), 250, tmp_path, environment)
    assert re.fullmatch(r"FAILED with status 3 after \d+ s; last line: bad", state)
