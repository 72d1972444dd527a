"""On-policy distillation with the fused loss: the loop to copy.

Each step the student writes, both models read what it wrote, and one call compares them: hidden
states and the two heads go in, the loss comes out, and no [tokens, vocabulary] tensor is ever made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.demo.rollout import completion_hidden, sample
from tropd_kernels import HiddenTeacher, TrOPD, linear_distillation_loss
from tropd_kernels.heads import read_head


@dataclass(frozen=True)
class Step:
    """What one step reports: means over the tokens that count."""

    number: int
    tokens: int
    loss: float
    trust: float  # share of tokens inside the gate
    reverse_kl: float  # KL(student || teacher), exact over the vocabulary, nats
    entropy: float  # the student's, nats
    gradient_share: float  # of the head's columns in the gradient products


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterator[list[str]],
    *,
    steps: int,
    new_tokens: int,
    seed: int,
    dtype: torch.dtype,
    learning_rate: float = 3e-4,
    decay: bool = False,
    **loss_options: Any,
) -> Iterator[Step]:
    """Trains the student in place; yields after every step.

    decay: the learning rate falls linearly to 0. loss_options: more of the loss's keywords, such
    as gradient_sampling=0.1."""
    student_head, teacher_head = read_head(student), read_head(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), learning_rate, weight_decay=0, fused=True)
    # Mixed precision where `dtype` is bfloat16: the student's parameters stay float32.
    autocast = torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32)

    for number in range(steps):
        rollout = sample(student, tokenizer, next(batches), new_tokens)
        with autocast:
            with torch.no_grad():
                teacher_hidden = completion_hidden(teacher_head.backbone, rollout)
            hidden = completion_hidden(student_head.backbone, rollout)

        out = linear_distillation_loss(
            hidden.to(dtype),
            student_head.weight.to(dtype),
            rollout.labels,
            HiddenTeacher(teacher_hidden.to(dtype), teacher_head.weight.to(dtype)),
            objective=TrOPD(),
            seed=seed + number,  # fresh gate draws each step, the same ones in a resumed run
            **loss_options,
        )
        if decay:
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - number / steps)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

        tokens = int((rollout.labels >= 0).sum())
        share = out.gradient_share  # None where nothing was sampled
        yield Step(
            number=number + 1,
            tokens=tokens,
            loss=out.loss.item(),
            trust=out.stats.trust.sum().item() / tokens,
            reverse_kl=out.stats.reverse_kl.sum().item() / tokens,
            entropy=out.stats.entropy.sum().item() / tokens,
            gradient_share=1.0 if share is None else share.item(),
        )
