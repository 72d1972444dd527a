"""A teacher that runs once: its top-k on disk, and a student that trains without it.

    python -m examples.cached_teacher score --teacher build/train/teacher \
        --data answers.jsonl --out build/cached/scores.parquet
    python -m examples.cached_teacher train --student build/train/student \
        --scores build/cached/scores.parquet --out build/cached/student

`score` reads rows with `prompt` and `completion` and writes, for each token of the completion, the
teacher's k likeliest ids with their log-probs, and the token's own log-prob; it prints how many
bytes that is. `train` is `TrOPDTrainer` with `precomputed_teacher`. Completions that are the same
for the whole training are off-policy, so the objective is a divergence on the top-k rather than K1;
what lies off the k counts as one more id.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tropd_kernels.heads import read_head

TOKENS_AT_ONCE = 256


@torch.no_grad()
def score(teacher: str, data: Path, out: Path, k: int) -> None:
    """Logits of a few tokens exist at a time; nothing of the vocabulary's size is kept."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    head, rows = read_head(model), []
    for line in data.read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        # Without the tokens that a tokenizer puts in front of a text: it goes on from the prompt.
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        completion.append(tokenizer.eos_token_id)
        ids = torch.tensor([prompt + completion])
        hidden = head.backbone(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        of_labels, top_ids, top_log_probs = [], [], []
        for part, labels in zip(
            hidden.split(TOKENS_AT_ONCE), torch.tensor(completion).split(TOKENS_AT_ONCE)
        ):
            log_probs = head.logits(part).log_softmax(-1)
            top = log_probs.topk(k)
            of_labels += log_probs.gather(-1, labels[:, None]).squeeze(-1).tolist()
            top_ids += top.indices.tolist()
            top_log_probs += top.values.tolist()
        rows.append({
            "prompt": row["prompt"], "completion_ids": completion,
            "teacher_label_log_probs": of_labels, "teacher_ids": top_ids,
            "teacher_log_probs": top_log_probs,
        })  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(out)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    print(f"{tokens} tokens, {out.stat().st_size / tokens:.0f} bytes a token")


def train(student: str, scores: Path, out: Path, k: int, steps: int, learning_rate: float):
    """The log of the training."""
    from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

    data = load_dataset("parquet", data_files=str(scores), split="train")
    trainer = TrOPDTrainer(
        model=student,
        args=TrOPDConfig(
            str(out),
            objective="forward_kl",
            objective_kwargs={"top_k": k, "top_k_tail": "bucket"},
            precomputed_teacher=True,
            max_steps=steps, learning_rate=learning_rate, lr_scheduler_type="constant",
            per_device_train_batch_size=4, max_completion_length=32, logging_steps=1,
            save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
        ),
        train_dataset=data,
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("score")
    one.add_argument("--teacher", default="build/train/teacher")
    one.add_argument("--data", type=Path, required=True, help="rows with prompt and completion")
    other = commands.add_parser("train")
    other.add_argument("--student", default="build/train/student")
    other.add_argument("--scores", type=Path, required=True)
    other.add_argument("--steps", type=int, default=16)
    other.add_argument("--learning-rate", type=float, default=1e-4)
    for command in (one, other):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--top-k", type=int, default=64)
    given = parser.parse_args(arguments)
    if given.command == "score":
        return score(given.teacher, given.data, given.out, given.top_k)
    return train(
        given.student, given.scores, given.out, given.top_k, given.steps, given.learning_rate
    )


if __name__ == "__main__":
    main()
