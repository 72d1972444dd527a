"""A tool that is called: both sides read its answer, of which there is no loss and no count."""

from __future__ import annotations

import contextlib
import math
import re
import string

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from training import SGD, Spy, every_step_is_the_loop, split, step_and_compare
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from trl.chat_template_utils import qwen3_chat_template

from tropd_kernels.trainer import TrOPDConfig, metrics

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

    calls = 1  # one after another

    def _sample_completions(self, prompt_ids, *arguments):
        self.__dict__.setdefault("read", []).append(prompt_ids)
        written = []
        for prompt in map(self._tokenizer.decode, prompt_ids):
            calls = "Double 0." in prompt and prompt.count("<tool_response>") < self.calls
            begun = prompt.rpartition("<|im_start|>assistant\n")[2].removeprefix(THOUGHT)
            text = CALL if calls else ANSWER
            assert text.startswith(begun)
            written.append(self._tokenizer(text[len(begun) :])["input_ids"])
        return written


def model(seed, **changes):
    changes = {"max_position_embeddings": 2048} | changes
    made = tiny.model(seed, vocab_size=len(characters()), **changes)
    made.generation_config.eos_token_id = [2]
    return made


def make(folder, tool=doubled, kind=Calls, numbers=(0, 1), models=None, **settings):
    talk = [[{"role": "user", "content": f"Double {n}."}] for n in numbers]
    texts = [ANSWER if n else CALL for n in numbers]
    data = Dataset.from_dict({"prompt": talk, "teacher_completion": texts})
    defaults = dict(
        max_steps=1, max_completion_length=300, bf16=False, use_cpu=True, seed=5,
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        logging_steps=1, **SGD,
    )  # fmt: skip
    args = TrOPDConfig(str(folder), **(defaults | settings))
    student, teacher = models or (model(0), model(1))
    return kind(
        student, teacher, args, data, data, processing_class=characters(), tools=[tool]
    )  # fmt: skip


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


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=256)
BEYOND = {
    "scaled": dict(max_position_embeddings=256, rope_parameters=YARN),
    "none": dict(kind=BloomForCausalLM, config=BloomConfig, n_head=4, n_layer=2),
}


@pytest.mark.parametrize("positions", BEYOND)
def test_an_answer_beyond_the_config_s_positions(tmp_path, positions):
    """TRL drops an answer beyond max_position_embeddings without a word, and fails without that
    attribute. The model's config is the same in every turn."""
    models = [model(seed, **BEYOND[positions]) for seed in (0, 1)]
    if positions == "none":  # the helper's models have it
        for made in models:
            del made.config.max_position_embeddings
    configs = []

    class Kept(Calls):
        def _sample_completions(self, prompt_ids, *arguments):
            configs.append(self.model.config.to_dict())
            return super()._sample_completions(prompt_ids, *arguments)

    trainer = make(tmp_path, kind=Kept, models=models, per_device_train_batch_size=2)
    trainer.train()
    _, (read,) = trainer.read
    assert len(read) > 256
    assert trainer._tokenizer.decode(read).count("<tool_response>\n42\n</tool_response>") == 1
    assert configs[0] == configs[1]


class GoesOn(Calls):
    """Writes in its own words after an answer."""

    def _sample_completions(self, prompt_ids, *arguments):
        if "read" not in self.__dict__:
            return super()._sample_completions(prompt_ids, *arguments)
        self.read.append(prompt_ids)
        self.limit = self.generation_config.max_new_tokens
        own = super(Calls, self)._sample_completions(prompt_ids, *arguments)
        self.written = [len(ids) for ids in own]
        return own


def test_an_answer_that_fills_the_context(tmp_path):
    """It leaves no room to go on: the row ends at its call."""
    trainer = make(tmp_path / "wide", per_device_train_batch_size=2)
    trainer.train()
    (prompt, _), (read,) = trainer.read
    for room, turns in ((0, 1), (1, 2)):
        models = [model(seed, max_position_embeddings=len(read) + room) for seed in (0, 1)]
        trainer = make(
            tmp_path / str(room), models=models, per_device_train_batch_size=2,
            max_completion_length=len(read) - len(prompt), kind=GoesOn,
        )  # fmt: skip
        words = f"end with a call: .* or the student's context of {len(read)} tokens"
        with pytest.warns(match=words) if room == 0 else contextlib.nullcontext():
            trainer.train()
        assert len(trainer.read) == turns


