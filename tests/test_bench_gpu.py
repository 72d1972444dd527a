"""The one call for a GPU, in sizes that a CPU runs: its steps, its time-boxes, the chunk sizes."""

from __future__ import annotations

import json
import re
import sys
import time
import zipfile

import pytest

from benchmarks import gpu
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


@pytest.mark.slow
def test_every_step_of_the_gpu_call(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "wheels" / "rival-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("rival/__init__.py", "")
    monkeypatch.setenv(gpu.RIVALS, str(wheel.parent))
    status = gpu.main(["--tiny", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "rivals: rival" in printed
    states = printed.splitlines()[-4:]
    assert [line.split(":")[0] for line in states] == ["tests", "table", "chunks", "compiled"]
    assert all(": done in" in line for line in states) and "passed" in states[0]
    # The table, and the step with the compiled one.
    assert len(re.findall(r"^tropd +ours, torch +96", printed, re.M)) == 2 and "default" in printed


def test_a_step_has_its_time_and_no_more(tmp_path):
    environment = gpu.environment_with(tmp_path)
    code = "import time; print('begun', flush=True); time.sleep(60)"
    start = time.monotonic()
    state = gpu.run(gpu.Step("x", [sys.executable, "-c", code], 1), 2, tmp_path, environment)
    assert state == "stopped after 2 s; last line: begun" and time.monotonic() - start < 20
    code = "import rival, sys; print('bad'); sys.exit(3)"
    (tmp_path / "rival.py").touch()
    state = gpu.run(gpu.Step("x", [sys.executable, "-c", code], 1), 20, tmp_path, environment)
    assert re.fullmatch(r"FAILED with status 3 after \d+ s; last line: bad", state)
