"""A tool that is called: both sides read its answer, of which there is no loss and no count."""

from __future__ import annotations

import string

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from training import SGD, Spy, split, step_and_compare
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from tropd_kernels.trainer import TrOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>",
           "</think>", "<tool_response>", "</tool_response>", "<unk>"]  # fmt: skip
CALL = '<tool_call>\n{"name": "doubled", "arguments": {"number": 21}}\n</tool_call><|im_end|>'
ANSWER = "It is 42.<|im_end|>"
#: What the template writes before an answer that it is given.
THOUGHT = "<think>\n\n</think>\n\n"


def characters() -> PreTrainedTokenizerFast:
    """One id a character, with Qwen3's template."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        unk_token="<unk>", additional_special_tokens=SPECIAL[1:9], padding_side="left",
        chat_template=qwen3_chat_template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def doubled(number: int) -> int:
    """Doubles a number.

    Args:
        number: Which.
    """
    return 2 * number


class Calls(Spy):
    """A student that calls the tool for one row, after whatever it is given of the call, and then
    answers; the others answer at once."""

    def _sample_completions(self, prompt_ids, *arguments):
        self.__dict__.setdefault("read", []).append(prompt_ids)
        written = []
        for prompt in map(self._tokenizer.decode, prompt_ids):
            calls = "Double 0." in prompt and "<tool_response>" not in prompt
            begun = prompt.rpartition("<|im_start|>assistant\n")[2].removeprefix(THOUGHT)
            text = CALL if calls else ANSWER
            assert text.startswith(begun)
            written.append(self._tokenizer(text[len(begun) :])["input_ids"])
        return written


def model(seed):
    made = tiny.model(seed, vocab_size=len(characters()), max_position_embeddings=2048)
    made.generation_config.eos_token_id = [2]
    return made


def make(folder, **settings):
    talk = [[{"role": "user", "content": f"Double {n}."}] for n in range(2)]
    data = Dataset.from_dict({"prompt": talk, "teacher_completion": [CALL, ANSWER]})
    args = TrOPDConfig(
        str(folder), max_steps=1, max_completion_length=300, bf16=False, use_cpu=True, seed=5,
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        logging_steps=1, **SGD, **settings,
    )  # fmt: skip
    return Calls(model(0), model(1), args, data, processing_class=characters(), tools=[doubled])


SPLIT = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    "settings",
    [
        dict(per_device_train_batch_size=2),
        dict(SPLIT, objective="reverse_kl"),
        dict(SPLIT, prefix_schedule="constant", prefix_length=11, prefix_weight=0.5),
        dict(SPLIT, objective="clip_outlier", kl_discount_factor=0.5, importance_gamma=0.5),
    ],
    ids=["one batch", "whole vocabulary", "prefix", "credit"],
)
def test_a_step_leaves_out_what_the_tool_says(tmp_path, settings):
    trainer = make(tmp_path, **settings)
    step_and_compare(trainer, model(1))
    rows = split(trainer.batches)
    (row,) = (row for row in rows if (row["completion_ids"] == 3).any())
    own, written = row["loss_mask"].bool(), row["completion_mask"].bool()
    assert trainer._tokenizer.decode(row["completion_ids"][own]).endswith(CALL + ANSWER)
    said = trainer._tokenizer.decode(row["completion_ids"][written & ~own])
    assert "<tool_response>\n42\n</tool_response>" in said
    (read,) = trainer.read[-1]
    assert trainer._tokenizer.decode(read).endswith(said)  # before it wrote the answer
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    assert log["completions/mean_length"] == sum(row["loss_mask"].sum() for row in rows) / 2
    assert log["tools/call_frequency"] == 0.5
