"""The call for a GPU, in sizes that a CPU runs: jobs that go wrong, boxes and deadlines, what is
said of a machine; and the chunk sizes and row passes that it measures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import records, rows
from benchmarks.bench import results, tuning
from benchmarks.bench.shapes import SHAPES, Shape
from benchmarks.gpu import baselines, command, facts, first, tables
from benchmarks.gpu.jobs import Job, missing, scaled, step
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.smoke import CHECKS, NEEDS_GPU
from benchmarks.gpu.smoke import __main__ as smoke
from benchmarks.gpu.smoke.sizes import TINY as TINY_CHECK
from tropd_kernels import plan_chunks
from tropd_kernels.loss import plan as chunking

pytestmark = pytest.mark.slow  # of our own tools, not of the package

TINY = Shape(vocab_size=96, hidden_size=16, teacher_hidden_size=24)


def test_chunk_sizes_are_swept_and_put_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    for device in ("cpu", "cuda"):
        before = plan_chunks(4096, 96, 16, 24, device=device)
        with tuning.chunks_of((128, 256)):
            plan = plan_chunks(4096, 96, 16, 24, device=device)
            assert plan.rows == 128 and plan.super_rows == (128 if plan.in_place else 256)
        assert plan_chunks(4096, 96, 16, 24, device=device) == before != plan
    seen = []
    whole = chunking.plan_chunks
    monkeypatch.setattr(
        "tropd_kernels.loss.loop.plan_chunks",
        lambda *a, **k: seen.append(whole(*a, **k).rows) or whole(*a, **k),
    )
    out = tmp_path / "tuning.json"
    monkeypatch.setenv(records.FILE, str(tmp_path / "records.jsonl"))
    status = tuning.main(
        ["--shape", "tiny", "--tokens", "600", "--repeats", "1", "--rows", "128", "384",
         "--super-rows", "384", "1024", "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    assert status == 0 and chunking.FIXED_SIZES is None
    swept = json.loads(out.read_text("utf-8"))["sweep"]
    (own,) = (row["rows"] for row in swept if row["default"])  # by the CPU's dtype
    assert own not in (128, 384) and {128, own, 384} <= set(seen)
    assert [row["default"] for row in swept].count(True) == 1 and len(swept) == 5
    medians = [row["seconds"]["median"] for row in swept]
    assert medians == sorted(medians)
    kept, _ = records.read(tmp_path / "records.jsonl")  # each as it came, the default first
    assert [r["default"] for r in kept] == [True, False, False, False, False]
    assert [r["super_rows"] for r in kept[1:]] == [1024, 1024, 384, 384]
    assert kept[0]["over_default"] == 1 and kept[1]["over_default"] > 0
    assert capsys.readouterr().out.count("  default\n") == 1
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
    printed = capsys.readouterr().out.splitlines()
    line = next(line for line in printed if line.startswith("gradient, reverse KL"))
    assert line.split()[-1] == f"{share:.0f}"
    told = next(json.loads(line) for line in printed if '"gradient, reverse KL"' in line)
    assert 100 * told["of_copy"] == pytest.approx(share)
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


# --- the runner --------------------------------------------------------------------------------

EMIT = "from benchmarks import records; records.emit(what='here')"
GARBAGE = """
import os, sys
sys.stdout.buffer.write(bytes(range(256)) * 200)
open(os.environ["TROPD_RECORDS"], "ab").write(b'{"half": \\xff\\x00')
"""
BREAKS = {
    "crash": ("sh", "-c", "echo going; kill -SEGV $$"),
    "hang": ("sh", "-c", "echo hanging; sleep 600"),
    "garbage": (sys.executable, "-c", GARBAGE),
}


def job(name, *command, seconds=60.0, **more):
    return Job(step="x", name=name, command=command, seconds=seconds, **more)


def python(name, code, **more):
    return job(name, sys.executable, "-c", code, **more)


def runner_in(folder, workers=2):
    start = time.monotonic()
    environment = baselines.environment(folder / "none", folder)
    return Runner(folder, folder, environment, workers, lambda: time.monotonic() - start)


def ends(folder):
    """How each job ended, by its name."""
    found, _ = records.read(folder / "results.jsonl")
    return {record["job"]: record for record in found if "state" in record}


def test_whatever_a_job_does_the_next_ones_come(tmp_path, capsys):
    """And a record that follows half a line is read."""
    jobs = [job(name, *how, seconds=2 if name == "hang" else 60) for name, how in BREAKS.items()]
    absent = job("absent", str(tmp_path / "no such program"))
    runner_in(tmp_path).run([*jobs, absent, python("last", EMIT)], None)
    found, bad = records.read(tmp_path / "results.jsonl")
    assert bad == 1 and {"step": "x", "job": "last", "what": "here"} in found
    state = {name: (end["state"], end.get("reason", "")) for name, end in ends(tmp_path).items()}
    assert state["crash"] == ("crashed", "killed by SIGSEGV; last line: going")
    assert state["hang"] == ("stopped", "stopped after 2 s; last line: hanging")
    assert state["absent"][0] == "crashed" and "could not be started" in state["absent"][1]
    assert state["garbage"][0] == state["last"][0] == "done"
    printed = capsys.readouterr().out
    assert all(f"x {name}: " in printed for name in state)
    assert "1 lines of the records could not be read" in tables.render(found, bad)
    assert b"=== x hang: stopped\nhanging" in (tmp_path / "logs.txt").read_bytes()


def test_what_a_check_finds_is_no_crash(tmp_path):
    code = f"{EMIT}; records.emit(reason='nan'); raise SystemExit({records.RECORDED_FAILURE})"
    runner_in(tmp_path).run([python("check", code)], None)
    assert ends(tmp_path)["check"]["state"] == "failed"
    assert ends(tmp_path)["check"]["reason"] == "nan"


def test_jobs_that_are_alone_have_nothing_beside_them(tmp_path):
    """The others share, up to the number of workers; and what waits for its turn has begun."""
    note = (
        "import sys, time; from benchmarks import records; begun = time.time(); {}\n"
        "since = time.time(); time.sleep(0.4)\n"
        "records.emit(begun=begun, since=since, until=time.time())"
    )
    plain, waiting = note.format("pass"), note.format("records.wait_for_turn()")
    jobs = [python(f"together {i}", plain, exclusive=False) for i in range(3)]
    jobs += [python(f"alone {i}", waiting, prestart=True) for i in range(3)]
    runner_in(tmp_path, workers=3).run(jobs, None)
    found, _ = records.read(tmp_path / "results.jsonl")
    spans = {r["job"]: r for r in found if "since" in r}
    together = [spans[f"together {i}"] for i in range(3)]
    assert max(r["since"] for r in together) < min(r["until"] for r in together)
    alone = [spans[f"alone {i}"] for i in range(3)]
    assert alone[0]["since"] >= max(r["until"] for r in together)
    for before, after in pairwise(alone):
        assert after["since"] >= before["until"] > after["begun"]


def test_a_step_ends_at_its_deadline_and_the_next_one_begins(tmp_path):
    sleep = "import time; time.sleep(600)"
    late = step(3, [python("hangs", sleep, seconds=600), python("late", EMIT)])
    more = [python("endless", sleep, seconds=1, open_end=True), python("next", EMIT)]
    runner_in(tmp_path).run([*late, *step(300, more)], None)
    found = {name: end["state"] for name, end in ends(tmp_path).items()}
    assert found == {"hangs": "stopped", "late": "late", "endless": "done", "next": "done"}
    assert ends(tmp_path)["late"]["reason"] == "its step's time was up"
    assert [j.until for j in scaled(late, 2.0)] == [6.0, 6.0]


def test_children_are_stopped_with_their_job(tmp_path):
    """Also where it has ended by itself: they would hold the GPU's memory."""
    code = (
        "import subprocess; from benchmarks import records;"
        "records.emit(pid=subprocess.Popen(['sleep', '600']).pid)"
    )
    runner_in(tmp_path).run([python("parent", code)], None)
    found, _ = records.read(tmp_path / "results.jsonl")
    assert ends(tmp_path)["parent"]["state"] == "done"
    assert_gone(next(r["pid"] for r in found if "pid" in r))


