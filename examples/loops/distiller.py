"""Student, teacher and loss in one module, and what the student writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tropd_kernels import HiddenTeacher, TokenRule, TrOPD, linear_distillation_loss
from tropd_kernels.heads import current, read_head

from ..lora import hidden_states, read_prompts, write


class Distiller(nn.Module):
    """The loss of a student on what it wrote, as a module's forward."""

    def __init__(self, student: Any, teacher: Any, rule: TokenRule):
        super().__init__()
        self.student, self.rule = student, rule
        # Not a submodule: nothing wraps, trains or saves the teacher.
        self.teacher = (teacher, read_head(teacher))
        self.head = read_head(student)

    def forward(self, batch: dict[str, Any], normalizer: float | Tensor | None = None) -> Any:
        """The loss and KL(student || teacher), summed over the tokens.

        normalizer: what the sum of the losses is divided by; by default this batch's tokens.
        """
        where = batch["ids"], batch["mask"], batch["begin"]
        head, teacher_head = current(self.head, self.student), self.teacher[1]
        with torch.no_grad():
            teacher_hidden = hidden_states(teacher_head, *where)
        out = linear_distillation_loss(
            hidden_states(head, *where), head.weight, batch["labels"],
            HiddenTeacher(teacher_hidden, teacher_head.weight, teacher_head.bias,
                          teacher_head.logit_scale, teacher_head.softcap),
            self.rule, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
            seed=batch["seed"], normalizer=normalizer,
        )  # fmt: skip
        return out.loss, out.stats.reverse_kl.sum()


def answers(student: Any, tokenizer: Any, prompts: list[str], most: int, seed: int) -> dict:
    """What the student writes to these prompts, and which of its tokens count."""
    ids, mask, begin = write(student, tokenizer, prompts, most)
    labels = ids.masked_fill(mask == 0, -100)[:, begin:]
    return dict(ids=ids, mask=mask, begin=begin, labels=labels, seed=seed)


def tokens_of(batch: dict) -> Tensor:
    """How many tokens count."""
    return (batch["labels"] != -100).sum()


def load(options: argparse.Namespace, rule: TokenRule | None) -> tuple[Distiller, Any, list[str]]:
    """The module, the tokenizer and the prompts."""
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(options.student)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).eval().requires_grad_(False)
    prompts = read_prompts(options.prompts, tokenizer)
    return Distiller(student, teacher, TrOPD() if rule is None else rule), tokenizer, prompts


def parse(description: str, arguments: list[str] | None, **more: int) -> argparse.Namespace:
    """The flags of each loop, and `more` whole numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--student", default="build/train/student")
    parser.add_argument("--teacher", default="build/train/teacher")
    parser.add_argument("--prompts", type=Path, default=Path("build/train/prompts.jsonl"))
    parser.add_argument("--out", type=Path, help="folder for the student")
    whole = dict(steps=8, batch_size=4, tokens=24, seed=0) | more
    for name, default in whole.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(arguments)
