"""Eager against fused, on the student's own completions: error against float64, time, peak memory.

Both get the same hidden states, the same heads and the same gate draws, and both return the loss
and every gradient. Two vocabularies: the model's own, and a head of 151,936 rows, as Qwen has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import Times, interleaved_measurements
from examples.demo.eager import eager_tropd
from examples.demo.rollout import IGNORE_INDEX, Rollout, completion_hidden
from tropd_kernels import HiddenTeacher, TrOPD, linear_distillation_loss
from tropd_kernels.heads import read_head

LARGE_VOCABULARY = 151_936

#: Tokens on which errors are measured: float64 is slow, and an error does not hide in some of them.
CHECKED_TOKENS = 256

#: The largest relative error against float64 that the fused loss and its gradients may have: this
#: much, and at most twice what eager PyTorch has on the same batch. In float32 most of it is the
#: rounding of large logits, which the two share; in bfloat16 only rounding the result costs 2e-3.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
TIMES_EAGER = 2


@dataclass(frozen=True)
class Batch:
    """What both implementations are given: tokens that count, one a row."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N)
    teacher_hidden: Tensor  # (N, G)
    teacher_weight: Tensor  # (V, G)
    uniforms: Tensor  # (N)      the draws of the trust gate

    def first(self, tokens: int) -> "Batch":
        """The same heads, and the first so many tokens."""
        return replace(
            self,
            hidden=self.hidden[:tokens],
            labels=self.labels[:tokens],
            teacher_hidden=self.teacher_hidden[:tokens],
            uniforms=self.uniforms[:tokens],
        )


@dataclass(frozen=True)
class Result:
    """What both implementations must return: the loss, the gate's decisions, and every gradient."""

    loss: Tensor
    trusted: Tensor
    d_hidden: Tensor
    d_weight: Tensor


@dataclass(frozen=True)
class Errors:
    """Against float64: loss and gradients as norm of the difference over norm; gate in tokens."""

    loss: float
    d_hidden: float
    d_weight: float
    gate: int

    @property
    def largest(self) -> float:
        # Not `max`, which passes over a NaN that is not its first argument.
        return torch.tensor([self.loss, self.d_hidden, self.d_weight]).max().item()


@dataclass(frozen=True)
class Measured:
    """One implementation at one vocabulary."""

    name: str
    vocabulary: int
    tokens: int
    errors: Errors
    times: Times
    memory: int | None  # bytes above the inputs; None where the system cannot tell


def compare(batch: Batch, repeats: int) -> list[Measured]:
    """Checks, times and weighs eager and fused on one batch: two rows of the table."""
    contestants: dict[str, Callable[[Batch], Result]] = {"eager": run_eager, "fused": run_fused}

    part = batch.first(CHECKED_TOKENS)
    exact = run_float64(part)
    errors = {name: errors_against(exact, run(part)) for name, run in contestants.items()}
    del exact

    device = batch.hidden.device
    runs = interleaved_measurements(
        {name: partial(run, batch) for name, run in contestants.items()},
        repeats,
        # A GPU compiles kernels for the size at hand; on a CPU the check has warmed everything up.
        warmup=0 if device.type == "cpu" else 2,
        device=device,
    )
    tokens, vocabulary = len(batch.labels), len(batch.weight)
    return [
        Measured(name, vocabulary, tokens, errors[name], runs[name].times, runs[name].peak)
        for name in contestants
    ]


def run_eager(batch: Batch) -> Result:
    hidden, weight = _leaf(batch.hidden), _leaf(batch.weight)
    loss, trusted = eager_tropd(
        hidden, weight, batch.labels, batch.teacher_hidden, batch.teacher_weight, batch.uniforms
    )
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return Result(loss.detach(), trusted, d_hidden, d_weight)