def assert_gone(pid):
    for _ in range(600):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} was left running")


@pytest.mark.skipif(sys.platform != "linux", reason="a kernel that ends children with their parent")
def test_results_outlive_a_runner_that_is_killed_and_its_jobs_do_not(tmp_path):
    code = f"""
import time
from pathlib import Path
from test_bench_gpu import python, runner_in
slow = "import os, time; {EMIT}; records.emit(pid=os.getpid()); time.sleep(600)"
runner_in(Path({str(tmp_path)!r})).run([python("first", {EMIT!r}), python("slow", slow)], None)
"""
    where = os.pathsep.join([str(command.ROOT), str(command.ROOT / "tests" / "tools")])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": where}, cwd=command.ROOT
    )
    try:
        pid = None
        while pid is None and process.poll() is None:
            found, _ = records.read(tmp_path / "results.jsonl")
            pid = next((r["pid"] for r in found if "pid" in r), None)
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert pid is not None
    found, bad = records.read(tmp_path / "results.jsonl")
    assert [r["job"] for r in found if r.get("what") == "here"] == ["first", "slow"] and bad == 0
    assert ends(tmp_path)["first"]["state"] == "done"
    assert_gone(pid)


# --- a whole call ------------------------------------------------------------------------------


@pytest.fixture
def carried(tmp_path):
    folder = tmp_path / "carried" / "wheels"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "baseline-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("baseline/__init__.py", "")
    (folder / "torn-2.0-py3-none-any.whl").write_bytes(b"PK")
    return folder.parent


