"""A student, a teacher, a tokenizer and prompts that fit in a test: random, offline, on a CPU."""

from __future__ import annotations

from functools import cache

import torch
from accelerate.utils import imports
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# Several times a step it is asked whether PEFT and DeepSpeed are there, and reads their metadata.
imports._is_package_available = cache(imports._is_package_available)

SPECIAL = ("<pad>", "<s>", "</s>", "<|end|>", "<unk>")
WORDS = tuple(f"w{i}" for i in range(91))
VOCAB = len(SPECIAL) + len(WORDS)
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def tokenizer(words=WORDS) -> PreTrainedTokenizerFast:
    """One id a word."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<s>", "<|end|>"],
        padding_side="left",
        chat_template=TEMPLATE,
    )


def model(
    seed: int = 0,
    *,
    kind: type = LlamaForCausalLM,
    config: type = LlamaConfig,
    spread: float = 4.0,
    dtype: torch.dtype = torch.float32,
    **changes,
):
    """A random model whose logits have about this standard deviation, in eval mode."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15,
    ) | changes  # fmt: skip
    made = kind(config(**settings)).to(dtype)
    with torch.no_grad():
        # Its layers are as loud as its embedding, or a tied model would repeat its input for ever.
        head = made.get_output_embeddings().weight
        head.mul_(spread / (head.std() * head.shape[1] ** 0.5))
    made.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0, bos_token_id=1)
    return made.eval()


def prompts(rows: int = 8, **columns) -> Dataset:
    """Prompts of 2 to 5 words, so that a batch of them is padded."""
    texts = [" ".join(WORDS[(7 * i + j) % 91] for j in range(2 + i % 4)) for i in range(rows)]
    return Dataset.from_dict({"prompt": texts} | columns)
