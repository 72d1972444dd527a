"""Right arguments of the operators of `csrc/`, for the tests to spoil."""

import torch

from tropd_kernels import native
from tropd_kernels.rows.layout import Coef, Stat

ops = torch.ops.tropd_native
PLAIN = [1.0, 0.0, 1.0, 0.0, 1.0]  # scale and soft cap of both sides, temperature
TRANSFORMED = [1.3, 9.0, 0.8, 7.0, 1.2]


def row_arguments(n=3, vocab=20, dtype=torch.float32, scales=PLAIN) -> dict:
    """What the three row operators share, all of it right."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "student": (3 * torch.randn(n, vocab)).to(dtype),
        "teacher": (3 * torch.randn(n, vocab)).to(dtype),
        "bias": torch.randn(vocab, dtype=wide) if scales is TRANSFORMED else None,
        "teacher_bias": torch.randn(vocab, dtype=wide) if scales is TRANSFORMED else None,
        "scales": scales,
        "labels": torch.randint(vocab, (n,)),
    }


def gradient_arguments(generator: int = 0, c: float = 0.5, **how) -> dict:
    """Statistics as the operator makes them, and a weight on every term."""
    arguments = row_arguments(**how)
    n, wide = arguments["labels"].shape[0], torch.promote_types(
        arguments["student"].dtype, torch.float32
    )  # fmt: skip
    coefs, stats = torch.randn(len(Coef), n, dtype=wide), torch.empty(len(Stat), n, dtype=wide)
    made = torch.empty_like(coefs)
    ops.statistics(**arguments, stats=stats, coefs=made)
    coefs[: Coef.THRESHOLD], coefs[Coef.THRESHOLD] = made[: Coef.THRESHOLD], -4.0
    more = {"ids": None, "added": None, "out": torch.empty_like(arguments["student"])}
    return arguments | {"coefs": coefs, **more, "top_k": True, "generator": generator, "c": c}


def right_arguments(operator: str) -> dict:
    bf16 = lambda *shape: torch.randn(*shape).bfloat16()
    if operator in ("statistics", "sums", "gradient"):
        arguments = row_arguments(scales=TRANSFORMED)
    if operator == "statistics":
        return arguments | {"stats": torch.empty(len(Stat), 3), "coefs": torch.empty(len(Coef), 3)}
    if operator == "sums":
        made = {"coefs": torch.zeros(len(Coef), 3), "sums": torch.empty(8, 3)}
        options = {"top_k": 5, "k_alone": False, "generator": 1, "c": 0.5}
        return arguments | made | {"needed": torch.ones(3, dtype=torch.bool)} | options
    if operator == "gradient":
        given = {"ids": torch.zeros(3, 4, dtype=torch.int64), "added": torch.zeros(3, 4)}
        return gradient_arguments(scales=TRANSFORMED) | given
    return {
        "elementary": {"which": 0, "input": torch.zeros(4), "out": torch.zeros(4)},
        "column_sums": {
            "d_logits": torch.randn(3, 20),
            "hidden": torch.randn(2, 3),
            "out": torch.empty(3, 20),
        },
        "row_squares": {"matrix": torch.randn(3, 20), "out": torch.empty(3)},
        "gemm_nt": {"a": bf16(3, 4), "b": bf16(5, 4), "out": torch.zeros(3, 5)},
        "gemm_nn": {"a": bf16(3, 4), "b": bf16(4, 5), "out": torch.zeros(3, 5)},
        "gemm_tn": {"a": bf16(4, 3), "b": bf16(4, 5), "out": torch.zeros(3, 5), "add": True},
    }[operator]


OPERATORS = ("statistics", "sums", "gradient", "column_sums", "row_squares", "elementary")
if native.BF16_PRODUCTS:
    OPERATORS += ("gemm_nt", "gemm_nn", "gemm_tn")