def test_every_step_comes_where_some_break(tmp_path, carried, monkeypatch, capsys):
    """One crashes, one hangs, one prints garbage; what needs a GPU is skipped by its name."""
    monkeypatch.setattr(first, "CHECKS", ("products", "loss_gkd", "kernels_tropd_odd", "graph"))
    monkeypatch.setattr(first, "LOSSES", ("tropd", "gkd"))
    whole = first.jobs

    def broken(*options):
        made = whole(*options)
        for name, how in BREAKS.items():
            at = next(i for i, one in enumerate(made) if one.step == "headline") + 1
            seconds = 2 if name == "hang" else 600
            made.insert(at, Job(step="headline", name=name, command=how, seconds=seconds))
        return made

    monkeypatch.setattr(first, "jobs", broken)
    out = tmp_path / "out"
    status = command.main(
        ["--tiny", "--minutes", "60", "--out", str(out), "--carried", str(carried)]
    )
    printed = capsys.readouterr().out
    state = {f"{r['step']} {name}": r["state"] for name, r in ends(out).items()}
    assert status == 1
    assert state.pop("headline crash") == "crashed" and state.pop("headline hang") == "stopped"
    if not torch.cuda.is_available():
        assert state.pop("smoke graph") == "skipped"
        assert "skipped, needs a GPU" in printed and "smoke graph" in printed
    steps = {name.split()[0] for name, how in state.items() if how == "done"}
    assert steps >= {
        "facts",
        "smoke",
        "gemms",
        "rows",
        "headline",
        "chunks",
        "baselines",
        "tests",
    }, printed
    assert set(state.values()) <= {"done", "skipped"}, printed
    assert "baselines' wheels: baseline-1.0" in printed and "torn-2.0" in printed
    # The tables come last, with the headline at their end.
    end = printed[-command.CHARACTERS :]
    for text in ("smoke: 3 of 3 checks ok", "could not be read", "default", " passed",
                 "gradient, reverse KL", "headline crash: crashed: killed by SIGSEGV"):  # fmt: skip
        assert text in end, printed
    assert re.search(r"^gkd +TRL +96 .*\n(.+\n)*sft ", end, re.M), printed
    assert sorted(path.name for path in out.iterdir()) == [
        "gpu.tar.gz", "logs.txt", "results.jsonl",
    ]  # fmt: skip
    with tarfile.open(out / "gpu.tar.gz") as tar:
        names = tar.getnames()
        assert tar.extractfile("results.jsonl").read() == (out / "results.jsonl").read_bytes()
    assert "logs/headline_crash.log" in names


def test_an_earlier_call_is_not_mixed_with_this_one(tmp_path):
    for name in ("results.jsonl", "gpu.tar.gz", "mine.txt"):
        (tmp_path / name).write_text("{}\n")
    assert command.emptied(tmp_path) == tmp_path
    assert (tmp_path / "results.jsonl").read_text() == "" and (tmp_path / "mine.txt").exists()
    assert not (tmp_path / "gpu.tar.gz").exists()
    file = tmp_path / "mine.txt"
    assert command.main(["--tiny", "--out", str(file / "below")]) == 2


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in NEEDS_GPU])
def test_checks_pass_here(name, device):
    pytest.importorskip("triton")
    for what, (value, most) in smoke.check(name)(TINY_CHECK, device).items():
        assert value <= most, what


def test_a_kernel_that_errs_fails_its_check(monkeypatch, device):
    """By a part in ten thousand, in one statistic and in the gradient."""
    pytest.importorskip("triton")
    from benchmarks.gpu.smoke import kernels

    whole = kernels.call

    def wrong(*arguments):
        loss, gradient, stats = whole(*arguments)
        if arguments[-1] == "triton":
            gradient = gradient * (1 + 1e-4)
            stats = replace(stats, entropy=stats.entropy * float("nan"))
        return loss, gradient, stats

    monkeypatch.setattr(kernels, "call", wrong)
    found = smoke.check("kernels_gkd_odd")(TINY_CHECK, device)
    bad = {what.split(",")[0] for what, (value, most) in found.items() if not value <= most}
    assert bad == {"gradient", "entropy"}


