"""The operators of `csrc/`, called as the native backend calls them, and wrongly.

That the backend computes the right losses is `test_correctness.py`'s subject, on the best
instruction set of the machine; here every instruction set that runs is tried. `fuzz_native.py`
looks for accesses outside the tensors. The products have a file of their own.
"""

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from fuzz_native import AKL, INT64_MAX, INT64_MIN, between_guards, library_under_test, same_bits
from native_arguments import PLAIN, TRANSFORMED, gradient_arguments, ops, row_arguments
from problems import OBJECTIVES, make_problem, rows_of_several_blocks, with_everything

from tropd_kernels import LogitsTeacher, distillation_loss, native
from tropd_kernels.rows.layout import Coef, Stat

if native.WHY_NOT is not None:
    pytest.skip(f"no native kernels: {native.WHY_NOT}", allow_module_level=True)


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request):
    """Runs on each, and leaves the best one in use."""
    before = ops.use_instruction_set(request.param)
    yield request.param
    assert ops.use_instruction_set(before) == request.param


@pytest.mark.skipif("TROPD_SANITIZE" not in os.environ, reason="not under `make sanitize`")
def test_make_sanitize_tests_a_library_with_sanitizers():
    assert library_under_test()


def test_amx_is_emulated_under_sanitizers_alone():
    able = "AVX512-BF16" in ops.products() and sys.platform == "linux"
    assert ("AMX emulated" in ops.products()) == (able and "TROPD_SANITIZE" in os.environ)


