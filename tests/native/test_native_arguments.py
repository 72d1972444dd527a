"""The operators of `csrc/` called wrongly: each error names the argument."""

import math

import pytest
import torch
from fuzz_native import INT64_MAX, INT64_MIN, TOPK_REVERSE_KL
from native_arguments import OPERATORS, ops, right_arguments

from tropd_kernels import native

if native.WHY_NOT is not None:
    pytest.skip(f"no native kernels: {native.WHY_NOT}", allow_module_level=True)


def bad_arguments():
    """(operator, argument, how to spoil it or what to give, what the error has to say)"""
    rows = ("statistics", "sums", "gradient")
    to = lambda dtype: lambda t: t.to(dtype)
    meta, half, double = to("meta"), to(torch.float16), to(torch.float64)
    short, narrow = lambda t: t[:-1], lambda t: t[..., :-1]
    spread = lambda t: t.repeat_interleave(2, -1)[..., ::2]
    overlapping = lambda t: t[:1].expand(t.shape)

    def everywhere(operators, argument, *bad):
        for operator in operators:
            yield operator, argument, meta, f"move {argument} there"
            for spoil, message in bad:
                yield operator, argument, spoil, f"{argument} {message}"

    layout = [
        (spread, "must have unit stride along its rows"),
        (overlapping, "must have .* rows that do not overlap"),
    ]
    element = [(half, "must be float32, bfloat16 or float64")]
    vector = [(short, "has shape"), (spread, "must be contiguous"), (to(torch.int32), "must be")]
    yield from everywhere(
        rows, "student", (lambda t: t[0], r"has shape \(20\), expected \(n, m\)"), *layout,
        *element, (lambda t: t[:, :0], "has no columns"),
    )  # fmt: skip
    yield from everywhere(
        rows, "teacher", (short, r"has shape \(2, 20\), expected \(3, 20\)"), *layout, *element,
        (narrow, r"has shape \(3, 19\), expected \(3, 20\)"),
    )  # fmt: skip
    for operator in rows:
        teacher = {"teacher": torch.zeros(3, 20, dtype=torch.float64), "teacher_bias": None}
        yield operator, "", teacher, "teacher and student must both be float64, or neither"
    for name in ("bias", "teacher_bias"):
        yield from everywhere(rows, name, *vector, (double, "must be float32"))
    yield from everywhere(rows, "labels", *vector, (double, "must be int64"))
    for operator in rows:
        yield operator, "scales", [1.0, 0.0, 1.0, 0.0], "scales must hold 5 numbers, got 4"
        for scales in ([1, 0, 1, 0, 0.0], [1, 0, 1, 0, -1.0], [1, 0, 1, 0, math.nan]):
            yield operator, "scales", scales, "temperature must be above 0"
        for scales in ([1, -1.0, 1, 0, 1], [1, 0, 1, math.nan, 1]):
            yield operator, "scales", scales, "a soft cap not below 0"
    matrix = [(short, "has shape"), (narrow, "has shape"), *layout]
    accumulator = [*matrix, (double, "must be float32 for these logits")]
    yield from everywhere(["statistics"], "stats", *accumulator)
    yield from everywhere(rows, "coefs", *accumulator)
    yield from everywhere(["sums"], "sums", *accumulator)
    yield from everywhere(["sums"], "needed", *vector)
    for top_k in (-1, INT64_MIN):
        yield "sums", "top_k", top_k, "top_k must be at least 0"
    for operator in ("sums", "gradient"):
        for generator in (-1, TOPK_REVERSE_KL + 1, INT64_MIN, INT64_MAX):
            yield operator, "generator", generator, "generator must lie between 0 and 11"
    for generator in (1, 2, 3, 4, 5):
        for c in (0.0, 1.0):
            spoil = {"generator": generator, "c": c}
            yield "sums", "", spoil, f"generator {generator} is not defined at parameter"
    yield "gradient", "ids", None, "ids and added come together"
    yield "gradient", "added", None, "ids and added come together"
    yield from everywhere(
        ["gradient"], "ids", (short, "has shape"), (to(torch.int32), "must be int64"), *layout,
        (lambda t: torch.cat([t, t], 1)[:, :4], "and added must be contiguous"),
    )  # fmt: skip
    yield from everywhere(["gradient"], "added", *accumulator)
    yield "gradient", "added", lambda t: torch.cat([t, t], 1)[:, :4], "added must be contiguous"
    yield from everywhere(
        ["gradient"], "out", *matrix, *element, (double, "and student must both be float64")
    )

    for operator, name in (("column_sums", "d_logits"), ("row_squares", "matrix")):
        yield from everywhere(
            [operator], name, (lambda t: t[0], r"has shape \(20\), expected \(n, m\)"), *layout,
            *element,
        )  # fmt: skip
        double_matrix = {name: torch.zeros(3, 20, dtype=torch.float64)}
        yield operator, "", double_matrix, "must be float64"
    contiguous = lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]
    for argument in ("hidden", "out"):
        yield from everywhere(
            ["column_sums"], argument, *matrix, (double, "must be float32 for this matrix"),
            (contiguous, "must be contiguous"),
        )  # fmt: skip
    yield from everywhere(["row_squares"], "out", *vector, (double, "must be float32"))
    for which in (-1, 3, INT64_MAX):
        yield "elementary", "which", which, "which must be 0"
    for argument in ("input", "out"):
        for spoil in (short, spread, double, half, to(torch.bfloat16)):
            yield "elementary", argument, spoil, "must be"
        yield "elementary", argument, meta, "move .* there"

    if native.BF16_PRODUCTS:
        gemms = ("gemm_nt", "gemm_nn", "gemm_tn")
        for name in ("a", "b"):
            yield from everywhere(
                gemms, name, *layout, (half, "must be bfloat16"), (lambda t: t[0], "has shape"),
                (double, "must be bfloat16"),
            )  # fmt: skip
        yield "gemm_nt", "a", narrow, "a and b do not fit: inner sizes 3 and 4"
        yield "gemm_nn", "b", short, "a and b do not fit: inner sizes 4 and 3"
        yield "gemm_tn", "a", short, "a and b do not fit: inner sizes 3 and 4"
        empty = {
            "gemm_nt": lambda t: t[:, :0], "gemm_tn": lambda t: t[:0],
        }  # fmt: skip
        for operator, none in empty.items():
            for_both = {"a": none(right_arguments(operator)["a"])}
            for_both["b"] = none(right_arguments(operator)["b"])
            yield operator, "", for_both, "an inner size of 0"
        nothing = {"a": torch.empty(3, 0).bfloat16(), "b": torch.empty(0, 5).bfloat16()}
        yield "gemm_nn", "", nothing, "an inner size of 0"
        yield from everywhere(gemms, "out", *matrix, (half, "must be float32"))
        yield "gemm_tn", "out", to(torch.bfloat16), "out must be float32 to be added to"
        rounds, sums = {"out": torch.zeros(3, 5).bfloat16(), "add": False}, torch.zeros(3, 5)
        for add in (False, True):
            wide = {"sums": sums, "add": add}
            yield "gemm_tn", "", wide, "sums are for a bfloat16 out"
        for spoil, message in (
            *matrix, (half, "must be float32"), (to(torch.bfloat16), "must be float32"),
            (double, "must be float32"), (meta, "there"),
        ):  # fmt: skip
            yield "gemm_tn", "", rounds | {"sums": spoil(sums)}, f"sums.* {message}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_right_arguments_are_accepted(operator):
    getattr(ops, operator)(**right_arguments(operator))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_argument_is_an_error_that_names_it(operator):
    cases = [case[1:] for case in bad_arguments() if case[0] == operator]
    assert cases
    for argument, bad, message in cases:
        arguments = right_arguments(operator)
        if isinstance(bad, dict):
            arguments |= bad
        else:
            arguments[argument] = bad(arguments[argument]) if callable(bad) else bad
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, operator)(**arguments)


def test_float64_logits_want_float64_company():
    """Everything that is read as an accumulator would be read in the wrong size."""
    for operator, names in {
        "statistics": ("bias", "teacher_bias", "stats", "coefs"),
        "sums": ("coefs", "sums"),
        "gradient": ("coefs", "added", "out"),
    }.items():
        for name in names:
            right = {
                key: value.double()
                if isinstance(value, torch.Tensor) and value.is_floating_point()
                else value
                for key, value in right_arguments(operator).items()
            }
            getattr(ops, operator)(**right)
            with pytest.raises(RuntimeError, match=f"{name} .*float64"):
                getattr(ops, operator)(**right | {name: right[name].float()})
