"""The last of `scenarios`: those of GRPO's tests about rewards."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import transformers
from datasets import Dataset
from scenarios import TALK, TEXTS, TOKENS, alone, doubled, scenario


def length(completions, **columns):
    return [float(len(str(one))) + i for i, one in enumerate(completions)]


async def later(completions, **columns):
    return length(completions)


def judges_some(completions, **columns):
    return [None if i % 2 else value for i, value in enumerate(length(completions))]


def reads(completions, answer, log_metric, **columns):
    log_metric("first", float(answer[0]))
    return length(completions)


def of_message(completions, **columns):
    assert all(one[0]["role"] == "assistant" for one in completions)
    return length(completions)


def judge() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, initializer_range=0.5, name_or_path="judge",
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config).eval()


def rewarded(words: str, functions: Any, prompts=TEXTS, settings=None, **keywords: Any) -> None:
    @scenario(words)
    def _(folder):
        columns = {"prompt": prompts, "answer": [str(i) for i in range(8)]}
        return alone(
            folder, reward_funcs=functions() if functions is judge else functions,
            settings=dict(task_weight=1.0, num_generations=2) | (settings or {}),
            processing_class=TOKENS, train_dataset=Dataset.from_dict(columns), **keywords,
        )  # fmt: skip


rewarded("a reward function", length)
rewarded("... of messages", of_message, TALK)
rewarded("... that is async, beside another", [later, length])
rewarded("... that judges some completions", judges_some)
rewarded("... that reads a column, `log_metric`", reads)
rewarded("`reward_weights`", [length, later], settings=dict(reward_weights=[1.0, 0.5]))
rewarded("`scale_rewards`", length, settings=dict(scale_rewards="batch"))
rewarded("a reward model", judge, reward_processing_classes=TOKENS)
rewarded("a tokenizer too many", length, reward_processing_classes=[TOKENS, TOKENS])
rewarded("`reward_funcs` without `task_weight`", length, settings=dict(task_weight=None))
rewarded("`reward_funcs` beside `tools`", length, tools=[doubled])
