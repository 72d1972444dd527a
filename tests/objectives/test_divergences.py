"""The table of divergences against the engines: one that an engine has no formula for is refused
there, and never computed as another."""

import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_native import AKL, ALPHA, CHI2, NONE, TOPK_REVERSE_KL
from problems import OBJECTIVES, make_problem

from tropd_kernels import Divergence, LogitsTeacher, TokenRule, distillation_loss, native
from tropd_kernels.backends import available_backends
from tropd_kernels.objectives import DIVERGENCES, DivergenceSpec

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("reference", "torch", "native", "triton")


def loss(rule, backend):
    if not available_backends("cpu")[backend].startswith("available"):
        pytest.skip(available_backends("cpu")[backend])
    problem = make_problem(tokens=4)
    logits = problem.hidden @ problem.weight.T
    teacher = LogitsTeacher(problem.teacher_logits())
    out = distillation_loss(logits, problem.labels, teacher, rule, backend=backend)
    return out.loss


def practice(monkeypatch, **how) -> TokenRule:
    """A rule of a divergence that is in the table alone."""
    monkeypatch.setitem(DIVERGENCES, "practice", DivergenceSpec(**how))
    top_k = 5 if how.get("ids") == "top_k" else None
    return TokenRule(policy_gradient=0.0, divergence="practice", top_k=top_k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["skew_forward", "skew_reverse"])
def test_the_skewed_kls_by_hand(backend, name):
    """DistiLLM's (2402.03898): alpha is the share of the first argument in the mixture. p(y) =
    1/2, 1/2 and q(y) = 1/4, 3/4, alpha = 1/5: the mixtures are 1/5 q + 4/5 p = 9/20, 11/20, and
    1/5 p + 4/5 q = 3/10, 7/10. With the shares swapped a small alpha leaves little of a KL."""
    p, q = [1 / 2, 1 / 2], [1 / 4, 3 / 4]
    first, mixture = {
        "skew_forward": (q, [9 / 20, 11 / 20]), "skew_reverse": (p, [3 / 10, 7 / 10]),
    }[name]  # fmt: skip
    expected = sum(a * math.log(a / m) for a, m in zip(first, mixture, strict=True))
    if not available_backends("cpu")[backend].startswith("available"):
        pytest.skip(available_backends("cpu")[backend])
    z, t = (torch.tensor([row], dtype=torch.float64).log() for row in (p, q))
    label, rule = torch.zeros(1, dtype=torch.int64), Divergence(name, alpha=0.2)
    out = distillation_loss(z, label, LogitsTeacher(t), rule, backend=backend)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)


def test_every_divergence_is_among_the_tests_objectives():
    assert {rule.divergence for rule in OBJECTIVES.values()} == {None, *DIVERGENCES}


@pytest.mark.parametrize("ids", ["vocabulary", "top_k"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generator_in_the_table_alone_is_refused(monkeypatch, backend, ids):
    rule = practice(monkeypatch, ids=ids)
    why = "no generator in Triton" if backend == "triton" else "'practice'"
    with pytest.raises(Exception) as raised:
        loss(rule, backend)
    error, texts = raised.value, ""
    while error is not None:  # Triton's compiler chains one error for each function around it
        texts, error = texts + str(error), error.__cause__
    assert why in texts


def test_the_reference_refuses_weights_in_the_table_alone(monkeypatch):
    """It states what the other engines take from the table."""
    with pytest.raises(NotImplementedError, match="'practice'"):
        loss(practice(monkeypatch, kl_weights=(0.3, 0.7)), "reference")


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_fixed_sum_of_the_exact_divergences_needs_its_weights_alone(monkeypatch, backend):
    forward = loss(Divergence("forward_kl"), "reference")
    reverse = loss(Divergence("reverse_kl"), "reference")
    found = loss(practice(monkeypatch, kl_weights=(0.3, 0.7)), backend)
    torch.testing.assert_close(found, 0.3 * forward + 0.7 * reverse)


def compile_generator(kind: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "helpers" / "compile_generator.py", kind],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_triton_s_compiler_refuses_a_generator_in_the_table_alone():
    """The interpreter does so above; it is other code that reads `static_assert`."""
    pytest.importorskip("triton")
    known, unknown = compile_generator("todi"), compile_generator("practice")
    assert known.returncode == 0 and "tt.func" in known.stdout, known.stderr
    assert unknown.returncode != 0 and "no generator in Triton" in unknown.stderr


def test_csrc_has_the_table_s_generators():
    if native.WHY_NOT is not None:
        pytest.skip(f"no native kernels: {native.WHY_NOT}")
    generators = {name for name, spec in DIVERGENCES.items() if spec.generator}
    names = native.GENERATORS
    assert set(names) == {"none", "akl", *generators}
    # Those that the native tests know by number.
    numbered = {NONE: "none", ALPHA: "alpha", CHI2: "chi2", AKL: "akl"}
    numbered[TOPK_REVERSE_KL] = "topk_reverse_kl"
    assert {i: names[i] for i in numbered} == numbered and len(names) == TOPK_REVERSE_KL + 1


def test_a_generator_without_a_formula_in_csrc_does_not_compile(tmp_path, monkeypatch):
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler {compiler[0]!r}")
    monkeypatch.setenv("TROPD_BUILD_EXT", "0")
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["COMPILE_FLAGS"]
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    rows, last = tmp_path / "rows.h", "of(AKL, akl)"
    assert rows.read_text().count(last) == 1
    rows.write_text(rows.read_text().replace(last, last + " of(PRACTICE, practice)"))
    command = [*compiler, *flags, "-fsyntax-only", tmp_path / "rows_portable.cpp"]
    english = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, env=english, capture_output=True, text=True)
    assert done.returncode != 0
    assert "'PRACTICE' not handled in switch" in done.stderr
