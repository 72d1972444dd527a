"""`tropd bench`: the baselines compute our losses, the table holds what it should, a failure costs
no other row, and README shows what is stored."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT
from benchmarks.bench import command, eager, page, providers, run, table, timing
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import IGNORED, make_problem
from benchmarks.bench.providers import GEMMS, PROVIDERS, Provider, runner, why_not
from benchmarks.bench.results import Results, Row, read
from benchmarks.bench.shapes import SHAPES, Shape
from benchmarks.dtypes import default_dtype, dtype_name
from benchmarks.measure import Times
from tropd_kernels import cli

TINY = Shape(vocab_size=96, hidden_size=16, teacher_hidden_size=24)
SIZES = ["--vocab-size", "96", "--hidden-size", "16", "--teacher-hidden-size", "24"]
ALL = tuple(LOSSES)
#: "compile" is eager's own function.
BASELINES = [
    pytest.param(who, loss, softcap, id=f"{who}-{loss}" + ("-softcap" if softcap else ""))
    for who, provider in PROVIDERS.items() if who not in (*providers.OURS, "compile")
    for loss in provider.losses
    for softcap in (None, 4.0) if provider.softcap or not softcap
]  # fmt: skip


def bench(tmp_path: Path, *options: str) -> tuple[int, Path]:
    out = tmp_path / "out" / "cpu.json"
    status = command.main(
        [*SIZES, "--device", "cpu", "--repeats", "2", "--out", str(out), *options]
    )
    return status, out


@pytest.fixture
def provider(monkeypatch):
    """Adds a provider of one loss, a function of the problem."""

    def add(name: str, loss, **more) -> None:
        made = Provider(name, ALL, lambda _: loss, **more)
        monkeypatch.setitem(PROVIDERS, name, made)

    return add


# --- the providers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("who", "loss", "softcap"), BASELINES)
def test_a_baseline_computes_our_loss(who, loss, softcap, device, monkeypatch):
    """Loss and gradients in float32, tokens ignored: a baseline with another sign, normalizer,
    beta or mask would be timed at another loss than ours. 64 roundings, as in test_agreement; the
    loss's are of its terms, which for K1 have either sign and cancel."""
    shape = replace(TINY, softcap=softcap)
    problem = make_problem(24, shape, torch.float32, device, ignored=0.4)
    if device != "cpu" and who in ("cce", "quack"):
        pytest.skip("on a GPU these multiply in TF32 or bfloat16 alone")
    if reason := why_not(who, problem):
        pytest.skip(reason)
    if who == "liger":  # whose loop has the same arithmetic uncompiled
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(eager, "CHUNK", 8)  # more than one
    found = []
    for name in ("torch", who):
        made = runner(name, loss)
        value = made.forward(problem)
        found.append([value.detach(), *made.backward(problem, value)])
    terms = eager.counted_mean(eager.EAGER[loss](problem).detach().abs(), problem)
    sizes = [terms, *(gradient.norm() for gradient in found[0][1:])]
    for ours, theirs, size in zip(*found, sizes, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 64 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("loss", LOSSES)
def test_the_floor_is_the_products_of_the_tokens_that_count(loss):
    """A floor with a product too many would flatter everybody."""
    problem = make_problem(20, TINY, ignored=0.5)
    with FlopCounterMode(display=False) as counter:
        d_hidden, d_weight = runner(GEMMS, loss)(problem)
    assert d_hidden.shape == (10, 16) and d_weight.shape == (96, 16)
    teacher = 24 if "3S + T" in LOSSES[loss].floor else 0
    assert counter.get_total_flops() == 2 * 10 * 96 * (3 * 16 + teacher)
    assert ("3S + T" in LOSSES[loss].floor) == (loss not in ("opd", "tropd_given", "sft"))
    assert LOSSES[loss].floor.endswith("of all tokens") == (loss == "gkd_tenth")


def test_a_share_of_the_tokens_is_ignored():
    problem = make_problem(40, TINY, ignored=0.25)
    assert (problem.labels == IGNORED).sum() == 10 and problem.has_ignored
    assert problem.labels[0] != IGNORED
    assert not make_problem(40, TINY).has_ignored


def test_what_is_missing_says_what_to_type(provider, monkeypatch):
    problem = make_problem(4, TINY)
    provider("gone", None, module="no_such_package", install="no-such-package==1.0")
    assert why_not("gone", problem) == "not installed: pip install no-such-package==1.0"
    provider("capless", None, softcap=False)
    assert why_not("capless", problem) is None
    assert why_not("capless", replace(problem, softcap=5.0)) == "knows no soft cap"
    provider("hopper", None, kernels="cuda")
    assert why_not("hopper", problem) == "needs a GPU"
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert "has no chunked F.linear_cross_entropy" in why_not("torch-lce", problem)


# --- the measurement ---------------------------------------------------------------------------


def slow(problem):
    time.sleep(0.05)
    return eager.eager("opd")(problem)


def test_halves_are_timed_apart(provider):
    provider("slow", slow)
    problem = make_problem(8, TINY)
    run = runner("slow", "opd")
    measured, failed = timing.take_turns({"slow": (run, problem)}, 1, "cpu")
    turns = measured["slow"]
    assert not failed and turns.forward.median >= 0.05 > turns.backward.median > 0
    assert turns.both.median == pytest.approx(turns.forward.median + turns.backward.median)
    assert turns.peak is None or turns.peak >= 0


def test_an_error_of_the_gradients_is_seen(provider, tmp_path):
    """10 % too much is an error of 0.1, whatever the loss's value."""
    provider("wrong", lambda problem: 1.1 * eager.eager("gkd")(problem))
    _, out = bench(
        tmp_path, "--providers", "wrong", "eager", "--losses", "gkd", "--tokens", "12",
        "--dtype", "float32",
    )  # fmt: skip
    errors = {row.who: row.error for row in read(out).rows}
    assert errors["wrong"] == pytest.approx(0.1, rel=1e-3)
    assert errors["eager"] < 1e-5 and errors[GEMMS] is None


def test_one_that_fails_costs_its_row_alone(provider, tmp_path, capsys):
    calls = []

    def fails_late(problem):
        calls.extend([None] * (len(problem.labels) == 8))
        if len(calls) > 3:  # gradient error, warm-up, and one turn
            raise RuntimeError("late\nof many lines")
        return eager.eager("opd")(problem)

    def fails(problem):
        raise FileNotFoundError("no /home/somebody/secret/cache.so here")

    provider("late", fails_late)
    provider("early", fails)
    provider("broken", fails, module="torch")
    status, out = bench(
        tmp_path, "--providers", "early", "late", "torch", "--losses", "opd", "--tokens", "8"
    )
    rows = {row.who: row for row in read(out).rows}
    assert status == 0 and rows["torch"].both and rows[GEMMS].both
    assert rows["late"].reason == "RuntimeError: late" and rows["late"].both is None
    assert rows["early"].reason == "FileNotFoundError: no cache.so here"
    printed = capsys.readouterr().out
    assert re.search(r"^early +FileNotFoundError", printed, re.M)
    assert re.search(r"^ours, torch +\d", printed, re.M)


def test_what_cannot_fit_is_not_tried(provider, tmp_path, monkeypatch):
    """Eager's need is extrapolated: past the machine's memory it would end the run."""
    sizes = []

    def hungry(problem):
        sizes.append(problem.hidden.shape[0])
        return eager.eager("opd")(problem)

    provider("hungry", hungry, holds_logits=True)
    problem = make_problem(1024, TINY)
    monkeypatch.setattr(timing, "available_memory", lambda: 2_000_000)
    monkeypatch.setattr(timing, "peak_memory", lambda call: 10_000 * (call() is None or sizes[-1]))
    run = runner("hungry", "opd")
    with pytest.raises(MemoryError, match=r"needs about 0.0 GB, 0.0 GB are free"):
        timing.check_fits(run, problem)
    assert max(sizes) == 512
    monkeypatch.setattr(timing, "available_memory", lambda: 20_000_000_000)
    timing.check_fits(run, problem)
    assert timing.reason_of(MemoryError("needs 3 GB")) == "out of memory (needs 3 GB)"
    cut = timing.reason_of(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9"))
    assert cut == "out of memory (you tried 9)"


# --- the command -------------------------------------------------------------------------------


def test_from_the_command_line_to_the_table(tmp_path, capsys):
    """Two providers, two losses, two sizes: every column, printed and stored, and no path."""
    options = ["--providers", "ours", "eager", "--losses", "opd", "tropd"]
    status, out = bench(tmp_path, *options, "--tokens", "16", "8", "--mask", "0.5", "--plot")
    printed = capsys.readouterr().out
    assert status == 0
    found = json.loads(out.read_text("utf-8"))
    assert found["command"] == (
        f"tropd bench {' '.join(SIZES)} --device cpu --repeats 2 {' '.join(options)} "
        "--tokens 16 8 --mask 0.5 --plot"
    )
    assert str(tmp_path) not in out.read_text("utf-8")
    assert found["machine"]["torch"] == version("torch") and found["ignored"] == 0.5
    assert found["shape"] == vars(TINY) and found["dtype"] == dtype_name(default_dtype()[0])
    assert found["ceilings"]["flop_per_second"] > 0 < found["ceilings"]["bytes_per_second"]
    ours = [name for name in ("native", "torch") if name in {r["who"] for r in found["rows"]}]
    expected = [
        (tokens, loss, who)
        for tokens in (8, 16) for loss in ("opd", "tropd") for who in (GEMMS, *ours, "eager")
    ]  # fmt: skip
    assert [(r["tokens"], r["loss"], r["who"]) for r in found["rows"]] == expected
    for row in found["rows"]:
        assert row["reason"] is None
        for half in ("forward", "backward", "both"):
            assert 0 < row[half]["p20"] <= row[half]["median"] <= row[half]["p80"]
        floor = next(
            r for r in found["rows"]
            if (r["tokens"], r["loss"], r["who"]) == (row["tokens"], row["loss"], GEMMS)
        )  # fmt: skip
        ratio = row["both"]["median"] / floor["both"]["median"]
        assert row["to_gemms"] == pytest.approx(ratio)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["both"]["median"])
        assert (row["error"] is None) == (row["who"] == GEMMS)
        if row["peak"] is not None:
            assert row["peak"] >= row["workspace"] >= 0
    for column in ("forward", "backward", "both (p20 to p80)", "% GEMMs", "tok/s", "peak MB",
                   "over", "error"):  # fmt: skip
        assert column in printed
    assert "8 tokens, tropd, floor 3S + T" in printed and "50% of the tokens ignored" in printed
    assert max(map(len, printed.splitlines())) <= 130
    lines = printed.splitlines()
    wanted = (16, "opd", "eager")
    (row,) = [r for r in found["rows"] if (r["tokens"], r["loss"], r["who"]) == wanted]
    block = lines[next(i for i, line in enumerate(lines) if "16 tokens, opd" in line) :]
    (shown,) = [line for line in block[:5] if line.startswith("eager PyTorch")]
    assert table.percent(row["to_gemms"]) in shown and f"{row['error']:.1e}" in shown
    for picture in ("time", "memory", "roofline"):
        image = out.with_name(f"cpu_{picture}.png")
        if picture != "memory" or any(r["workspace"] is not None for r in found["rows"]):
            assert image.read_bytes().startswith(b"\x89PNG") and str(image) in printed


def test_without_a_gpu_the_first_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(SHAPES, "small", TINY)
    out = str(tmp_path / "o.json")
    command.main(["--losses", "opd", "--providers", "torch", "--tokens", "8", "--out", out])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("no GPU: small shapes")
    assert read(Path(out)).shape == TINY


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--providers", "ligr", "torch"], "--providers: unknown 'ligr' (did you mean 'liger'?)"),
        (["--losses", "tropt", "opd"], "--losses: unknown 'tropt' (did you mean 'tropd'?)"),
        (["--memory-snapshot", "x"], "--memory-snapshot needs a GPU"),
    ],
)
def test_one_bad_name_costs_one_line(options, says, tmp_path, capsys):
    rest = [] if "--losses" in options else ["--losses", "opd"]
    rest += [] if "--providers" in options else ["--providers", "torch"]
    assert bench(tmp_path, *options, *rest, "--tokens", "8")[0] == 2
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith(says)]
    assert re.search(r"^ours, torch +\d", printed.out, re.M)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shape", "qwen3-1.7"], "--shape: unknown 'qwen3-1.7' (did you mean 'qwen3-1.7b'?)"),
        (["--device", "cud"], "--device: unknown 'cud' (did you mean 'cuda'?). Known: cpu, cuda"),
        (["--device", "cpu:x"], "--device: expected cpu, cuda or cuda:INDEX, got 'cpu:x'"),
        (["--device", "cuda:99"], "so there is no 'cuda:99'"),
        (["--dtype", "bfloat"], "--dtype: unknown 'bfloat' (did you mean 'bfloat16'?)"),
        (["--losses", "x"], "--losses: none of those named is known"),
        (["--plot", "absent.json"], "absent.json"),
        (["--plot", "pyproject.toml"], "pyproject.toml is not a file of results"),
        (["--vocab-size", "99000000000"], "the inputs do not fit: out of memory"),
    ],
)
def test_nothing_left_to_measure_is_one_line(options, says, tmp_path, capsys):
    assert bench(tmp_path, *options)[0] == 2
    errors = capsys.readouterr().err.splitlines()
    assert says in errors[-1] and errors[-1].startswith("tropd bench: ") and len(errors) <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--tokens", "0"], "at least 1, got 0"), (["--mask", "1"], "below 1, got 1")],
)
def test_numbers_out_of_range(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        bench(tmp_path, *options)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path, monkeypatch, capsys):
    whole = run.measure_loss

    def interrupted(loss, *rest):
        if loss == "sft":
            raise KeyboardInterrupt
        return whole(loss, *rest)

    monkeypatch.setattr(run, "measure_loss", interrupted)
    status, out = bench(tmp_path, "--losses", "opd", "sft", "--providers", "torch", "--tokens", "8")
    assert status == 130 and {row.loss for row in read(out).rows} == {"opd"}
    assert "ours, torch" in capsys.readouterr().out