def test_a_turn_after_an_answer_ends_with_the_completion(tmp_path):
    """TRL writes a whole completion after an answer and cuts it: beyond a table of positions."""
    gpt2 = dict(kind=GPT2LMHeadModel, config=GPT2Config, n_head=4, n_layer=2, n_embd=32)
    trainer = make(
        tmp_path / "0", models=[model(seed, **gpt2) for seed in (0, 1)], numbers=(1000, 0),
        kind=GoesOn, per_device_train_batch_size=2, shuffle_dataset=False,
    )  # fmt: skip
    trainer.train()
    prompts, (read,) = trainer.read
    spent = len(read) - len(prompts[1])
    assert len(prompts[0]) > len(prompts[1]) and trainer.limit == 300 - spent
    context = len(prompts[0]) + spent + 20
    models = [model(seed, max_position_embeddings=context, **gpt2) for seed in (0, 1)]
    trainer = make(
        tmp_path / "1", models=models, numbers=(1000, 0), kind=GoesOn,
        per_device_train_batch_size=2, shuffle_dataset=False, max_completion_length=spent + 20,
        generation_kwargs={"min_new_tokens": 20},
    )  # fmt: skip
    trainer.train()
    assert trainer.written == [20]


@pytest.mark.parametrize(
    ("said", "settings"),
    [(1, dict(max_completion_length=70)), (0, dict(max_tool_calling_iterations=1))],
    ids=["completion", "turns"],
)
def test_an_answer_that_does_not_fit_is_warned_of(tmp_path, recwarn, said, settings):
    """TRL leaves it out without a word. A limit of turns, the user's own, leaves calls open as
    well."""
    trainer = make(tmp_path, max_steps=2, per_device_train_batch_size=2, **settings)
    trainer.calls = 2
    trainer.train()
    texts = [str(w.message) for w in recwarn.list if str(w.message).startswith("tools: ")]
    assert len(texts) == said  # in two steps
    words = "tools: 1 of 2 completions end with a call: .* max_completion_length=70 "
    assert all(re.match(words, text) for text in texts)


def failing_first():
    calls = []

    def tool(number):
        calls.append(number)
        if len(calls) == 1:
            raise RuntimeError("no connection")
        return 2 * number

    tool.__name__, tool.__doc__ = "doubled", doubled.__doc__
    tool.__annotations__ = doubled.__annotations__
    return tool


