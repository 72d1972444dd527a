"""The losses as one writes them in PyTorch, twice.

eager         logits of all tokens in the inputs' dtype, float32 softmax, autograd for the rest;
              ignored tokens take part in the products and are left out of the mean
checkpointed  without a kernel, as a careful author writes it: ignored tokens are dropped first, and
              the rest is done in chunks, each recomputed in the backward (4S + 2T)

`compile` is the first of them under torch.compile. In float64 `eager` is the truth that gradient
errors are taken against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.bench.losses import LOSSES, TOP_K
from benchmarks.bench.problem import IGNORED, Problem, capped

LossFunction = Callable[[Problem], Tensor]

#: Tokens of a chunk of `checkpointed`.
CHUNK = 1024


def eager(name: str) -> LossFunction:
    per_token = EAGER[name]

    def loss(problem: Problem) -> Tensor:
        return counted_mean(per_token(problem), problem)

    return loss


def checkpointed(name: str) -> LossFunction:
    per_token = EAGER[name]

    def chunk(part: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
        made = part.__dict__.get("top_k_teacher")
        return per_token(replace(part, hidden=hidden, weight=weight).with_top_k_teacher(made)).sum()

    def loss(problem: Problem) -> Tensor:
        counted = problem.take(counted_rows(problem))
        total = counted.hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(counted.labels), CHUNK):
            part = counted.take(slice(start, start + CHUNK))
            total = total + checkpoint(
                chunk, part, part.hidden, part.weight, use_reentrant=False, preserve_rng_state=False
            )
        return total / len(counted.labels)

    return loss


def compiled(name: str) -> LossFunction:
    return torch.compile(eager(name))


# --- what both are made of ---------------------------------------------------------------------


def counted_mean(per_token: Tensor, problem: Problem) -> Tensor:
    if not problem.has_ignored:
        return per_token.mean()
    counts = problem.labels != IGNORED
    return torch.where(counts, per_token, 0.0).sum() / counts.sum()


def counted_rows(problem: Problem) -> Tensor | None:
    """Indices of the tokens that count; None where all do."""
    return (problem.labels != IGNORED).nonzero()[:, 0] if problem.has_ignored else None


def select_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def wide_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits, float32 at least."""
    logits = hidden @ weight.T
    return capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)


def gather(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(-1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)


def policy_gradient(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """K1 with the gradient -reward * grad(log_probs)."""
    reward = (teacher_log_probs - log_probs).detach()
    return -reward * (log_probs - log_probs.detach()).exp()


def gated(lp: Tensor, lq: Tensor, forward_kl: Tensor, uniforms: Tensor) -> Tensor:
    """TrOPD: lp, lq (N,) of the labels; the gate keeps K1 where the teacher accepts the token."""
    trusted = uniforms < (lq - lp).detach().clamp_max(0).exp()
    return torch.where(trusted, policy_gradient(lp, lq), forward_kl)


# --- eager -------------------------------------------------------------------------------------


def student_log_probs(problem: Problem) -> Tensor:
    return wide_logits(problem.hidden, problem.weight, problem.softcap).log_softmax(-1)


def both_log_probs(problem: Problem) -> tuple[Tensor, Tensor]:
    log_q = wide_logits(problem.teacher_hidden, problem.teacher_weight, problem.softcap)
    return student_log_probs(problem), log_q.log_softmax(-1)


def eager_opd(problem: Problem) -> Tensor:
    log_p = gather(student_log_probs(problem), problem.labels)
    return policy_gradient(log_p, problem.top_k_teacher.label_log_probs)


def eager_tropd(problem: Problem, top_k: int | None = TOP_K) -> Tensor:
    log_p, log_q = both_log_probs(problem)
    lp, lq = gather(log_p, problem.labels), gather(log_q, problem.labels)
    if top_k is not None:
        log_q, ids = log_q.topk(min(top_k, log_q.shape[-1]), dim=-1)
        log_p = log_p.gather(-1, ids)
    return gated(lp, lq, (log_q.exp() * (log_q - log_p)).sum(-1), problem.uniforms)


def eager_tropd_exact(problem: Problem) -> Tensor:
    return eager_tropd(problem, top_k=None)


def eager_tropd_given(problem: Problem) -> Tensor:
    log_p, teacher = student_log_probs(problem), problem.top_k_teacher
    lp, log_q = gather(log_p, problem.labels), teacher.log_probs
    forward_kl = (log_q.exp() * (log_q - log_p.gather(-1, teacher.ids))).sum(-1)
    return gated(lp, teacher.label_log_probs, forward_kl, problem.uniforms)


def eager_reverse_kl(problem: Problem) -> Tensor:
    log_p, log_q = both_log_probs(problem)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def eager_forward_kl(problem: Problem) -> Tensor:
    log_p, log_q = both_log_probs(problem)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def eager_gkd(problem: Problem) -> Tensor:
    return jensen_shannon(*both_log_probs(problem), LOSSES["gkd"].beta)


def eager_gkd_tenth(problem: Problem) -> Tensor:
    """All tokens are multiplied, and nine in ten left out of the sum."""
    log_p, log_q = both_log_probs(problem)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    ranked = entropy.double().masked_fill(problem.labels == IGNORED, torch.nan)
    rule = LOSSES["gkd_tenth"].rule
    chosen = ranked >= ranked.nanquantile(1 - rule.select_fraction)
    return torch.where(chosen, jensen_shannon(log_p, log_q, rule.divergence_parameter), 0.0)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = torch.logaddexp(log_q + torch.log(log_q.new_tensor(beta)),
                            log_p + torch.log1p(-log_p.new_tensor(beta)))  # fmt: skip
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    of_student = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


def eager_sft(problem: Problem) -> Tensor:
    logits = wide_logits(problem.hidden, problem.weight, problem.softcap)
    return F.cross_entropy(logits, problem.labels, reduction="none", ignore_index=IGNORED)


EAGER: dict[str, Callable[[Problem], Tensor]] = {
    "opd": eager_opd,
    "tropd_given": eager_tropd_given,
    "tropd": eager_tropd,
    "tropd_exact": eager_tropd_exact,
    "reverse_kl": eager_reverse_kl,
    "gkd": eager_gkd,
    "gkd_tenth": eager_gkd_tenth,
    "forward_kl": eager_forward_kl,
    "sft": eager_sft,
}