# --- machines ----------------------------------------------------------------------------------

H100 = {
    "name": "NVIDIA H100", "vendor": "nvidia", "capability": [9, 0], "total": 80 * 2**30,
    "free": 79 * 2**30, "others": [],
}  # fmt: skip
ALL = {"triton": True, "pytest": True, "cupy": True, "trl": True, "liger_kernel": True,
       "cut_cross_entropy": True}  # fmt: skip


def machine_with(modules=ALL, nvcc="release 13.0", cc="/usr/bin/cc", **gpu):
    return {"gpu": H100 | gpu, "modules": modules, "nvcc": nvcc, "cc": cc}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (machine_with(), []),
        (machine_with(name="NVIDIA L4", total=24 * 2**30, free=23.8 * 2**30, capability=[8, 9]),
         ["NVIDIA L4 has 24 GiB, of 60 that the headline takes"]),
        (machine_with(free=50 * 2**30), ["NVIDIA H100 is busy: 30.0 of 80 GiB are held;"]),
        (machine_with(others=["41, 300 MiB"]), ["are held by 1 processes"]),
        (machine_with(name="AMD Instinct MI300X", vendor="amd"), ["MI300X is AMD's"]),
        (machine_with(name="Tesla V100", capability=[7, 0]), ["V100 is sm_70, older than sm_80"]),
        (machine_with(nvcc=None), ["nvcc: not found; nothing here needs it"]),
        (machine_with(cc=None), ["no C compiler"]),
        (machine_with(ALL | {"cupy": False}), ["cupy: not installed; the cluster kernels"]),
        (machine_with(ALL | {"trl": False}), ["baselines not installed: trl; `python -m"]),
        ({"gpu": None, "why_no_gpu": "torch 2 is built for CPUs", "modules": ALL, "nvcc": "x"},
         ["no GPU: torch 2 is built for CPUs; what needs one is skipped"]),
        ({"gpu": None, "modules": {}}, ["no GPU: torch sees none", "nvcc", "cupy", "pytest",
                                        "triton", "baselines not installed"]),
    ],
)  # fmt: skip
def test_what_is_said_of_a_machine_is_a_line_each(found, says):
    lines = facts.warnings(found)
    assert len(lines) == len(says), lines
    assert all(text in line and "\n" not in line for text, line in zip(says, lines))


@pytest.mark.parametrize(
    ("needs", "found", "says"),
    [
        (("gpu", "sm_90", "cupy"), machine_with(), None),
        (("gpu",), machine_with(vendor="amd"), None),
        (("sm_90",), machine_with(name="MI300X", vendor="amd"), "MI300X (ROCm)"),
        (("sm_90",), machine_with(capability=[10, 0], name="B200"), "needs sm_90; B200 is sm_100"),
        (("sm_80",), machine_with(capability=[10, 0]), None),
        (("sm_80",), machine_with(capability=[7, 5], name="T4"), "needs sm_80; T4 is sm_75"),
        (("cupy",), machine_with({}), "needs cupy, which is not installed"),
        (("gpu",), {"gpu": None, "why_no_gpu": "no driver"}, "needs a GPU: no driver"),
        (("gpu", "cupy"), None, None),
    ],
)
def test_what_a_job_misses_is_said_in_a_line(needs, found, says):
    reason = missing(needs, found)
    assert (reason is None) if says is None else (says in reason and "\n" not in reason)


def test_jobs_of_the_first_call_keep_to_its_table(tmp_path):
    """Deadlines rise, boxes end with the call, and every job finds its module and its names."""
    made = first.jobs(tmp_path, False, first.MINUTES)
    alone = [one for one in made if one.exclusive]
    assert [one.until for one in alone] == sorted(one.until for one in alone)
    assert max(one.until for one in made) == 310
    assert max(one.until for one in first.jobs(tmp_path, False, 11)) == 620
    assert len({(one.step, one.name) for one in made}) == len(made)
    assert {one.name for one in made if one.step == "smoke" and one.needs} == set(NEEDS_GPU)
    assert all(shape in SHAPES for shape in first.SHAPES)
    by_step = [one.step for one in alone]
    assert list(dict.fromkeys(by_step)) == [
        "gemms", "rows", "headline", "chunks", "clusters", "baselines", "tests",
    ]  # fmt: skip


def test_a_table_that_cannot_be_made_says_so_and_the_others_come():
    found = [
        {"step": "tests", "job": "tests", "test": "a::b", "outcome": "failed"},
        {"step": "smoke", "job": "mm", "check": "mm"},
    ]
    text = tables.render(found, 0)
    assert "smoke: no table (KeyError" in text and "failed: a::b" in text
