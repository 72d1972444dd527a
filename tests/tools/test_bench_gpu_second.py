"""What the second call for a GPU does about the first one's records, and its baselines' wheels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import baselines, command, first, plugin, prepare, second, suite
from benchmarks.gpu.smoke import CHECKS
from tropd_kernels.backends import engine_for
from tropd_kernels.products import products_for

pytestmark = pytest.mark.slow  # of our own tools, not of the package

# --- choices -----------------------------------------------------------------------------------


def chunk(rows, super_rows, ratio, workspace=10**9, default=False):
    return {
        "step": "chunks", "rows": rows, "super_rows": super_rows, "over_default": ratio,
        "workspace": workspace, "default": default,
    }  # fmt: skip


STANDARD = chunk(512, 2048, 1.0, default=True)


@pytest.mark.parametrize(
    ("timed", "sizes"),
    [
        ([chunk(1024, 8192, 0.93), chunk(1024, 4096, 0.97)], (1024, 8192)),
        # Within half a part in a hundred, less memory.
        ([chunk(1024, 8192, 0.930, 9 * 10**9), chunk(1024, 4096, 0.934, 10**9)], (1024, 4096)),
        ([chunk(1024, 8192, 0.995)], None),
        ([chunk(1024, 8192, 1.2)], None),
        ([chunk(1024, 8192, "nan"), chunk(256, 2048, 0.9)], (256, 2048)),
        ([{"step": "chunks", "rows": 2048, "super_rows": 8192, "reason": "out of memory"}], None),
        ([], None),
    ],
)
def test_chunk_sizes_are_chosen_by_what_the_first_call_timed(timed, sizes):
    found, why = second.chosen_chunks([STANDARD, *timed], 8192)
    assert found == sizes and "\n" not in why
    assert ("stay" in why) == (sizes is None)


def product(what, tokens, ms, vocab=151_936):
    return {"step": "gemms", "what": what, "vocab": vocab, "width": 2048, "tokens": tokens,
            "ms": ms}  # fmt: skip


def test_where_no_chunk_sizes_were_timed_products_decide():
    """Milliseconds in proportion to the tokens, but for what a case is about."""
    plan = {"step": "gemms", "what": "plan", "rows": 512, "super_rows": 2048}
    flat = [
        product(what, m, m / 512) for m in (512, 1024, 2048, 8192)
        for what in ("logits", "d_hidden", "d_weight +=")
    ]  # fmt: skip
    assert second.chosen_chunks([plan, *flat], 8192)[0] is None
    slow = [r | {"ms": 3.0} if (r["what"], r["tokens"]) == ("logits", 512) else r for r in flat]
    assert second.chosen_chunks([plan, *slow], 8192)[0][0] > 512
    # One product that rounds, where a super-chunk holds all tokens, and only there.
    whole = [*flat, product("d_weight, bf16", 8192, 8.0), product("d_weight, bf16", 2048, 0.1)]
    assert second.chosen_chunks([plan, *whole], 8192)[0] == (512, 8192)
    assert second.chosen_chunks([plan, *whole], 2048)[0] is None  # the plan's hold them all
    # Another shape's products are not mixed in; without the plan's there is nothing to compare.
    other = [product("logits", 2048, 0.001, vocab=128_256)]
    assert second.chosen_chunks([plan, *flat, *other], 8192)[0] is None
    assert second.chosen_chunks(slow, 8192)[0] is None


def test_checks_and_tests_that_were_not_seen_to_pass_come_again():
    found = [{"step": "smoke", "check": name, "ok": True} for name in CHECKS if name != "graph"]
    found[0]["ok"] = False
    found += [
        {"test": "a::x", "outcome": "failed"}, {"test": "a::y", "outcome": "passed"},
        {"test": "a::z", "outcome": "failed"}, {"test": "a::z", "outcome": "passed"},
    ]  # fmt: skip
    assert second.failed_checks(found) == [CHECKS[0], "graph"]
    assert second.failed_tests(found) == ["a::x"]
    assert second.failed_checks([]) == list(CHECKS)


def first_call(*states):
    return [{"step": s, "job": j, "state": how} for s, j, how in states]


def test_the_second_call_is_made_of_the_first_ones_records(tmp_path):
    shape = first.SHAPES[0]
    found = [
        STANDARD, chunk(1024, 8192, 0.9), {"test": "tests/a.py::x", "outcome": "failed"},
        *first_call(
            ("headline", f"{shape} tropd eager", "done"),
            ("headline", f"{shape} opd eager", "late"),
            ("headline", f"{shape} gkd eager", "crashed"),
            ("headline", f"{shape} tropd_given eager", "failed"),
            ("baselines", f"{shape} sft cce", "skipped"), ("clusters", "clusters", "done"),
        ),
    ]  # fmt: skip
    made = second.jobs(found, tmp_path / "known", tmp_path, False, second.MINUTES)
    names = {(job.step, job.name): job for job in made}
    assert len(names) == len(made) and max(job.until for job in made) == 290
    ours = names["headline", f"{shape} tropd ours"].command
    assert ours[ours.index("--chunks") + 1 :][:2] == ("1024", "8192")
    again = {name for _, name in names}
    assert {f"{shape} opd eager", f"{shape} gkd eager"} <= again
    assert not {f"{shape} tropd eager", f"{shape} tropd_given eager", f"{shape} sft cce"} & again
    assert ("clusters", "clusters") not in names
    assert "tests/a.py::x" in names["tests", "failed"].command
    assert names["baselines", f"{shape} gkd liger"].needs == ("gpu", "liger_kernel")
    assert "--sweep" in names["rows", "sweep"].command
    assert str(tmp_path / "known") in names["tests", "tests"].command
    # Nothing failed, nothing to choose: the plan's own sizes, once.
    made = second.jobs([STANDARD], tmp_path / "known", tmp_path, False, second.MINUTES)
    assert not any("--chunks" in job.command or job.name == "failed" for job in made)


def test_another_card_is_said():
    def on(name):
        return {"gpu": name and {"name": name}}

    found = [{"step": "facts", "facts": on("NVIDIA H200")}]
    assert second.other_card(found, on("NVIDIA H200")) is None
    assert "on NVIDIA H200, this one on NVIDIA H100" in second.other_card(found, on("NVIDIA H100"))
    assert "this one on no GPU" in second.other_card(found, on(None))


def test_a_first_call_is_read_from_its_file_or_its_tar(tmp_path, capsys):
    for name, text in (("plain", '{"a": 1}\n{"torn'), ("bad", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text(text)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "gpu.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "plain" / "results.jsonl", "results.jsonl")
    assert second.load(tmp_path / "plain") == second.load(packed) == [{"a": 1}]
    (packed / "gpu.tar.gz").write_bytes(b"no tar")
    for folder in ("bad", "packed", "absent"):
        out = tmp_path / "out"
        assert command.main(["--after", str(tmp_path / folder), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("--after: ") and said.count("\n") == 1
        assert not out.exists()
    same = str(tmp_path / "plain")
    assert command.main(["--tiny", "--minutes", "0.01", "--after", same, "--out", same]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert second.load(tmp_path / "plain") == [{"a": 1}]  # still there


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_call_that_is_asked_to_end_still_packs_and_prints(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out)],
        cwd=command.ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(command.ROOT)},
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("skipped, ") or "smoke" in line:
                break
        process.send_signal(signal.SIGTERM)
        printed = process.stdout.read()
        assert process.wait() == 1
    finally:
        process.kill()
    assert "the call got SIGTERM" in printed and "jobs: " in printed
    assert (out / "gpu.tar.gz").exists()


# --- tests as records --------------------------------------------------------------------------

SUITE = """
import pytest
@pytest.mark.parametrize("i", range(3))
def test_each(i):
    assert i != 1, "one"
