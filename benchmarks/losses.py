"""The problem that the benchmarks time, and the ways to solve it.

A problem is a batch of hidden states and two heads, drawn so that the logits spread as a language
model's do (standard deviation 3) and the teacher resembles the student. A provider takes it to a
function of no arguments that computes the loss and every gradient and returns the gradients.

| provider   | what it is                                                                        |
|------------|-----------------------------------------------------------------------------------|
| eager      | PyTorch as one writes it: logits in the inputs' dtype, float32 softmax, autograd  |
| compile    | the same under `torch.compile`                                                    |
| liger, trl | what others publish, see `rivals.py`; gkd and reverse_kl only                     |
| torch, …   | `linear_distillation_loss` on that backend                                        |

`bare_gemms` is the floor of them all: the same products with nothing in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.rivals import BETAS, RIVALS
from tropd_kernels import (
    GKD,
    Divergence,
    HiddenTeacher,
    TokenRule,
    TopKTeacher,
    TrOPD,
    linear_distillation_loss,
)

Gradients = tuple[Tensor, Tensor]

#: "tropd_exact" has its forward KL over the whole vocabulary instead of the teacher's top 64;
#: "tropd_given" is given those 64 ids and their log-probs, and no teacher to multiply with.
OBJECTIVES = {
    "tropd": TrOPD(),
    "tropd_exact": TrOPD(top_k=None),
    "tropd_given": TrOPD(),
    "gkd": GKD(0.5),
    "reverse_kl": Divergence("reverse_kl"),
}
EAGER = ("eager", "compile")
GIVEN_IDS = 64


@dataclass(frozen=True)
class Problem:
    """hidden (N, H), weight (V, H), labels (N,), uniforms (N,); teacher's (N, G) and (V, G)."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    uniforms: Tensor

    def first(self, tokens: int, dtype: torch.dtype) -> "Problem":
        """The first tokens, in another precision; what need not be converted is shared."""
        return Problem(
            self.hidden[:tokens].detach().to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            self.teacher_hidden[:tokens].to(dtype),
            self.teacher_weight.to(dtype),
            self.labels[:tokens],
            self.uniforms[:tokens],
        )

    @property
    def dense_teacher(self) -> HiddenTeacher:
        return HiddenTeacher(self.teacher_hidden, self.teacher_weight)

    @cached_property
    def top_k_teacher(self) -> TopKTeacher:
        """The teacher as its likeliest ids; an input, made before any clock runs."""
        dtype = torch.promote_types(self.teacher_hidden.dtype, torch.float32)
        weight = self.teacher_weight.to(dtype)
        top_k, ids, of_label = [], [], []
        for rows, labels in zip(self.teacher_hidden.split(256), self.labels.split(256)):
            log_q = log_probs(rows.to(dtype), weight)
            likeliest = log_q.topk(min(GIVEN_IDS, log_q.shape[-1]))
            top_k.append(likeliest.values)
            ids.append(likeliest.indices)
            of_label.append(gather(log_q, labels))
        return TopKTeacher(torch.cat(ids), torch.cat(top_k), torch.cat(of_label))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def make_problem(
    tokens: int, vocab_size: int, hidden_size: int, teacher_hidden_size: int,
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0,
) -> Problem:  # fmt: skip
    """Student and teacher share their first coordinates, so that they mostly agree."""
    torch.manual_seed(seed)
    shared = min(hidden_size, teacher_hidden_size)
    hidden = torch.randn(tokens, hidden_size, device=device)
    weight = torch.randn(vocab_size, hidden_size, device=device) * (3 / hidden_size**0.5)
    teacher_hidden = torch.randn(tokens, teacher_hidden_size, device=device)
    teacher_weight = torch.zeros(vocab_size, teacher_hidden_size, device=device)
    teacher_hidden[:, :shared] = hidden[:, :shared]
    teacher_weight[:, :shared] = weight[:, :shared]
    teacher_weight += torch.randn_like(teacher_weight) * (0.5 / teacher_hidden_size**0.5)
    # Labels sampled from the student by the Gumbel trick, a few rows at a time.
    labels = []
    for rows in hidden.split(64):
        noise = torch.empty(len(rows), vocab_size, device=device).exponential_().log_()
        labels.append((rows @ weight.T - noise).argmax(-1))
    return Problem(
        leaf(hidden.to(dtype)), leaf(weight.to(dtype)), teacher_hidden.to(dtype),
        teacher_weight.to(dtype), torch.cat(labels), torch.rand(tokens, device=device),
    )  # fmt: skip