def run_fused(batch: Batch) -> Result:
    hidden, weight = _leaf(batch.hidden), _leaf(batch.weight)
    out = linear_distillation_loss(
        hidden,
        weight,
        batch.labels,
        HiddenTeacher(batch.teacher_hidden, batch.teacher_weight),
        objective=TrOPD(),
        uniforms=batch.uniforms,
    )
    d_hidden, d_weight = torch.autograd.grad(out.loss, (hidden, weight))
    return Result(out.loss.detach(), out.stats.trust > 0.5, d_hidden, d_weight)


def run_float64(batch: Batch, chunk: int = 64) -> Result:
    """The eager loss in float64, a few tokens at a time, so that it fits a small machine."""
    tokens = len(batch.labels)
    weight = _leaf(batch.weight.double())
    teacher_weight = batch.teacher_weight.double()
    parts = []
    for rows in torch.arange(tokens, device=weight.device).split(chunk):
        hidden = _leaf(batch.hidden[rows].double())
        loss, trusted = eager_tropd(
            hidden,
            weight,
            batch.labels[rows],
            batch.teacher_hidden[rows].double(),
            teacher_weight,
            batch.uniforms[rows].double(),
        )
        loss = loss * (len(rows) / tokens)  # the mean over the batch, not over the chunk
        loss.backward()  # adds to weight.grad
        parts.append((loss.detach(), trusted, hidden.grad))
    losses, trusted, d_hidden = zip(*parts)
    return Result(torch.stack(losses).sum(), torch.cat(trusted), torch.cat(d_hidden), weight.grad)


def errors_against(exact: Result, result: Result) -> Errors:
    def relative(ours: Tensor, truth: Tensor) -> float:
        return ((ours.double() - truth).norm() / truth.norm()).item()

    return Errors(
        loss=relative(result.loss, exact.loss),
        d_hidden=relative(result.d_hidden, exact.d_hidden),
        d_weight=relative(result.d_weight, exact.d_weight),
        gate=int((result.trusted != exact.trusted).sum()),
    )


def make_batch(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollout: Rollout,
    seed: int,
    dtype: torch.dtype,
) -> Batch:
    """The hidden states of student and teacher over one rollout, for the tokens that count."""
    student_head, teacher_head = read_head(student), read_head(teacher)
    counts = rollout.labels != IGNORE_INDEX
    autocast = torch.autocast(counts.device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast:
        hidden = completion_hidden(student_head.backbone, rollout)[counts]
        teacher_hidden = completion_hidden(teacher_head.backbone, rollout)[counts]
    uniforms = torch.rand(len(hidden), generator=torch.Generator().manual_seed(seed))
    return Batch(
        hidden=hidden.to(dtype),
        # A copy: training starts from the student as it is now.
        weight=student_head.weight.detach().to(dtype, copy=True),
        labels=rollout.labels[counts],
        teacher_hidden=teacher_hidden.to(dtype),
        teacher_weight=teacher_head.weight.detach().to(dtype),
        uniforms=uniforms.to(hidden.device),
    )


def with_large_head(batch: Batch, seed: int) -> Batch:
    """The same batch with heads of 151,936 rows; the added rows are synthetic.

    Each added row is one of the head's own, drawn at random and moved by noise of a fifth of the
    rows' spread, the same draw and the same noise for both models: logits keep a realistic spread,
    and the models agree on added ids about as well as on their own.
    """
    vocabulary, width = batch.weight.shape
    added = LARGE_VOCABULARY - vocabulary
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (added,), generator=generator)
    noise = torch.randn(added, width, generator=generator)

    def grown(weight: Tensor) -> Tensor:
        rows = weight[ids.to(weight.device)]
        moved = rows + (0.2 * weight.std() * noise.to(weight)).to(weight.dtype)
        return torch.cat([weight, moved])

    return replace(batch, weight=grown(batch.weight), teacher_weight=grown(batch.teacher_weight))


def _leaf(tensor: Tensor) -> Tensor:
    """The same memory, as the input that gradients are asked for."""
    return tensor.detach().requires_grad_()