@pytest.mark.parametrize("size", [5, 2, 1])
def test_frequencies_are_over_rows_and_calls(tmp_path, size):
    """Not over the means of batches, of which some have few calls or none."""
    trainer = make(
        tmp_path, tool=failing_first(), numbers=(0, 0, 0, 1, 2), per_device_train_batch_size=1,
        per_device_eval_batch_size=size,
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_tools/call_frequency"] == pytest.approx(3 / 5)
    assert found["eval_tools/failure_frequency"] == pytest.approx(1 / 3)


def test_frequencies_of_several_steps(tmp_path):
    """Steps of one call and of two, in one log."""
    trainer = make(
        tmp_path, tool=failing_first(), numbers=(0, 1, 0, 0), per_device_train_batch_size=2,
        max_steps=2, logging_steps=2, shuffle_dataset=False,
    )  # fmt: skip
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    assert log["tools/call_frequency"] == 3 / 4
    assert log["tools/failure_frequency"] == pytest.approx(1 / 3)


def test_a_repeated_row_of_an_evaluation_calls_nothing(tmp_path, monkeypatch):
    """accelerate repeats rows where the last batch has too few for all processes."""
    monkeypatch.setattr(metrics, "first_occurrences", lambda _, rows: torch.arange(rows) < 2)
    calls = []

    def tool(number):
        calls.append(number)
        return 2 * number

    tool.__name__, tool.__doc__ = "doubled", doubled.__doc__
    tool.__annotations__ = doubled.__annotations__
    trainer = make(
        tmp_path, tool=tool, numbers=(0, 1, 0), per_device_train_batch_size=1,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    assert trainer.evaluate()["eval_tools/call_frequency"] == 1 / 2
    assert len(calls) == 1


class ThreeTurns(Calls):
    """Keeps the credit of each micro-batch, and what the loss says of its tokens."""

    calls = 2

    def _compare(self, student, teacher, labels, rule, **options):
        out = super()._compare(student, teacher, labels, rule, **options)
        if "advantages" in options:
            self.__dict__.setdefault("credits", []).append((options, out))
        else:  # the pass that makes the rewards
            self.__dict__.setdefault("rewards", []).append(out.stats)
        return out


def credit_of_row(rewards, own, teacher, drift, settings):
    """Returns, and importance weights times drift gates, of one row, token by token.

    teacher, drift: log-ratios of the teacher and of the policy that wrote the row.
    """
    discount, gamma = settings["kl_discount_factor"], settings["importance_gamma"]
    returns, later = list(rewards), 0.0
    for i in reversed(range(len(own))):
        later = discount * later + (rewards[i] if own[i] else 0.0)
        returns[i] = later if own[i] else rewards[i]
    places = [i for i, counts in enumerate(own) if counts]
    total, before = sum(abs(teacher[i]) for i in places), 0.0
    weights = [1.0] * len(own)
    for i in places:
        weights[i] = 1 + gamma * (1 - before / total)
        before += abs(teacher[i])
    if drift is None:
        return returns, weights
    size, gates = settings["drift_block_size"], {}
    for i in places:
        gates.setdefault((i - places[0]) // size, []).append(drift[i])
    gates = {
        block: math.exp(-settings["drift_tau"] * abs(sum(moved) / len(moved)))
        for block, moved in gates.items()
    }
    each = [gates[(i - places[0]) // size] for i in places]
    for i, gate in zip(places, each):
        weights[i] *= gate * len(each) / sum(each)
    return returns, weights


CREDIT = dict(
    objective="tropd", kl_discount_factor=0.9, importance_gamma=0.5, drift_tau=3.0,
    drift_block_size=16, num_iterations=2, max_steps=2, learning_rate=1e-5,
)  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(prefix_schedule="constant", prefix_length=11, prefix_weight=0.5),
        dict(num_generations=2, gradient_accumulation_steps=4),
    ],
    ids=["alone", "prefix", "num_generations"],
)
def test_three_turns(tmp_path, more):
    """Two calls and an answer: returns run across what the tool says, which has no loss, no gate
    and no credit, and moves no other token's. Both steps on the batch are the loop by hand."""
    settings = CREDIT | SPLIT | more
    trainer = make(tmp_path, kind=ThreeTurns, **settings)
    moved = every_step_is_the_loop(trainer, model(1))
    assert min(moved) > 0.1
    assert len(trainer.read) == 3
    called = 0
    for batch, stats, (options, out) in zip(
        trainer.batches, trainer.rewards, trainer.credits, strict=True
    ):
        written, counted = (batch[f"{name}_mask"][0].bool() for name in ("completion", "loss"))
        said = written & ~counted
        text = trainer._tokenizer.decode(batch["completion_ids"][0][said])
        called += text.count("<tool_response>\n42\n</tool_response>") == 2
        place = torch.arange(len(said))
        own = counted & (place >= batch["prefix_lengths"][0])
        assert own.any() and (torch.equal(own, counted) or "prefix_length" in more)
        old = batch.get("old_log_probs")  # from the second step on
        teacher = stats.teacher_log_probs - (stats.log_probs if old is None else old)
        drift = None if old is None else (old - stats.log_probs)[0].tolist()
        reward = stats.reward[0].tolist()
        returns, weights = credit_of_row(reward, own.tolist(), teacher[0].tolist(), drift, settings)
        for name, exact in (("advantages", returns), ("token_weight", weights)):
            found = options[name][0].double()
            torch.testing.assert_close(found, torch.tensor(exact).double(), rtol=1e-4, atol=1e-5)
        assert not out.stats.kept[0][~counted].any() and not out.stats.trust[0][~counted].any()
        assert out.stats.kept[0][own].any()
    assert called == 2 * (2 if "num_generations" in more else 1)


def broken(number: int) -> int:
    """Fails.

    Args:
        number: Which.
    """
    raise RuntimeError(f"no connection for {number}")


broken.__name__ = "doubled"


def test_a_tool_that_raises(tmp_path):
    """The student reads the error as the tool's answer, the log has its share, and the run goes on:
    one call that fails is no reason to lose the others."""
    trainer = make(tmp_path, tool=broken, per_device_train_batch_size=2)
    step_and_compare(trainer, model(1))
    (row,) = (row for row in split(trainer.batches) if (row["completion_ids"] == 3).any())
    said = trainer._tokenizer.decode(
        row["completion_ids"][row["completion_mask"].bool() & ~row["loss_mask"].bool()]
    )
    assert "{'error': 'no connection for 21'}" in said
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    assert log["tools/failure_frequency"] == 1.0


def test_a_tool_that_is_interrupted(tmp_path):
    """The checkpoint before is whole, and the resumed run is the one that was not interrupted."""
    save = dict(save_strategy="steps", save_steps=1, max_steps=2, per_device_train_batch_size=2)
    calls = []

    def interrupted(number):
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 2 * number

    interrupted.__name__, interrupted.__doc__ = "doubled", doubled.__doc__
    interrupted.__annotations__ = doubled.__annotations__
    whole = make(tmp_path / "whole", **save)
    whole.train()
    trainer = make(tmp_path / "run", tool=interrupted, **save)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = make(tmp_path / "run", **save)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.losses == whole.losses[1:]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)