def test_random_calls_touch_nothing_but_their_tensors():
    """On memory between pages that nobody may touch, where one stray read ends the process."""
    program = Path(__file__).parents[1] / "helpers" / "fuzz_native.py"
    path = os.pathsep.join([str(program.parents[2]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, program, "--seconds", "3", "--seed", "1"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_an_unknown_instruction_set_is_an_error():
    with pytest.raises(RuntimeError, match="no kernels named AVX-9"):
        ops.use_instruction_set("AVX-9")


# --- exp, log1p, tanh ----------------------------------------------------------------------------


def elementary(function, x: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, 7.0)
    ops.elementary(("exp", "log1p", "tanh").index(function), x, out)
    return out


def every_magnitude(low: float, high: float, dtype, count: int = 200_000) -> torch.Tensor:
    """Values spread evenly, and evenly over the exponents down to the subnormal ones."""
    least = math.log10(torch.finfo(dtype).smallest_normal) - 5
    powers = torch.logspace(least, math.log10(max(abs(low), high)), count // 4, dtype=torch.float64)
    values = torch.cat([torch.linspace(low, high, count, dtype=torch.float64), powers, -powers])
    return values[(values >= low) & (values <= high)].to(dtype)


def ulps(found: torch.Tensor, exact: torch.Tensor, dtype) -> float:
    """The largest error, in units of the last place that `dtype` has at the exact value."""
    finfo = torch.finfo(dtype)
    digits = round(-math.log2(finfo.eps)) + 1
    smallest = round(math.log2(finfo.smallest_normal)) - digits + 1
    exponent = (torch.frexp(exact)[1] - digits).clamp_min(smallest)
    error = (found.double() - exact).abs()
    return float((error / torch.ldexp(torch.ones_like(exact), exponent)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("function", "bound", "low", "high"),
    [("exp", 2, -104.5, 88.72), ("log1p", 4, 0.0, 1.0), ("tanh", 4, -30.0, 30.0)],
)
def test_elementary_functions_are_good_to_a_few_units_in_the_last_place(
    function, bound, low, high, dtype, instruction_set
):
    if dtype == torch.float64 and function == "exp":
        low, high = -746.5, 709.78
    x = every_magnitude(low, high, dtype)
    exact = getattr(torch, function)(x.double())
    if function == "exp":
        subnormal = (exact > 0) & (exact < torch.finfo(dtype).smallest_normal)
        assert subnormal.sum() > 1000
    slack = 1 if dtype == torch.float64 else 0  # torch's own error
    assert ulps(elementary(function, x), exact, dtype) <= bound + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_elementary_functions_of_special_values(dtype, instruction_set):
    inf, nan = math.inf, math.nan
    beyond = 88.73 if dtype == torch.float32 else 709.79
    below = -104.0 if dtype == torch.float32 else -745.2
    for function, given, expected in (
        ("exp", [0.0, -0.0, inf, -inf, nan], [1.0, 1.0, inf, 0.0, nan]),
        ("exp", [beyond, below, 1e30, -1e30], [inf, 0.0, inf, 0.0]),
        ("log1p", [0.0, nan], [0.0, nan]),
        ("tanh", [0.0, -0.0, inf, -inf, nan, 1e30, -1e30], [0.0, 0.0, 1.0, -1.0, nan, 1.0, -1.0]),
    ):
        found = elementary(function, torch.tensor(given, dtype=dtype))
        expected = torch.tensor(expected, dtype=dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=function)


# --- rows ----------------------------------------------------------------------------------------


@cache
def reference(name: str, vocab_size: int):
    """A problem in numbers that are float32 ones, and its results in float64."""
    problem = make_problem(tokens=5, vocab_size=vocab_size)
    if vocab_size > 16:
        problem = with_everything(problem)
    for field, value in vars(problem).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(problem, field, value.float().double())
    return problem, problem.call(OBJECTIVES[name], "hidden", "reference", torch.float64)


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 1023, 1025])
@pytest.mark.parametrize(
    "name", ["tropd_expected", "tropd_bucket", "gkd", "akl", "alpha", "todi", "reverse_kl"]
)
def test_every_instruction_set_agrees_with_the_reference(name, vocab_size, instruction_set):
    """At vocabularies around the width of a vector and around a block of the sums."""
    problem, (loss, gradients, stats) = reference(name, vocab_size)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        found = problem.call(OBJECTIVES[name], "hidden", "native", dtype)
        pairs = [(found[0], loss), *((found[1][key], value) for key, value in gradients.items())]
        for key, truth in vars(stats).items():
            ours = getattr(found[2], key)
            assert (ours is None) == (truth is None), key
            if truth is None:
                continue
            # The masses of K are known where the objective needed them.
            unknown = ours.isnan() if key.endswith("topk_mass") else torch.zeros_like(truth).bool()
            pairs.append((ours.masked_fill(unknown, 0), truth.masked_fill(unknown, 0)))
        for ours, truth in pairs:
            # Where one id is left, the truth is 0 and the error is that of a log-prob of 0.
            assert (ours.double() - truth).norm() <= bound * (truth.norm() + 0.1)


def outcome(objective, logits, teacher_logits) -> list[torch.Tensor]:
    """Loss, d_logits and statistics of the native backend on logits that exist."""
    problem = with_everything(make_problem(tokens=logits.shape[0], vocab_size=logits.shape[1]))
    z = logits.clone().requires_grad_()
    out = distillation_loss(
        z, problem.labels, LogitsTeacher(teacher_logits), objective,
        backend="native", **problem.options,
    )  # fmt: skip
    out.loss.backward()
    return [out.loss.detach(), z.grad, *(s for s in vars(out.stats).values() if s is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tropd_ppo", "tropd_bucket", "akl", "skew_reverse", "jeffreys"])
def test_rows_are_the_same_bits_on_any_number_of_threads(name, dtype, instruction_set, use_threads):
    logits, teacher = (3 * torch.randn(2, 37, 1500)).to(dtype)
    use_threads(1)
    first = outcome(OBJECTIVES[name], logits, teacher)
    assert first[1].isfinite().all() and first[1].any()
    for threads in (1, 2, 5):
        use_threads(threads)
        again = outcome(OBJECTIVES[name], logits, teacher)
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True)), threads


@pytest.mark.parametrize("name", ["tropd", "gkd"])
def test_losses_of_bfloat16_heads_are_the_same_bits_on_any_number_of_threads(name, use_threads):
    problem = with_everything(make_problem(tokens=150, vocab_size=700, width=33, teacher_width=64))
    use_threads(1)
    first = problem.call(OBJECTIVES[name], "hidden", "native", torch.bfloat16)
    for threads in (1, 2, 5):
        use_threads(threads)
        again = problem.call(OBJECTIVES[name], "hidden", "native", torch.bfloat16)
        assert same_bits(first[0], again[0]), threads
        assert sorted(first[1]) == ["bias", "hidden", "weight"]
        assert all(same_bits(first[1][key], again[1][key]) for key in first[1]), threads


@pytest.mark.parametrize("scales", [PLAIN, TRANSFORMED], ids=["plain", "transformed"])
@pytest.mark.parametrize("vocab", [1, 17, 1030])
@pytest.mark.parametrize("generator", range(AKL), ids=ops.generators()[:AKL])
def test_the_gradient_may_be_written_over_the_logits(generator, vocab, scales, instruction_set):
    arguments = gradient_arguments(generator, n=5, vocab=vocab, scales=scales)
    arguments["ids"] = torch.randint(vocab, (5, 3))
    arguments["added"] = torch.randn(5, 3)
    for dtype in (torch.float32, torch.bfloat16):
        expected = torch.empty(5, vocab, dtype=dtype)
        ops.gradient(**arguments | {"out": expected})
        assert expected.isfinite().all() and (expected.any() or vocab == 1)
        student = arguments["student"].clone()
        over = student.view(dtype)[:, :vocab]  # a bfloat16 row begins where the float32 one does
        ops.gradient(**arguments | {"student": student, "out": over})
        assert same_bits(over, expected)


@pytest.mark.parametrize("name", [*rows_of_several_blocks(), "nan"])
def test_statistics_do_not_depend_on_where_the_maximum_stands(name, instruction_set):
    if name == "nan":
        z, t = rows_of_several_blocks()["only one rises"]
        t = z.clone()
        z[3] = math.nan
    else:
        z, t = rows_of_several_blocks()[name]
    label = 2500
    rows = torch.stack([z, z.flip(0)]), torch.stack([t, t.flip(0)])
    labels = torch.tensor([label, len(z) - 1 - label])

    def found(backend, rows):
        made = distillation_loss(
            rows[0], labels, LogitsTeacher(rows[1]), OBJECTIVES["reverse_kl"], backend=backend,
            reduction="none",
        )  # fmt: skip
        stats = made.stats
        return torch.stack([stats.log_probs, stats.entropy, stats.forward_kl, stats.reverse_kl])

    ours = found("native", rows)
    if name == "nan":
        assert ours.isnan().all()
        return
    torch.testing.assert_close(ours, found("torch", rows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 0], ours[:, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [1, 7, 20, 3172])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scales", [PLAIN, TRANSFORMED], ids=["plain", "transformed"])
def test_the_mean_gap_is_of_every_id(scales, dtype, vocab, instruction_set):
    """... and of none behind the row's end, and is only there where it is asked for."""
    arguments = row_arguments(vocab=vocab, dtype=dtype, scales=scales)
    wide = torch.promote_types(dtype, torch.float32)
    z = arguments["student"].double()
    if scales is TRANSFORMED:
        z = 9.0 * torch.tanh(1.3 * (z + arguments["bias"].double()) / 9.0) / 1.2
    for teacher in (arguments["teacher"], None):
        for asked in (True, False):
            stats = torch.zeros(len(Stat), 3, dtype=wide)
            coefs = torch.zeros(len(Coef), 3, dtype=wide)
            ops.statistics(
                **arguments | {"teacher": teacher}, stats=stats, coefs=coefs, mean_gap=asked
            )
            mean = (z - z.amax(-1, keepdim=True)).mean(-1) if asked else torch.zeros(3)
            torch.testing.assert_close(coefs[Coef.MEAN_GAP], mean.to(wide), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 20, 21, 2**40, INT64_MIN, INT64_MAX])
def test_labels_outside_the_vocabulary_are_read_and_written_nowhere(wrong, instruction_set):
    arguments = gradient_arguments(n=3, vocab=20)
    for name in ("student", "teacher"):
        arguments[name] = between_guards(60, torch.float32).view(3, 20).copy_(arguments[name])
    stats, coefs = torch.zeros(len(Stat), 3), torch.zeros(len(Coef), 3)
    shared = {name: arguments[name] for name in row_arguments()}
    shared["labels"] = torch.tensor([wrong, 5, wrong])
    ops.statistics(**shared, stats=stats, coefs=coefs)
    for stat in (Stat.LOG_PROB, Stat.TEACHER_LOG_PROB):
        assert stats[stat].isnan().tolist() == [True, False, True]
    assert stats[Stat.ENTROPY : Stat.REWARD].isfinite().all()

    without = arguments["coefs"].clone()
    without[Coef.LABEL, ::2] = 0
    expected = torch.empty(3, 20)
    labels = torch.tensor([0, 5, 0])
    ops.gradient(**arguments | {"labels": labels, "coefs": without, "out": expected})
    around = between_guards(60, torch.float32).view(3, 20)
    ops.gradient(**arguments | {"labels": shared["labels"], "out": around})
    assert same_bits(around, expected)


@pytest.mark.parametrize("wrong", [-1, 20, 21, 2**40, INT64_MIN, INT64_MAX])
def test_given_ids_outside_the_vocabulary_are_ignored(wrong, instruction_set):
    arguments = gradient_arguments(n=3, vocab=20)
    right = {"ids": torch.tensor([[4, 4], [7, 7], [19, 19]]), "added": torch.tensor([[1.0, 0]] * 3)}
    expected, found = torch.empty(3, 20), between_guards(60, torch.float32).view(3, 20)
    ops.gradient(**arguments | right | {"out": expected})
    ids = right["ids"].clone()
    ids[:, 1] = wrong
    ops.gradient(**arguments | {"ids": ids, "added": torch.ones(3, 2), "out": found})
    assert same_bits(found, expected)
