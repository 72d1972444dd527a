"""The problem that the benchmarks time, and the ways to solve it.

A problem is a batch of hidden states and two heads, drawn so that the logits spread as a language
model's do (standard deviation 3) and the teacher resembles the student. A provider takes it to a
function of no arguments that computes the loss and every gradient and returns the gradients.

| provider | what it is                                                                          |
|----------|-------------------------------------------------------------------------------------|
| eager    | PyTorch as one writes it: logits in the inputs' dtype, softmax in float32, autograd |
| compile  | the same under `torch.compile`                                                      |
| torch, … | `linear_distillation_loss` on that backend                                          |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_kernels import GKD, HiddenTeacher, TokenRule, TrOPD, linear_distillation_loss

Gradients = tuple[Tensor, Tensor]

#: "tropd_exact" has its forward KL over the whole vocabulary instead of the teacher's top 64.
OBJECTIVES = {"tropd": TrOPD(), "tropd_exact": TrOPD(top_k=None), "gkd": GKD(0.5)}
EAGER = ("eager", "compile")


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
        """The first tokens, in another precision."""
        return Problem(
            leaf(self.hidden[:tokens].detach().to(dtype)),
            leaf(self.weight.detach().to(dtype)),
            self.teacher_hidden[:tokens].to(dtype),
            self.teacher_weight.to(dtype),
            self.labels[:tokens],
            self.uniforms[:tokens],
        )


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
        loss = {"tropd": eager_tropd, "tropd_exact": eager_tropd_exact, "gkd": eager_jsd}[objective]
        if name == "compile":
            loss = torch.compile(loss)
    else:
        rule: TokenRule = OBJECTIVES[objective]

        def loss(problem: Problem) -> Tensor:
            return linear_distillation_loss(
                problem.hidden, problem.weight, problem.labels,
                HiddenTeacher(problem.teacher_hidden, problem.teacher_weight), rule,
                uniforms=problem.uniforms, backend=name,
            ).loss  # fmt: skip

    def gradients(problem: Problem) -> Gradients:
        found = torch.autograd.grad(loss(problem), (problem.hidden, problem.weight))
        return found[0], found[1]

    return gradients


def gradient_error(name: str, objective: str, problem: Problem, tokens: int = 64) -> float:
    """The larger relative error of d_hidden and d_weight against eager float64, on the first
    tokens."""
    truth = provider("eager", objective)(problem.first(tokens, torch.float64))
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


def eager_tropd_exact(problem: Problem) -> Tensor:
    return eager_tropd(problem, top_k=None)


def eager_tropd(problem: Problem, top_k: int | None = 64) -> Tensor:
    log_p = log_probs(problem.hidden, problem.weight)
    log_q = log_probs(problem.teacher_hidden, problem.teacher_weight)
    label = problem.labels.unsqueeze(-1)
    lp, lq = log_p.gather(-1, label).squeeze(-1), log_q.gather(-1, label).squeeze(-1)
    reward = (lq - lp).detach()
    trusted = problem.uniforms < reward.clamp_max(0).exp()
    if top_k is not None:
        log_q, ids = log_q.topk(top_k, dim=-1)
        log_p = log_p.gather(-1, ids)
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
