"""The student: its teacher after a fine-tune that went wrong, which no longer makes sense.

A few steps at far too high a learning rate, on answers that are the question's words in any order.
What it knew is still there for the most part: on-policy distillation from its earlier self brings
it back in minutes, where a student that lost whole layers would take much longer.
"""

import copy
import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.demo.prompts import PROMPTS

STUDENT = "itself after a fine-tune that went wrong"
STEPS = 5
LEARNING_RATE = 1e-3
#: Questions a step.
BATCH = 8


def damaged(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A trainable copy of the teacher, damaged; the same one on every call."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0, fused=True)
    shuffle = random.Random(0)
    for step in range(STEPS):
        chats = []
        for i in range(BATCH):
            question = PROMPTS[(step * BATCH + i) % len(PROMPTS)]
            words = question.split()
            shuffle.shuffle(words)
            answer = {"role": "assistant", "content": " ".join(words)}
            chats.append([{"role": "user", "content": question}, answer])
        batch = tokenizer.apply_chat_template(
            chats, padding=True, return_tensors="pt", return_dict=True
        ).to(student.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        student(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return student
