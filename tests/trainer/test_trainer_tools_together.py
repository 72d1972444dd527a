"""Tools' answers where one vLLM writes for two processes."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("trl", reason="the trainer needs trl")

from engines import on_two_processes
from test_trainer_tools import ANSWER, CALL, characters, doubled
from test_trainer_tools import make as make_tools
from training import Spy
from trl.generation.vllm_generation import VLLMGeneration

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: The rows' numbers, and how often each calls the tool. The second process has more callers than
#: the first, and goes on after it has ended.
CALLS = {5: 0, 4: 1, 0: 2, 2: 1}


class Client:
    """What vLLM answers: a call, or in the end an answer that names the prompt's number."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, prompts, max_tokens, **_):
        texts = map(self.written, map(self.tokenizer.decode, prompts))
        ids = [self.tokenizer(text)["input_ids"][:max_tokens] for text in texts]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None}

    def written(self, prompt):
        number = int(re.search(r"Double (\d)\.", prompt)[1])
        more = prompt.count("<tool_response>") < CALLS[number]
        return CALL if more else ANSWER.replace("42", f"{number}")


def make(folder, **settings):
    """A trainer with TRL's way to a server, but for the request."""
    settings |= dict(max_completion_length=400, shuffle_dataset=False)
    trainer = make_tools(folder, doubled, Spy, CALLS, **settings)
    there = VLLMGeneration.__new__(VLLMGeneration)
    vars(there).update(
        mode="server", accelerator=trainer.accelerator, vllm_client=Client(characters()),
        max_completion_length=400, sync_weights=lambda: None,
        **dict.fromkeys(
            ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logprobs",
             "structured_outputs_regex", "generation_kwargs")
        ),
    )  # fmt: skip
    trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation = True, "server", there
    trainer.args.vllm_mode, trainer._last_loaded_step = "server", None
    return trainer


_STEP = """
import sys, torch
from engines import use
settings = use(sys.argv[2])
from test_trainer_tools_together import make
trainer = make(sys.argv[1], per_device_train_batch_size=2, **settings)
trainer.train()
torch.save(trainer.batches, f"{sys.argv[1]}/{trainer.accelerator.process_index}.pt")
"""


@pytest.mark.slow
def test_each_row_goes_on_with_its_own_text(tmp_path):
    found = {}
    for (batch,) in on_two_processes(_STEP, tmp_path, "ddp"):
        for prompt, ids, mask in zip(
            batch["prompt_ids"], batch["completion_ids"], batch["completion_mask"].bool()
        ):
            text = characters().decode(ids[mask])
            number = re.search(r"Double (\d)\.", characters().decode(prompt))[1]
            assert text.endswith(f"It is {number}.<|im_end|>")
            found[int(number)] = text.count("<tool_response>")
    assert found == CALLS