def test_lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after():
    pass
@pytest.mark.skip(reason="no reason")
def test_skipped():
    pass
"""


def run_suite(folder, *options):
    file = folder / "test_these.py"
    file.write_text(SUITE)
    results = folder / "records.jsonl"
    results.unlink(missing_ok=True)
    status = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.suite", str(file), *options],
        cwd=command.ROOT, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(command.ROOT), records.FILE: str(results)},
    ).returncode  # fmt: skip
    found, _ = records.read(results)
    return status, {r["test"].split("::")[1]: r for r in found}


def test_tests_are_a_record_each_until_the_context_is_lost(tmp_path):
    """What would fail after that says nothing of itself. A later call leaves out what passed."""
    status, found = run_suite(tmp_path)
    assert status == plugin.LOST_STATUS
    outcomes = {name: r["outcome"] for name, r in found.items()}
    assert outcomes == {
        "test_each[0]": "passed", "test_each[1]": "failed", "test_each[2]": "passed",
        "test_lost": "failed",
    }  # fmt: skip
    assert "one" in found["test_each[1]"]["reason"]
    known = tmp_path / "known.jsonl"
    (tmp_path / "records.jsonl").rename(known)
    records.append(known, found["test_lost"] | {"outcome": "passed"})
    status, found = run_suite(tmp_path, "--passed", str(known))
    assert status == 0
    outcomes = {name: r["outcome"] for name, r in found.items()}
    assert outcomes == {"test_each[1]": "failed", "test_after": "passed", "test_skipped": "skipped"}
    assert found["test_skipped"]["reason"].endswith("no reason")


def test_the_suites_are_there():
    assert all((command.ROOT / name).exists() for name in suite.SUITES)


# --- what travels ------------------------------------------------------------------------------


def test_baselines_are_fetched_in_the_versions_of_the_table():
    wanted = prepare.requirements()
    assert "trl==1.16.0" in wanted and "liger-kernel==0.8.5" in wanted
    assert not any(word.startswith("-") for word in wanted)


def test_a_stub_stands_in_for_datasets_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    path = baselines.environment(tmp_path / "none", tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert str(baselines.STUBS) in path and path.index(str(baselines.STUBS)) > 0
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: object())
    assert (
        str(baselines.STUBS) not in baselines.environment(tmp_path / "none", tmp_path)["PYTHONPATH"]
    )


def test_products_that_are_timed_are_those_of_a_call(monkeypatch, capsys):
    from benchmarks.gpu import gemms

    names = [one.what for one in gemms.products(64, 8, 4, torch.float32, "cpu")]
    assert names == ["logits", "d_hidden", "d_weight", "d_weight +="]
    kind = type(products_for(engine_for("triton"), torch.float32, "cpu"))
    monkeypatch.setattr(kind, "d_hidden", lambda *a: 1 / 0)
    gemms.measure([(64, 8, (4,)), (64, 16, (4,))], torch.float32, "cpu", 1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["what"], "reason" in r) for r in lines] == [
        ("logits", False), ("d_hidden", True), ("logits", False), ("d_hidden", True),
    ]  # fmt: skip
