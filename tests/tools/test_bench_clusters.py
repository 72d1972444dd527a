"""Kernels that read a row once: their mathematics, and what is compiled of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks import records
from benchmarks.gpu import command
from benchmarks.gpu.clusters import build, kernels, launch


@triton.jit
def plain_exp(x):
    return tl.exp(x)


@pytest.mark.parametrize("kernel", ["k1_once", "jsd_once"])
def test_cluster_kernels_compute_what_they_are_checked_against(kernel, monkeypatch):
    """In the interpreter, which has no inline assembly; a row has a tail that is padded."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(kernels, "_exp", plain_exp)
    inputs = launch.Inputs("cpu", rows=4, vocab_size=88)
    inputs.d_logits.fill_(float("nan"))
    arguments = inputs.arguments(kernel)
    assert len(arguments) == len(kernels.SIGNATURES[kernel])
    kernels.KERNELS[kernel][(4,)](*arguments, A=64, B=32)
    exact = inputs.exact(kernel)
    error = (inputs.d_logits.double() - exact).norm() / exact.norm()
    assert error < 2 * launch.BOUND  # the interpreter truncates where a GPU rounds
    log_p, log_q = inputs.z.double().log_softmax(-1), inputs.t.double().log_softmax(-1)
    if kernel == "k1_once":
        found = inputs.row_results.view(4, 2)
        of_label = log_p.gather(1, inputs.labels[:, None])[:, 0]
        truth = torch.stack([of_label, -(log_p.exp() * log_p).sum(-1)], -1)
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        halves = (x.exp() * (x - log_m) for x in (log_p, log_q))
        found, truth = inputs.row_results[:4], 0.5 * sum(halves).sum(-1)
    torch.testing.assert_close(found, truth.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_cluster_kernels_compile_and_say_how_they_are_launched(tmp_path):
    if reason := build.why_not():
        pytest.skip(reason)
    code = (
        "from pathlib import Path; from benchmarks.gpu.clusters.build import build, VARIANTS;"
        f"build(Path({str(tmp_path)!r}), VARIANTS[:1])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=command.ROOT,
                   env=environment | {"PYTHONPATH": str(command.ROOT)})  # fmt: skip
    (one,) = json.loads((tmp_path / "cubins.json").read_text())
    assert (tmp_path / one["file"]).stat().st_size > 10_000
    # Two pointers of Triton's own follow the eight arguments; CuPy sets no cluster size.
    assert one["parameters"] == 10 and one["fixes_cluster"]
    assert one["spills"] == 0 and one["registers"] <= 64


def test_an_old_triton_makes_no_cubins(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert build.why_not() == "Triton 3.6.0; cluster kernels want 3.8 or later"
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1")
    assert build.why_not() is None


def test_without_cubins_one_line_says_what_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", str(tmp_path)])
    assert launch.main() == records.RECORDED_FAILURE
    assert "python -m benchmarks.gpu.prepare" in json.loads(capsys.readouterr().out)["reason"]