def test_from_another_folder(tmp_path):
    """Files are named from there, and a package of the same name there is none of ours."""
    if sys.version_info >= (3, 11):
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('not this')")
    options = ["--losses", "opd", "--providers", "torch", "--tokens", "8", "--out", "here.json"]
    done = subprocess.run(
        [sys.executable, "-m", "tropd_kernels.cli", "bench", *SIZES, "--repeats", "1", *options],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "here.json").shape == TINY
    assert re.search(r"^ours, torch +\d", done.stdout, re.M)


def test_outside_a_checkout_it_says_where_the_benchmarks_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "tropd_kernels" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "the benchmarks come with the source" in capsys.readouterr().err


# --- what becomes of it ------------------------------------------------------------------------


def test_the_page_shows_the_stored_results():
    """`tropd bench --page` renews it."""
    assert page.block(page.PAGE.read_text("utf-8")) == page.render()
    assert page.summary_block(page.README.read_text("utf-8")) == page.summary()


def test_the_page_follows_the_results(tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(page.RESULTS, folder, ignore=shutil.ignore_patterns("*.png"))
    shown = tmp_path / "page.md"
    shown.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n", "utf-8")
    file = folder / "cpu_1024.json"
    stored = file.read_text("utf-8")
    file.write_text(stored.replace('"error": 0.0025671158', '"error": 0.0725671158'), "utf-8")
    page.write(shown, folder, readme=None)
    text = shown.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 7.3e-2" in text and page.block(text) != page.render()
    with pytest.raises(ValueError, match="expected the marks"):
        page.block("no marks")


def test_new_results_have_their_halves_in_the_page(tmp_path):
    times = Times(0.02, 0.019, 0.0215)
    rows = [
        Row(8192, "opd", "triton", times, times, times, 1.04, 9, 2_000_000, 1.5e-3),
        Row(8192, "opd", "cce", reason="not installed: pip install x"),
    ]
    on = {"cpu": "a CPU", "gpu": "NVIDIA H200", "python": "3.12", "torch": "2.11.0"}
    facts = {"command": "tropd bench", "machine": on, "shape": vars(TINY), "dtype": "bfloat16"}
    Results(facts, rows).write(tmp_path / "gpu_h200.json")
    assert read(tmp_path / "gpu_h200.json").rows == rows
    text = page.render(tmp_path)
    lines = [line for line in text.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == ["OPD, sampled teacher", "ours, triton", "20.0 ms", "20.0 ms",
                        "20.0 ms (19.0-21.5)", "1.04", "410k", "2 MB", "1.5e-3"]  # fmt: skip
    assert cells[3] == ["", "CCE", "", "", "not installed: pip install x", "", "", "", ""]
    assert "NVIDIA H200" in text and "`tropd bench` at an unknown commit" in " ".join(text.split())
    Results(facts | {"machine": on | {"commit": "12ab-dirty"}}, rows).write(
        tmp_path / "gpu_h200.json"
    )
    assert "at 12ab with uncommitted changes;" in " ".join(page.render(tmp_path).split())


def test_stored_results_name_no_path_of_a_machine():
    for file in page.RESULTS.glob("*.json"):
        text = file.read_text("utf-8")
        assert "--out" not in text and not re.search(r"/(tmp|home|root|work)\b", text), file.name


@pytest.mark.parametrize("name", ["cpu_1024", "cpu_growth", "cpu_tokens"])
def test_stored_results_are_drawn(name, tmp_path, capsys):
    shutil.copy(page.RESULTS / f"{name}.json", tmp_path)
    assert command.main(["--plot", str(tmp_path / f"{name}.json")]) == 0
    for picture in ("time", "memory", "roofline"):
        assert (tmp_path / f"{name}_{picture}.png").read_bytes().startswith(b"\x89PNG")
    # Of one loss at several sizes, and so that the picture in docs/ is that of the file beside it.
    assert (tmp_path / f"{name}.png").exists() == (name != "cpu_1024")


def test_the_command_is_stored_without_files():
    given = ["--losses", "opd", "--out", "/a/b", "--plot", "--memory-snapshot=/c", "--tokens", "8"]
    assert command.command_of(given) == "tropd bench --losses opd --plot --tokens 8"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.50"), (9.999, "10.0"), (99.96, "100"), (123.4, "123"), (12.34, "12.3")],
)
def test_three_figures(value, text):
    assert table.figures(value) == text
