"""A LoRA, distilled in a loop of its own.

The student's head is frozen, so the loss makes no gradient for it: one matrix product through the
vocabulary less, and no accumulator of its size.

    python -m examples.lora --student build/train/student --teacher build/train/teacher \
        --prompts build/train/prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tropd_kernels import HiddenTeacher, TrOPD, linear_distillation_loss
from tropd_kernels.heads import Head, read_head

#: The whole distribution: `generate` takes what it is not told from the model's generation_config.
PLAIN = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def main(arguments: list[str] | None = None) -> list[float]:
    """KL(student || teacher) on the student's tokens, in nats, step by step."""
    options = parse(arguments)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(options.student)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).eval().requires_grad_(False)
    # Not the head: the loss reads its weight, which an adapter would change only in its forward.
    student = get_peft_model(student, LoraConfig(r=options.rank, target_modules="all-linear"))
    head, teacher_head = read_head(student), read_head(teacher)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate)
    prompts = read_prompts(options.prompts, tokenizer)

    divergences = []
    for step in range(options.steps):
        first = step * options.batch_size % len(prompts)
        ids, mask, begin = write(student, tokenizer, prompts[first : first + options.batch_size],
                                 options.tokens)  # fmt: skip
        labels = ids.masked_fill(mask == 0, -100)[:, begin:]
        with torch.no_grad():
            teacher_hidden = hidden_states(teacher_head, ids, mask, begin)
        out = linear_distillation_loss(
            hidden_states(head, ids, mask, begin), head.weight, labels,
            HiddenTeacher(teacher_hidden, teacher_head.weight, teacher_head.bias,
                          teacher_head.logit_scale, teacher_head.softcap),
            TrOPD(), bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap, seed=step,
        )  # fmt: skip
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counted = labels != -100
        divergences.append((out.stats.reverse_kl.sum() / counted.sum()).item())
        print(f"step {step}: KL(student || teacher) {divergences[-1]:.3f} nats a token")
    if options.out is not None:
        student.save_pretrained(options.out)
    return divergences


def write(student, tokenizer, prompts, most) -> tuple[torch.Tensor, torch.Tensor, int]:
    """ids and mask of prompts and completions, sampled from the student's whole distribution, and
    where the completions begin."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    student.eval()
    with torch.no_grad():
        ids = student.generate(**batch, **PLAIN, max_new_tokens=most)
    student.train()
    begin = batch.input_ids.shape[1]
    stops = student.generation_config.eos_token_id
    ends = torch.isin(ids[:, begin:], torch.tensor(stops))
    counts = ends.cumsum(1) - ends.long() == 0  # up to the first end, which counts
    return ids, torch.cat([batch.attention_mask, counts.long()], 1), begin


def hidden_states(head: Head, ids, mask, begin) -> torch.Tensor:
    """Of the positions that predict the completions."""
    positions = mask.cumsum(1).sub(1).clamp(0)
    read = head.backbone(input_ids=ids, attention_mask=mask, position_ids=positions)
    return read.last_hidden_state[:, begin - 1 : -1]


def read_prompts(file: Path, tokenizer) -> list[str]:
    """Texts; messages go through the chat template."""
    rows = [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()]
    template = dict(tokenize=False, add_generation_prompt=True)
    return [
        row if isinstance(row, str) else tokenizer.apply_chat_template(row, **template)
        for row in rows
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="build/train/student")
    parser.add_argument("--teacher", default="build/train/teacher")
    parser.add_argument("--prompts", type=Path, default=Path("build/train/prompts.jsonl"))
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    for name, default in (
        ("steps", 16),
        ("batch-size", 4),
        ("tokens", 24),
        ("rank", 16),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
