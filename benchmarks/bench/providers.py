"""Who computes a loss: ours on each backend, eager PyTorch, other libraries, and the bare products.

A provider says which losses it computes, whether it knows a soft cap, what it needs, and how it is
built. `why_not` gives in one line why it cannot run here; a row of the table then says so.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bench import baselines, eager
from benchmarks.bench.eager import LossFunction
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import Gradients, Problem
from tropd_kernels import available_backends, linear_distillation_loss

ALL = tuple(LOSSES)
#: Those of each token by itself, which chunks of tokens can be computed one by one.
PER_TOKEN = tuple(name for name, loss in LOSSES.items() if not loss.selects)
DIVERGENCES = tuple(name for name, loss in LOSSES.items() if loss.beta is not None)
#: What a log-prob of each label is enough for.
LOG_PROB_LOSSES = ("opd", "sft")
GEMMS = "gemms"


@dataclass(frozen=True)
class Runner:
    """The two halves of a call; the halves are timed apart."""

    forward: Callable[[Problem], Any]
    backward: Callable[[Problem, Any], Gradients]

    def __call__(self, problem: Problem) -> Gradients:
        return self.backward(problem, self.forward(problem))


@dataclass(frozen=True)
class Provider:
    """losses: those it computes. holds_logits: of all tokens at once. module, install: what has to
    be importable, and what to type where it is not. kernels: "triton" for those that run on a GPU
    or in Triton's interpreter, "cuda" for those that need the GPU."""

    label: str
    losses: tuple[str, ...]
    build: Callable[[str], LossFunction]
    softcap: bool = True
    holds_logits: bool = False
    module: str | None = None
    install: str = ""
    kernels: str | None = None


def ours(backend: str) -> Provider:
    def build(name: str) -> LossFunction:
        kind = LOSSES[name]

        def loss(problem: Problem) -> Tensor:
            return linear_distillation_loss(
                problem.hidden, problem.weight, problem.labels, problem.teacher(kind.teacher),
                kind.rule, softcap=problem.softcap, uniforms=problem.uniforms, backend=backend,
            ).loss  # fmt: skip

        return loss

    return Provider(f"ours, {backend}", ALL, build)


OURS = ("triton", "native", "torch")
PROVIDERS: dict[str, Provider] = {
    **{backend: ours(backend) for backend in OURS},
    "eager": Provider("eager PyTorch", ALL, eager.eager, holds_logits=True),
    "checkpointed": Provider("eager, chunked", PER_TOKEN, eager.checkpointed),
    "compile": Provider("eager, compiled", ALL, eager.compiled, holds_logits=True),
    "liger": Provider(
        "Liger chunked", DIVERGENCES, baselines.liger, softcap=False,
        module="liger_kernel", install="liger-kernel==0.8.5",
    ),
    "liger-fused": Provider(
        "Liger fused", DIVERGENCES, baselines.liger_fused, softcap=False,
        module="liger_kernel", install="liger-kernel==0.8.5", kernels="triton",
    ),
    "trl": Provider(
        "TRL", (*LOG_PROB_LOSSES, *DIVERGENCES), baselines.trl, module="trl", install="trl==1.16.0"
    ),
    "fla": Provider(
        "FLA", ("forward_kl",), baselines.fla, softcap=False, module="fla",
        install="--no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 einops",
        kernels="triton",
    ),
    "torch-lce": Provider("torch LCE", LOG_PROB_LOSSES, baselines.torch_lce, softcap=False),
    "cce": Provider(
        "CCE", LOG_PROB_LOSSES, baselines.cce, module="cut_cross_entropy",
        install="--no-deps cut-cross-entropy==25.1.1",
    ),
    "quack": Provider(
        "QuACK", ("sft",), baselines.quack, softcap=False, module="quack",
        install="quack-kernels==0.6.5", kernels="cuda",
    ),
}  # fmt: skip
LABELS = {name: provider.label for name, provider in PROVIDERS.items()} | {GEMMS: "bare GEMMs"}


def default_providers(device: str) -> list[str]:
    """Everybody but those whose time on a CPU means nothing (Triton's interpreter) or goes into
    compiling."""
    if torch.device(device).type == "cuda":
        return [name for name in PROVIDERS if name != "native"]
    return [
        name for name, provider in PROVIDERS.items()
        if name not in ("triton", "compile") and provider.kernels is None
    ]  # fmt: skip


def why_not(name: str, problem: Problem) -> str | None:
    """Why this provider cannot run this problem, in one line; None where it may be tried."""
    provider, device = PROVIDERS[name], problem.hidden.device
    if name in OURS:
        state = available_backends(device)[name]
        return None if state.startswith("available") else state
    if provider.module and importlib.util.find_spec(provider.module) is None:
        return f"not installed: pip install {provider.install}"
    interpreted = provider.kernels == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if provider.kernels and device.type != "cuda" and not interpreted:
        return "needs a GPU"
    if problem.softcap is not None and not provider.softcap:
        return "knows no soft cap"
    if name == "torch-lce" and not (
        hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    ):
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy: a newer one has"
    return None


def runner(name: str, loss: str) -> Runner:
    if name == GEMMS:
        return bare_gemms(LOSSES[loss].multiplies_teacher)
    forward = PROVIDERS[name].build(loss)

    def backward(problem: Problem, value: Tensor) -> Gradients:
        d_hidden, d_weight = torch.autograd.grad(value, (problem.hidden, problem.weight))
        return d_hidden, d_weight

    return Runner(forward, backward)


def bare_gemms(teacher: bool) -> Runner:
    """The floor: the four products, 3S + T, or the student's three, of the tokens that count, each
    whole, in the inputs' dtype, with nothing in between."""

    def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = eager.counted_rows(problem)
        hidden, kept_logits = eager.select_rows(problem.hidden.detach(), rows), None
        logits = hidden @ problem.weight.detach().T
        if teacher:
            # Both logits exist together, as any loss between them would have it.
            kept_logits = eager.select_rows(problem.teacher_hidden, rows) @ problem.teacher_weight.T
        return hidden, logits, kept_logits

    def backward(problem: Problem, state: tuple[Tensor, Tensor, Tensor | None]) -> Gradients:
        hidden, logits, _ = state
        return logits @ problem.weight.detach(), logits.T @ hidden

    return Runner(forward, backward)
