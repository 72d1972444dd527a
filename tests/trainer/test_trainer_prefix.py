"""Who writes which tokens of a completion: the teacher's prefix, its whole answer, the student."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

from tropd_kernels.trainer.prefix import column_ids, cut, is_complete, scheduled_length

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_prefix_from_the_column(tmp_path):
    """The teacher's words stand at the head of the completion, fewer at every step."""
    answers = [" " + " ".join(tiny.WORDS[i : i + 6]) for i in range(8)]
    data = tiny.prompts(8, teacher_completion=answers)
    trainer = make(
        tmp_path, data=data, max_steps=4, prefix_schedule="linear", prefix_length=4,
    )  # fmt: skip
    trainer.train()
    tokens = tiny.tokenizer()
    expected = {p: tokens(a)["input_ids"] for p, a in zip(data["prompt"], answers)}
    for batch, length in zip(trainer.batches, (4, 3, 2, 1)):
        assert (batch["prefix_lengths"] == length).all()
        for prompt, ids in zip(batch["prompt_ids"], batch["completion_ids"]):
            text = tokens.decode(prompt[prompt != 0])
            assert ids[:length].tolist() == expected[text][:length]
        assert batch["completion_ids"].shape[1] <= 10
    logged = [log["tropd/prefix_length"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [4, 3, 2, 1]


def test_prefix_from_messages_ends_the_completion(tmp_path):
    """A prefix that ends the turn leaves the student nothing to write."""
    talk = [[{"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(8)]
    data = tiny.prompts(8, teacher_completion=[f"w{i}" for i in range(8)]).remove_columns("prompt")
    data = data.add_column("prompt", talk)
    trainer = make(tmp_path, data=data, prefix_schedule="constant", prefix_length=10)
    trainer.train()
    for batch in trainer.batches:
        for ids, mask in zip(batch["completion_ids"], batch["loss_mask"]):
            assert int(mask.sum()) == 2 and ids[1] == 3  # the word, and the template's end of turn


def test_prefix_by_the_teacher(tmp_path):
    """Where there is no column the teacher writes, and the student goes on from there. Both write
    without doubt, so that the writer of each token can be told."""
    student, teacher = tiny.model(0, spread=300.0), tiny.model(1, spread=300.0)
    before = copy.deepcopy(student)
    trainer = make(tmp_path, student, teacher, prefix_schedule="constant", prefix_length=5)
    trainer.train()
    batch = trainer.batches[0]
    agree = {teacher: [], before: []}
    for i in range(4):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        labels = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        length = int(batch["prefix_lengths"][i])
        assert 1 <= length <= 5
        for model, part in ((teacher, slice(length)), (before, slice(length, None))):
            with torch.no_grad():
                logits = model(torch.cat([prompt, labels])[None]).logits[0, len(prompt) - 1 : -1]
            agree[model].append((logits.argmax(-1) == labels)[part].float())
    for hits in agree.values():
        assert torch.cat(hits).mean() > 0.8


def test_draws_change_with_the_step(tmp_path):
    """... and with seed, completion and position, but not with padding."""
    trainer = make(tmp_path)

    def draws(width=6, ids=(0, 1)):
        tokens = torch.zeros(len(ids), width, dtype=torch.long)
        return trainer._uniforms({"completion_ids": tokens, "sequence_ids": torch.tensor(ids)})

    first = draws()
    assert torch.equal(draws(width=9)[:, :6], first)
    assert torch.equal(draws(ids=(1, 0)).flip(0), first)
    assert first.unique().numel() == first.numel()
    trainer.state.global_step = 1
    assert not torch.isin(draws(), first).any()
    trainer.args.seed = 6
    trainer.state.global_step = 0
    assert not torch.isin(draws(), first).any()


def test_no_prefix_while_evaluating(tmp_path):
    trainer = make(tmp_path, evaluate=tiny.prompts(4), prefix_schedule="constant", prefix_length=4)
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    last = trainer.state.log_history[-1]
    assert last["eval_tropd/prefix_length"] == 0
    assert 0 <= last["eval_tropd/trust_ratio"] <= 1
    assert "eval_tropd/prefix_nll" not in last


def test_prefix_that_does_not_continue_its_prompt(tmp_path):
    """Glued to the prompt's last word, the first word of the answer makes another token of it."""
    data = tiny.prompts(8, teacher_completion=["w1 w2"] * 8)
    trainer = make(tmp_path, data=data, prefix_schedule="constant", prefix_length=2)
    with pytest.raises(ValueError, match="teacher_completion: 'w1 w2' does not tokenise"):
        trainer.train()


def test_off_policy_steps(tmp_path):
    """lmbda: in some steps the completions are the teacher's, whole and ended, as the seed says."""
    answers = [" " + " ".join(tiny.WORDS[i : i + 3 + i]) for i in range(8)]
    data = tiny.prompts(8, teacher_completion=answers)
    trainer = make(tmp_path, data=data, objective="gkd", lmbda=0.5, max_steps=12)
    trainer.train()
    tokens = tiny.tokenizer()
    expected = {p: tokens(a)["input_ids"] for p, a in zip(data["prompt"], answers)}
    steps = []
    for batch in trainer.batches:
        written = batch["completion_mask"].sum(1)
        steps.append(bool((batch["prefix_lengths"] == written).all()))
        assert steps[-1] or not batch["prefix_lengths"].any()
        for prompt, ids, n in zip(batch["prompt_ids"], batch["completion_ids"], written):
            answer = [*expected[tokens.decode(prompt[prompt != 0])], 2][:10]
            assert (ids[:n].tolist() == answer) == steps[-1]
    assert 2 <= sum(steps) <= 10
    again = make(tmp_path, data=data, objective="gkd", lmbda=0.5, max_steps=12)
    again.train()
    assert again.losses == trainer.losses


def test_off_policy_without_a_column(tmp_path):
    """The teacher writes the whole of it."""
    trainer = make(tmp_path, objective="gkd", lmbda=0.0)
    trainer.train()
    (batch,) = trainer.batches
    written = batch["completion_mask"].sum(1)
    assert (batch["prefix_lengths"] == written).all() and (written > 1).any()
    last = batch["completion_ids"].gather(1, written[:, None] - 1)[:, 0]
    assert ((written == 10) | torch.isin(last, torch.tensor([2, 3]))).all()


def test_a_teacher_stops_at_an_end_of_its_own(tmp_path):
    """A chat model teaches a base model, which ends its texts with another token: what the teacher
    would write behind its turn is no answer. The student's own texts still end as they did."""
    student, teacher = tiny.model(0, spread=0.5), tiny.model(1, spread=0.5)
    student.generation_config.eos_token_id = 2
    settings = dict(max_completion_length=40, per_device_train_batch_size=8)
    trainer = make(tmp_path, student, teacher, objective="gkd", lmbda=0.0, **settings)
    trainer.train()
    texts = [
        ids[mask.bool()].tolist()
        for batch in trainer.batches
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"])
    ]
    turns = [ids[ids.index(3) :] for ids in texts if 3 in ids]
    assert turns and all(turn == [3, 2] for turn in turns)
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == [2]


@pytest.mark.parametrize("first", [0, 1])
def test_rows_of_which_some_have_a_text(tmp_path, first):
    """The first row would decide for all."""
    rows = [{"prompt": "w1 w2"} for _ in range(8)]
    rows[first::2] = [row | {"teacher_completion": " w3"} for row in rows[first::2]]
    trainer = make(tmp_path, data=rows, prefix_schedule="constant", prefix_length=2)
    with pytest.raises(ValueError, match="teacher_completion: some rows of the data set have it"):
        trainer.train()


def test_schedules():
    lengths = {
        name: [scheduled_length(name, 100, step, 10) for step in (0, 1, 5, 9, 10, 20)]
        for name in ("none", "cosine", "linear", "constant")
    }
    assert lengths["none"] == [0] * 6
    assert lengths["cosine"] == [100, 97, 50, 2, 0, 0]
    assert lengths["linear"] == [100, 90, 50, 10, 0, 0]
    assert lengths["constant"] == [100] * 6
    assert scheduled_length("cosine", 100, 0, 0) == 0


def test_cut_and_complete():
    assert cut([5, 6, 7, 8], 3, {9}) == [5, 6, 7]
    assert cut([5, 9, 7, 8], 3, {9}) == [5, 9]
    assert cut([], 3, {9}) == []
    assert [is_complete(p, 3, {9}) for p in ([], [5], [5, 9], [5, 6, 7])] == [0, 0, 1, 1]


def test_column_follows_its_prompt():
    tokens = tiny.tokenizer()

    def text(words):
        return tokens(words)["input_ids"]

    assert column_ids(" w2 w3", "w0 w1", text("w0 w1"), text, "answer") == text("w2 w3")
    with pytest.raises(ValueError, match="answer: 'w2' does not tokenise .* from token 1 on"):
        column_ids("w2", "w0 w1", text("w0 w1"), text, "answer")
    with pytest.raises(ValueError, match="answer: expected text to go with"):
        column_ids([{"role": "assistant", "content": "w2"}], "w0", text("w0"), text, "answer")


def test_an_answer_that_the_template_renders_otherwise():
    """As Qwen3's with enable_thinking, which begins a turn with reasoning that the answer lacks."""
    tokens = tiny.tokenizer()
    tokens.chat_template = (
        "{% for message in messages %} {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %} w9{% endif %}"
    )

    def talk(messages, begins=False):
        return tokens.apply_chat_template(messages, add_generation_prompt=begins)["input_ids"]

    prompt = [{"role": "user", "content": "w0 w1"}]
    words = r"^answer: .* from token 2 on\. The chat template does not .* enable_thinking, let answ"
    with pytest.raises(ValueError, match=words):
        column_ids("w2 w3", prompt, talk(prompt, True), talk, "answer")


@pytest.mark.parametrize("roles", ["", "user", "assistant user assistant", "assistant tool"])
def test_an_answer_of_several_messages(roles):
    """What the user or a tool says between would be learned, and nothing after the first end."""
    tokens = tiny.tokenizer()

    def talk(messages):
        return tokens.apply_chat_template(messages)["input_ids"]

    prompt = [{"role": "user", "content": "w0 w1"}]
    answer = [{"role": role, "content": "w2 w3"} for role in roles.split()]
    words = r"^answer: expected one message of the assistant, got \[.*: give the last answer"
    with pytest.raises(ValueError, match=words):
        column_ids(answer, prompt, talk(prompt), talk, "answer")
    with pytest.raises(ValueError, match=words):
        column_ids(["w2 w3"], prompt, talk(prompt), talk, "answer")


def test_a_share_of_a_run_that_is_no_step(tmp_path):
    """The config knows it by max_steps, the first step by the rows and epochs."""
    trainer = make(
        tmp_path, max_steps=-1, num_train_epochs=1, prefix_schedule="linear", prefix_length=2,
        prefix_fraction=0.04,
    )  # fmt: skip
    with pytest.raises(ValueError, match="^prefix_fraction: 0.04 of the run's steps are none, of "):
        trainer.train()


@pytest.mark.parametrize(
    ("mode", "width", "limit"), [("server", 1, 7), ("colocate", 2, 7), ("colocate", 1, 2)]
)
def test_one_limit_for_the_processes_that_a_server_writes_for(tmp_path, mode, width, limit):
    """TRL sends the main process's limit. Here the other's rows want seven tokens, and ours two."""
    trainer = make(tmp_path, max_completion_length=10)
    trainer.args.vllm_mode, trainer.args.vllm_tensor_parallel_size = mode, width
    others = torch.tensor([7])
    trainer.accelerator = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), gather=lambda ours: torch.cat([ours, others])
    )
    trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace(max_completion_length=10)
    limits = []

    def sample(prompt_ids, *rest):
        limits.append(trainer.vllm_generation.max_completion_length)
        return [[9] * limits[0] for _ in prompt_ids]

    trainer._sample_completions = sample
    prefixes, prompts = [[7] * 8, [7] * 9], [[4, 5], [4, 5]]
    completions = trainer._continue_prefixes(prefixes, prompts, None, {}, False)
    assert limits == [limit]
    assert completions == [[7] * 8 + [9] * 2, [7] * 9 + [9]]
