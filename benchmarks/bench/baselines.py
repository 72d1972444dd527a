"""The field's fused losses, each as one would call it, each imported only when it is asked for.

| baseline    | what it is                                            | GEMM work                |
|-------------|-------------------------------------------------------|--------------------------|
| liger       | `liger_kernel.chunked_loss`, under `torch.compile`    | 3S + T, bf16 logits      |
| liger-fused | `liger_kernel.ops.fused_linear_jsd`, Triton           | 3S + T                   |
| trl         | `trl.kernels`: `ChunkedDivergenceFunction` for the    | 4S + 2T; Jensen-Shannon  |
|             | divergences, `ChunkedLogProbFunction` for the others; | 5S + 3T; log-probs 4S    |
|             | on a CPU their products are float32                   |                          |
| fla         | `FusedKLDivLoss` of flash-linear-attention, Triton    | 3S + T, bf16 logits      |
| torch-lce   | `F.linear_cross_entropy`, its chunked path            | 3S for a mean, else 4S   |
| cce         | Apple's cut-cross-entropy: its Triton kernels on a    | 4S                       |
|             | GPU, its `torch_compile` path elsewhere               |                          |
| quack       | `chunked_linear_cross_entropy`, CuTe                  | 3S, bf16 logits          |

Run by the tests on a CPU: liger, trl, torch-lce, cce's `torch_compile` path, and in Triton's
interpreter liger-fused and fla. Not run by them: CCE's Triton kernels, and QuACK, which is written
against the source of 0.6.5.

Liger and TRL take one number, beta, with the same meaning as here (0 forward KL, 1 reverse KL,
between them the Jensen-Shannon divergence). A cross-entropy per token is minus a log-prob, so it
serves OPD with a sampled teacher too; QuACK gives only its mean or sum. Where a baseline knows no
tokens that are to be ignored they are taken out before it, within the time that is measured.

`tests/tools/test_bench.py` shows in float32 that losses and gradients agree with ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bench.eager import (
    LossFunction,
    counted_mean,
    counted_rows,
    policy_gradient,
    select_rows,
)
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import IGNORED, Problem

#: Vocabulary ids per tile of the log-probs, as TRL's trainers pass it.
TRL_TILE = 32_768
#: Tokens per chunk of torch's, as many as Liger's: its own choice is far smaller, for memory's sake
#: (2 tokens at the small shape, 64 at qwen3-1.7b), and slow.
TORCH_CHUNK = 1024
#: Tokens per chunk, QuACK's own default.
QUACK_CHUNK = 4096


def liger(name: str) -> LossFunction:
    """As its defaults have it: compiled, chunks of 1024 tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=LOSSES[name].beta, ignore_index=IGNORED
    )

    def loss(problem: Problem) -> Tensor:
        return module(
            problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight,
            problem.labels,
        )  # fmt: skip

    return loss


def liger_fused(name: str) -> LossFunction:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def loss(problem: Problem) -> Tensor:
        return LigerFusedLinearJSDFunction.apply(
            problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight,
            problem.labels, LOSSES[name].beta, IGNORED, 1.0,
        )  # fmt: skip

    return loss


def trl(name: str) -> LossFunction:
    return trl_log_probs(name) if LOSSES[name].beta is None else trl_divergence(name)


def trl_divergence(name: str) -> LossFunction:
    """A divergence per token there, hence the mean."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(problem: Problem) -> Tensor:
        rows, cap = counted_rows(problem), problem.softcap
        divergence, _ = ChunkedDivergenceFunction.apply(
            select_rows(problem.hidden, rows), problem.weight, None,
            select_rows(problem.teacher_hidden, rows), problem.teacher_weight, None,
            LOSSES[name].beta, 1.0, 1.0, cap, 1.0, cap,
        )  # fmt: skip
        return divergence.mean()

    return loss


def trl_log_probs(name: str) -> LossFunction:
    from trl.kernels import ChunkedLogProbFunction

    def loss(problem: Problem) -> Tensor:
        rows = counted_rows(problem)
        log_probs, *_ = ChunkedLogProbFunction.apply(
            select_rows(problem.hidden, rows), problem.weight, None,
            select_rows(problem.labels, rows), 1.0, TRL_TILE, problem.softcap, 1.0, (),
        )  # fmt: skip
        if name == "sft":
            return -log_probs.mean()
        return policy_gradient(
            log_probs, select_rows(problem.top_k_teacher.label_log_probs, rows)
        ).mean()

    return loss


def fla(name: str) -> LossFunction:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    module = FusedKLDivLoss()

    def loss(problem: Problem) -> Tensor:
        rows = counted_rows(problem)
        return module(
            select_rows(problem.hidden, rows), select_rows(problem.teacher_hidden, rows),
            problem.weight, problem.teacher_weight,
        )  # fmt: skip

    return loss


def torch_lce(name: str) -> LossFunction:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK)

    def cross_entropy(problem: Problem, reduction: str) -> Tensor:
        return F.linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels,
            reduction=reduction, ignore_index=IGNORED, options=options,
        )  # fmt: skip

    return by_cross_entropy(name, cross_entropy)


def cce(name: str) -> LossFunction:
    """Its default drops gradients below what bf16 resolves; the error's column shows that."""
    from cut_cross_entropy import linear_cross_entropy

    def cross_entropy(problem: Problem, reduction: str) -> Tensor:
        return linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels,
            ignore_index=IGNORED, softcap=problem.softcap, reduction=reduction,
            impl="cce" if problem.hidden.is_cuda else "torch_compile",
        )  # fmt: skip

    return by_cross_entropy(name, cross_entropy)


def by_cross_entropy(name: str, cross_entropy: Callable[[Problem, str], Tensor]) -> LossFunction:
    """Cross-entropy itself, or OPD from the cross-entropy of each token."""

    def mean(problem: Problem) -> Tensor:
        return cross_entropy(problem, "mean")

    def opd(problem: Problem) -> Tensor:
        log_probs = -cross_entropy(problem, "none").float()
        teacher = problem.top_k_teacher.label_log_probs
        return counted_mean(policy_gradient(log_probs, teacher), problem)

    return mean if name == "sft" else opd


def quack(name: str) -> LossFunction:
    """bf16, and sizes that are multiples of 8."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(problem: Problem) -> Tensor:
        return chunked_linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels,
            chunk_size=QUACK_CHUNK, ignore_index=IGNORED, reduction="mean",
        )  # fmt: skip

    return loss
