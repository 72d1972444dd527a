"""How far the student is from its teacher on prompts that it never trains on, and what it says."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.demo.rollout import completion_hidden, sample
from tropd_kernels import Divergence, HiddenTeacher, linear_distillation_loss
from tropd_kernels.heads import read_head


@dataclass(frozen=True)
class Judgement:
    """Of one model at one time."""

    reverse_kl: float  # KL(student || teacher), exact over the vocabulary, nats a token
    completions: tuple[str, ...]  # greedy, one for each prompt


def judge(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[str, ...],
    *,
    new_tokens: int,
    seed: int,
    dtype: torch.dtype,
) -> Judgement:
    """The exact KL, and what the student says: `distance` and `write`."""
    kl = distance(
        student, teacher, tokenizer, prompts, new_tokens=new_tokens, seed=seed, dtype=dtype
    )
    return Judgement(kl, write(student, tokenizer, prompts, new_tokens))


def distance(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[str, ...],
    *,
    new_tokens: int,
    seed: int,
    dtype: torch.dtype,
) -> float:
    """KL(student || teacher), a mean over the tokens of completions that the student samples.

    They are drawn with `seed`, the same draws before and after training, and the run's own draws go
    on as without.
    """
    student_head, teacher_head = read_head(student), read_head(teacher)
    autocast = torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        rollout = sample(student, tokenizer, list(prompts), new_tokens)
        with autocast:
            hidden = completion_hidden(student_head.backbone, rollout)
            teacher_hidden = completion_hidden(teacher_head.backbone, rollout)
        out = linear_distillation_loss(
            hidden.to(dtype),
            student_head.weight.to(dtype),
            rollout.labels,
            HiddenTeacher(teacher_hidden.to(dtype), teacher_head.weight.to(dtype)),
            objective=Divergence("reverse_kl"),
        )
    return out.loss.item()


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[str, ...],
    new_tokens: int,
) -> tuple[str, ...]:
    """What the model says to each prompt, greedily."""
    labels = sample(model, tokenizer, list(prompts), new_tokens, greedy=True).labels
    return tuple(tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in labels)