def provider(name: str, objective: str) -> Callable[[Problem], Gradients]:
    """Loss and gradients of a problem, by this provider."""
    if name in EAGER:
        loss = EAGER_LOSSES[objective]
        if name == "compile":
            loss = torch.compile(loss)
    elif name in RIVALS:
        loss = RIVALS[name](BETAS[objective])
    else:
        rule: TokenRule = OBJECTIVES[objective]

        def loss(problem: Problem) -> Tensor:
            given = objective == "tropd_given"
            teacher = problem.top_k_teacher if given else problem.dense_teacher
            return linear_distillation_loss(
                problem.hidden, problem.weight, problem.labels, teacher, rule,
                uniforms=problem.uniforms, backend=name,
            ).loss  # fmt: skip

    def gradients(problem: Problem) -> Gradients:
        found = torch.autograd.grad(loss(problem), (problem.hidden, problem.weight))
        return found[0], found[1]

    return gradients


def bare_gemms(problem: Problem, teacher: bool = True) -> Gradients:
    """The four products, 3S + T, or the student's three, each whole and in the inputs' dtype."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden @ weight.T
    if teacher:
        # Both logits exist together, as any loss between them would have it.
        _kept = problem.teacher_hidden @ problem.teacher_weight.T
    return logits @ weight, logits.T @ hidden


def exact_gradients(objective: str, problem: Problem, tokens: int = 64) -> Gradients:
    """Of the first tokens, by eager PyTorch in float64."""
    return provider("eager", objective)(problem.first(tokens, torch.float64))


def gradient_error(
    name: str, objective: str, problem: Problem, tokens: int = 64, exact: Gradients | None = None
) -> float:
    """The larger relative error of d_hidden and d_weight on the first tokens, against `exact`,
    which is made where it is not given."""
    truth = exact_gradients(objective, problem, tokens) if exact is None else exact
    found = provider(name, objective)(problem.first(tokens, problem.hidden.dtype))
    squares = [
        ((ours.double() - exact).square().sum(), exact.square().sum())
        for ours, exact in zip(found, truth, strict=True)
    ]
    # Each gradient counts by its own norm, or the head's would drown the other.
    return float(max((e / t).sqrt() for e, t in squares))


# --- the losses as one writes them -------------------------------------------------------------


def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def gather(log_probs: Tensor, labels: Tensor) -> Tensor:
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_tropd_exact(problem: Problem) -> Tensor:
    return eager_tropd(problem, top_k=None)


def eager_tropd(problem: Problem, top_k: int | None = 64) -> Tensor:
    log_p = log_probs(problem.hidden, problem.weight)
    log_q = log_probs(problem.teacher_hidden, problem.teacher_weight)
    lp, lq = gather(log_p, problem.labels), gather(log_q, problem.labels)
    if top_k is not None:
        log_q, ids = log_q.topk(top_k, dim=-1)
        log_p = log_p.gather(-1, ids)
    return tropd(lp, lq, log_p, log_q, problem.uniforms)


def eager_tropd_given(problem: Problem) -> Tensor:
    log_p = log_probs(problem.hidden, problem.weight)
    lp, teacher = gather(log_p, problem.labels), problem.top_k_teacher
    log_p = log_p.gather(-1, teacher.ids)
    return tropd(lp, teacher.label_log_probs, log_p, teacher.log_probs, problem.uniforms)


def tropd(lp: Tensor, lq: Tensor, log_p: Tensor, log_q: Tensor, uniforms: Tensor) -> Tensor:
    """lp, lq (N,) of the labels; log_p, log_q (N, K) of the ids that the forward KL runs over."""
    reward = (lq - lp).detach()
    trusted = uniforms < reward.clamp_max(0).exp()
    forward_kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    policy_gradient = -reward * (lp - lp.detach()).exp()
    return torch.where(trusted, policy_gradient, forward_kl).mean()


def eager_jsd(problem: Problem, beta: float = 0.5) -> Tensor:
    log_p = log_probs(problem.hidden, problem.weight)
    log_q = log_probs(problem.teacher_hidden, problem.teacher_weight)
    log_m = torch.logaddexp(log_q + torch.log(log_q.new_tensor(beta)),
                            log_p + torch.log1p(-log_p.new_tensor(beta)))  # fmt: skip
    teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    student = (log_p.exp() * (log_p - log_m)).sum(-1)
    return (beta * teacher + (1 - beta) * student).mean()


def eager_reverse_kl(problem: Problem) -> Tensor:
    log_p = log_probs(problem.hidden, problem.weight)
    log_q = log_probs(problem.teacher_hidden, problem.teacher_weight)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


EAGER_LOSSES = {
    "tropd": eager_tropd,
    "tropd_exact": eager_tropd_exact,
    "tropd_given": eager_tropd_given,
    "gkd": eager_jsd,
    "reverse_kl": eager_reverse_kl,
}
