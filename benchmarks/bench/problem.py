"""The problem that every provider is given: hidden states, two heads, labels and a teacher.

Drawn so that the logits spread as a language model's do (standard deviation 3) and the teacher
resembles the student. A share of the tokens can be ignored; they lie scattered, as prompts and
padding do in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.bench.budget import Pace
from benchmarks.bench.losses import TOP_K
from benchmarks.bench.shapes import Shape
from tropd_kernels import HiddenTeacher, SampledTeacher, TopKTeacher

IGNORED = -100
#: Standard deviation of the student's logits, and of what the teacher's differ by.
SPREAD, DISAGREEMENT = 3.0, 0.5

Gradients = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """hidden (N, H), weight (V, H), labels (N,), uniforms (N,); teacher's (N, G) and (V, G).
    has_ignored: whether any label is -100, known without waiting for the GPU."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    uniforms: Tensor
    softcap: float | None = None
    has_ignored: bool = False

    def first(self, tokens: int, dtype: torch.dtype | None = None) -> Problem:
        """The first tokens, in another precision; what need not be converted is shared."""
        dtype = dtype or self.hidden.dtype
        return Problem(
            self.hidden[:tokens].detach().to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            self.teacher_hidden[:tokens].to(dtype),
            self.teacher_weight.to(dtype),
            self.labels[:tokens],
            self.uniforms[:tokens],
            self.softcap,
            self.has_ignored,
        )

    def take(self, rows: Tensor | slice | None) -> Problem:
        """Some of the tokens, all of which count; gradients flow back to this problem's. None is
        all of them."""
        if rows is None:
            return self
        part = replace(
            self, hidden=self.hidden[rows], teacher_hidden=self.teacher_hidden[rows],
            labels=self.labels[rows], uniforms=self.uniforms[rows], has_ignored=False,
        )  # fmt: skip
        return part.with_top_k_teacher(self.__dict__.get("top_k_teacher"), rows)

    def with_top_k_teacher(
        self, teacher: TopKTeacher | None, rows: Tensor | slice = slice(None)
    ) -> Problem:
        """This problem, with these rows of a teacher whose log-probs were computed before."""
        if teacher is not None:
            self.__dict__["top_k_teacher"] = TopKTeacher(
                teacher.ids[rows], teacher.log_probs[rows], teacher.label_log_probs[rows]
            )
        return self

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that every provider returns."""
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.weight))

    def teacher(self, form: str | None) -> HiddenTeacher | TopKTeacher | SampledTeacher | None:
        """In the form that a `Loss` names."""
        if form == "hidden":
            return HiddenTeacher(self.teacher_hidden, self.teacher_weight, softcap=self.softcap)
        if form is None:
            return None
        return self.top_k_teacher if form == "top_k" else self.sampled_teacher

    def is_ready_for(self, form: str | None) -> bool:
        return form not in ("top_k", "sampled") or "top_k_teacher" in self.__dict__

    def ready_for(self, form: str | None) -> Problem:
        """Itself, with the teacher's log-probs made where they are an input, before any clock runs
        and outside what `torch.compile` traces."""
        if not self.is_ready_for(form):
            _made = self.top_k_teacher
        return self

    @property
    def sampled_teacher(self) -> SampledTeacher:
        return SampledTeacher(self.top_k_teacher.label_log_probs)

    @cached_property
    def top_k_teacher(self) -> TopKTeacher:
        """The teacher as its likeliest ids."""
        dtype = torch.promote_types(self.teacher_hidden.dtype, torch.float32)
        weight = self.teacher_weight.to(dtype)
        top_k, ids, of_label = [], [], []
        for rows, labels in zip(self.teacher_hidden.split(256), self.labels.split(256)):
            log_q = capped(rows.to(dtype) @ weight.T, self.softcap).log_softmax(-1)
            likeliest = log_q.topk(min(TOP_K, log_q.shape[-1]))
            top_k.append(likeliest.values)
            ids.append(likeliest.indices)
            of_label.append(log_q.gather(-1, labels.clamp(0)[:, None])[:, 0])
        return TopKTeacher(torch.cat(ids), torch.cat(top_k), torch.cat(of_label))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def make_problem(
    tokens: int,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    ignored: float = 0.0,
    seed: int = 0,
    budget: float | None = None,
) -> Problem:
    """Student and teacher share their first coordinates, so that they mostly agree. ignored: the
    share of tokens that do not count. Raises OutOfTime where drawing the labels, which takes a
    product with the head, would take more than `budget` seconds."""
    torch.manual_seed(seed)
    vocab_size, width, teacher_width = (
        shape.vocab_size, shape.hidden_size, shape.teacher_hidden_size,
    )  # fmt: skip
    shared = min(width, teacher_width)
    hidden = torch.randn(tokens, width, device=device)
    weight = torch.randn(vocab_size, width, device=device) * (SPREAD / width**0.5)
    teacher_hidden = torch.randn(tokens, teacher_width, device=device)
    teacher_weight = torch.zeros(vocab_size, teacher_width, device=device)
    teacher_hidden[:, :shared] = hidden[:, :shared]
    teacher_weight[:, :shared] = weight[:, :shared]
    teacher_weight += torch.randn_like(teacher_weight) * (DISAGREEMENT / teacher_width**0.5)
    # Labels sampled from the student by the Gumbel trick, a few rows at a time.
    drawn: list[Tensor] = []
    pace = Pace(tokens, budget)
    for rows in hidden.split(64):
        noise = torch.empty(len(rows), vocab_size, device=device).exponential_().log_()
        drawn.append((capped(rows @ weight.T, shape.softcap) - noise).argmax(-1))
        pace.after(64 * len(drawn))
    labels = torch.cat(drawn)
    uniforms = torch.rand(tokens, device=device)
    many = min(round(ignored * tokens), tokens - 1)
    if many > 0:
        # Never the first token, so that every first part of the batch has one that counts.
        labels[1 + torch.randperm(tokens - 1, device=device)[:many]] = IGNORED
    return Problem(
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(),
        teacher_hidden.to(dtype), teacher_weight.to(dtype), labels, uniforms, shape.softcap,
        many > 0,
    )  # fmt: skip
