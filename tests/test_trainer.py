"""The trainer against a loop written by hand, on tiny random models.

`by_hand` is the specification of one step: every completion alone, without padding, through the
models' own logits in float64, with the reference loss. Whatever the trainer does with padding,
micro-batches, wrappers, heads and draws has to come out the same.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
import transformers
from trl import DistillationTrainer

from tropd_kernels import LogitsTeacher, distillation_loss
from tropd_kernels.credit import importance_weights, return_to_go
from tropd_kernels.draws import bernoulli_uniforms
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer, adapter
from tropd_kernels.trainer.registry import OBJECTIVES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
RATE = 0.05
#: Plain SGD, so that a step is the gradient.
SGD = dict(optim="sgd", learning_rate=RATE, max_grad_norm=0.0, lr_scheduler_type="constant")
KINDS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True, "spread": 1.0},
    "gemma2, capped": dict(
        kind=transformers.Gemma2ForCausalLM, config=transformers.Gemma2Config, head_dim=8,
        final_logit_softcapping=5.0, tie_word_embeddings=False,
    ),
    "granite, scaled": dict(
        kind=transformers.GraniteForCausalLM, config=transformers.GraniteConfig,
        logits_scaling=4.0, spread=16.0,
    ),
}  # fmt: skip


class Spy(TrOPDTrainer):
    """Keeps the micro-batches, and what the loss was called with."""

    def distill(self, student, teacher, inputs, normalizer):
        loss, stats = super().distill(student, teacher, inputs, normalizer)
        kept = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
        self.__dict__.setdefault("seen", []).append((kept, self.model.training))
        self.__dict__.setdefault("dtypes", set()).add(student.hidden.dtype)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss, stats

    @property
    def batches(self):
        return [inputs for inputs, training in self.seen if training]


def make(folder, student=None, teacher=None, data=None, evaluate=None, peft=None, **settings):
    defaults = dict(
        max_steps=1, per_device_train_batch_size=4, max_completion_length=10, logging_steps=1,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=5, **SGD,
    )  # fmt: skip
    return Spy(
        tiny.model(0) if student is None else student,
        tiny.model(1, hidden_size=48) if teacher is None else teacher,
        TrOPDConfig(str(folder), **(defaults | settings)),
        train_dataset=tiny.prompts() if data is None else data,
        eval_dataset=evaluate,
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def by_hand(trainer, student, teacher) -> torch.Tensor:
    """Loss of the first step, with gradients in the float64 model `student`."""
    args = trainer.args
    rows = [
        {k: v[i] for k, v in batch.items() if v.ndim}
        for batch in trainer.batches
        for i in range(len(batch["prompt_ids"]))
    ]
    tokens = sum(int(row["completion_mask"].sum()) for row in rows)
    total, kept = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        prompt = row["prompt_ids"][row["prompt_mask"].bool()]
        labels = row["completion_ids"][row["completion_mask"].bool()]
        ids = torch.cat([prompt, labels])[None]
        place = slice(len(prompt) - 1, len(ids[0]) - 1)
        logits = student(ids).logits[0, place].double()
        with torch.no_grad():
            theirs = teacher(ids).logits[0, place].double()
        positions = torch.arange(len(labels))
        prefix = positions < row["prefix_lengths"]
        options = {}
        lp, lq = (x.detach().log_softmax(-1).gather(1, labels[:, None])[:, 0]
                  for x in (logits / args.temperature, theirs / args.temperature))  # fmt: skip
        reward, own = (lq - lp)[None], ~prefix[None]
        if args.kl_discount_factor:
            future = return_to_go(reward, own, args.kl_discount_factor)[0]
            options["advantages"] = torch.where(prefix, reward[0], future)
        if args.importance_gamma is not None:
            weights = importance_weights(reward, own, args.importance_gamma)[0]
            options["token_weight"] = torch.where(prefix, 1.0, weights)
        out = distillation_loss(
            logits, labels, LogitsTeacher(theirs), args.rule(), reduction="sum",
            temperature=args.temperature, teacher_prefix=prefix, backend="reference",
            uniforms=bernoulli_uniforms(args.seed, 0, row["sequence_ids"], positions), **options,
        )  # fmt: skip
        total, kept = total + out.loss, kept + out.stats.kept.sum().item()
    loss = total / (kept if args.rule().normalize == "kept" else tokens)
    loss.backward()
    return loss.detach()


def rewards_by_hand(batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the student's tokens and -log p of the teacher's, before the first step."""
    teacher, student = tiny.model(1, hidden_size=48).double(), tiny.model(0).double()
    own, guided = [], []
    rows = [(batch, i) for batch in batches for i in range(len(batch["prompt_ids"]))]
    for batch, i in rows:
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        labels = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, labels])[None]
        with torch.no_grad():
            lp, lq = (
                m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, labels[:, None])
                for m in (student, teacher)
            )
        length = int(batch["prefix_lengths"][i])
        own.append((lq - lp)[length:])
        guided.append(-lp[:length])
    return torch.cat(own), torch.cat(guided)


def step_and_compare(trainer, teacher, tolerance=2e-5):
    """Trains one step of SGD and compares loss and gradients with `by_hand`."""
    before = copy.deepcopy(trainer.model)
    twin = copy.deepcopy(trainer.model).double()
    trainer.train()
    loss = by_hand(trainer, twin, copy.deepcopy(teacher).double())
    assert sum(trainer.losses) == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    moved = 0.0
    old = dict(before.named_parameters())
    true = dict(twin.named_parameters())
    for name, new in trainer.model.named_parameters():
        if not new.requires_grad:
            assert torch.equal(new, old[name])
            continue
        step = (old[name] - new).double() / RATE
        gradient = true[name].grad
        reach = max(gradient.norm().item(), 1e-3)
        # The step is read off float32 parameters.
        rounding = old[name].norm().item() * 1e-7 / RATE
        assert (step - gradient).norm().item() <= tolerance * reach + rounding, name
        moved += gradient.norm().item()
    assert moved > 0.1


# --- TRL's private side ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), adapter.HOOKS)
def test_hooks_exist(name, parameters):
    """A TRL that renames a hook or reorders its parameters would be called wrongly, or never."""
    found = list(inspect.signature(getattr(DistillationTrainer, name)).parameters)
    assert found[: len(parameters.split())] == parameters.split()


def test_attributes_exist(tmp_path):
    trainer = make(tmp_path)
    assert [name for name in adapter.ATTRIBUTES if not hasattr(trainer, name)] == []


def test_constructor_is_trl_s():
    ours, theirs = (
        list(inspect.signature(c.__init__).parameters) for c in (TrOPDTrainer, DistillationTrainer)
    )
    assert ours == theirs


# --- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_step_is_the_loop_s(tmp_path, kind):
    teacher = tiny.model(1, **KINDS[kind])
    trainer = make(tmp_path, tiny.model(0, **KINDS[kind]), teacher, temperature=1.3)
    step_and_compare(trainer, teacher)
    batch = trainer.batches[0]
    assert (batch["prompt_mask"] == 0).any()  # some prompt was padded on the left


@pytest.mark.parametrize(("backend", "prefix_weight"), [("reference", None), ("torch", 0.7)])
def test_step_with_prefix_and_credit(tmp_path, backend, prefix_weight):
    teacher = tiny.model(1, hidden_size=48)
    trainer = make(
        tmp_path, teacher=teacher, backend=backend, prefix_schedule="cosine", prefix_length=4,
        kl_discount_factor=0.9, importance_gamma=0.5, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, prefix_weight=prefix_weight,
    )  # fmt: skip
    step_and_compare(trainer, teacher)
    assert all((b["prefix_lengths"] == 4).all() for b in trainer.batches)


@pytest.mark.parametrize("objective", ["opd", "gkd", "eopd", "aopd", "mopd", "reopold", "sft"])
def test_step_of_other_objectives(tmp_path, objective):
    """reopold's mean is over the tokens that its gate keeps."""
    teacher = tiny.model(1, spread=1.5)
    trainer = make(tmp_path, tiny.model(0, spread=1.5), teacher, objective=objective)
    step_and_compare(trainer, teacher)


def test_step_with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    teacher = tiny.model(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    trainer = make(tmp_path, teacher=teacher, peft=config)
    step_and_compare(trainer, teacher)


def test_accumulation_is_the_large_batch(tmp_path):
    """The generation batch is the same; the split must change neither tokens, draws nor loss."""
    weights, losses = [], []
    for size in (4, 2, 1):
        trainer = make(
            tmp_path / str(size), per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append(sum(trainer.losses))
        assert len(trainer.batches) == 4 // size
    for other, loss in zip(weights[1:], losses[1:]):
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(losses[0], rel=1e-5)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in tiny.model(0).parameters()]))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    weights = []
    for on in (False, True):
        trainer = make(tmp_path / str(on), gradient_checkpointing=on, max_steps=2)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)


def test_bf16_multiplies_in_bf16(tmp_path):
    """TRL's redirection strips accelerate's autocast off the forward; without ours, bf16=True
    would train in float32."""
    trainer = make(tmp_path, bf16=True)
    trainer.train()
    assert trainer.dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_completions_end_at_any_eos_or_at_the_limit(tmp_path):
    flat = dict(spread=0.5)  # nearly uniform: ends come often
    trainer = make(
        tmp_path, tiny.model(0, **flat), tiny.model(1, **flat), tiny.prompts(32), max_steps=4,
        per_device_train_batch_size=8, max_completion_length=24,
    )  # fmt: skip
    trainer.train()
    ends = {2: 0, 3: 0, None: 0}
    for batch in trainer.batches:
        for ids, mask in zip(batch["completion_ids"], batch["loss_mask"]):
            kept = ids[: int(mask.sum())].tolist()
            assert mask[: len(kept)].all()
            eos = [i for i, token in enumerate(kept) if token in (2, 3)]
            assert eos in ([], [len(kept) - 1])
            assert eos or len(kept) == 24
            ends[kept[-1] if eos else None] += 1
    assert min(ends.values()) > 0, ends


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(tmp_path, objective):
    trainer = make(tmp_path, objective=objective, prefix_schedule="constant", prefix_length=3)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(map(math.isfinite, trainer.losses))
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_reopold_changes_its_stage():
    args = TrOPDConfig("unused", objective="reopold", stage_fraction=0.25, bf16=False, use_cpu=True)
    assert [args.rule(x).outlier for x in (0.0, 0.24, 0.25, 1.0)] == [
        "mask",
        "mask",
        "clip",
        "clip",
    ]
    assert args.rule(0.5).entropy_top_fraction == pytest.approx(0.2)


_PROCESS = """
import sys, torch
import tiny
from test_trainer import make
trainer = make(
    sys.argv[1], per_device_train_batch_size=1, gradient_accumulation_steps=2, ddp_backend="gloo",
    prefix_schedule="constant", prefix_length=2,
)
trainer.train()
rank = trainer.accelerator.process_index
parameters = [p.detach() for p in trainer.model.parameters()]
log = trainer.state.log_history[0]
torch.save((trainer.batches, parameters, trainer.losses, log), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_are_the_large_batch(tmp_path):
    """Tokens are counted, draws keyed and metrics summed over both."""
    (tmp_path / "process.py").write_text(_PROCESS)
    root = Path(__file__).parents[1]
    path = f"{root}{os.pathsep}{root / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "process.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=root, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    trainer = make(tmp_path)
    trainer.seen = [(batch, True) for batches, *_ in saved for batch in batches]
    keys = torch.cat([batch["sequence_ids"] for batch in trainer.batches])
    assert sorted(keys.tolist()) == [0, 1, 2, 3]
    twin = tiny.model(0).double()
    loss = by_hand(trainer, twin, tiny.model(1, hidden_size=48).double())
    # Each process has divided by its share of the tokens, and DDP takes the mean.
    assert sum(sum(losses) for _, _, losses, _ in saved) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for new, other, old, true in zip(
        saved[0][1], saved[1][1], tiny.model(0).parameters(), twin.parameters(), strict=True
    ):
        assert torch.equal(new, other)
        torch.testing.assert_close(
            (old.detach() - new).double() / RATE, true.grad, rtol=1e-3, atol=2e-4
        )
    log = saved[0][3]
    assert log["tropd/prefix_length"] == 2
    assert log["tropd/trust_ratio"] + log["tropd/outlier_ratio"] == pytest.approx(1)
    # Means of two micro-batches' means, each over both processes.
    halves = [rewards_by_hand([saved[0][0][k], saved[1][0][k]]) for k in range(2)]
    means = [torch.stack([half[j].mean() for half in halves]).mean().item() for j in range(2)]
    assert log["tropd/reward_mean"] == pytest.approx(means[0], rel=1e-4)
    assert log["tropd/prefix_nll"] == pytest.approx(means[1], rel=1e-4)


# --- the prefix --------------------------------------------------------------------------------


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


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_are_means_over_tokens(tmp_path):
    trainer = make(tmp_path, prefix_schedule="constant", prefix_length=3)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    own, guided = rewards_by_hand(trainer.batches)
    assert log["tropd/reward_mean"] == pytest.approx(own.mean().item(), rel=1e-4)
    assert log["tropd/reward_min"] == pytest.approx(own.min().item(), rel=1e-4)
    assert log["tropd/prefix_nll"] == pytest.approx(guided.mean().item(), rel=1e-4)
    assert log["tropd/trust_ratio"] + log["tropd/outlier_ratio"] == pytest.approx(1)
    for name in ("reverse_kl", "forward_kl", "teacher_entropy", "tokens_per_second",
                 "peak_memory_gib", "teacher_topk_mass", "student_topk_mass"):  # fmt: skip
        assert log[f"tropd/{name}"] > 0
    assert log["entropy"] > 0


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 4])  # within an epoch, and at its end
def test_resumed_run_has_the_same_losses(tmp_path, stop):
    settings = dict(
        max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_strategy="steps", save_steps=stop, optim="adamw_torch", learning_rate=1e-3,
        prefix_schedule="cosine", prefix_length=4,
    )  # fmt: skip
    whole = make(tmp_path, **settings)
    whole.train()
    resumed = make(tmp_path, tiny.model(9), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.losses == whole.losses[2 * stop :]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)


# --- what is refused ---------------------------------------------------------------------------


def test_vocabularies_padded_differently(tmp_path):
    """Each side's extra rows are never written, never read, and get no gradient."""
    student, teacher = tiny.model(0, vocab_size=104), tiny.model(1, hidden_size=48, vocab_size=112)
    trainer = make(tmp_path, student, teacher, prefix_schedule="constant", prefix_length=3)
    trainer.train()
    assert all(int(b["completion_ids"].max()) < 104 for b in trainer.batches)
    teacher = tiny.model(1, hidden_size=48, vocab_size=100)
    trainer = make(tmp_path, tiny.model(0, vocab_size=104), teacher)
    extra = trainer.model.lm_head.weight[100:].detach().clone()
    trainer.train()
    assert all(int(b["completion_ids"].max()) < 100 for b in trainer.batches)
    assert torch.equal(trainer.model.lm_head.weight[100:], extra)


def test_another_tokenizer_is_refused(tmp_path):
    teacher = tiny.model(1)
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tiny.tokenizer(("w1", "w0", *tiny.WORDS[2:])).save_pretrained(folder)
    with pytest.raises(ValueError, match="teacher_model: .*'w0' is 5 for the student and 6 for"):
        make(tmp_path, teacher=str(folder))
    tiny.tokenizer().save_pretrained(folder)
    make(tmp_path, teacher=str(folder))


def test_teacher_is_needed(tmp_path):
    args = TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="teacher_model: objective 'tropd' needs a teacher"):
        TrOPDTrainer(tiny.model(0), None, args, train_dataset=tiny.prompts())


def test_sft_goes_without_a_teacher(tmp_path):
    args = TrOPDConfig(
        str(tmp_path), objective="sft", bf16=False, use_cpu=True, report_to="none", max_steps=1,
        per_device_train_batch_size=2, max_completion_length=4, save_strategy="no",
    )  # fmt: skip
    trainer = TrOPDTrainer(
        tiny.model(0), None, args, tiny.prompts(), processing_class=tiny.tokenizer()
    )
    assert math.isfinite(trainer.train().training_loss)


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: the data set is empty"):
        make(tmp_path, data=tiny.prompts(0))
    with pytest.raises(ValueError, match="train_dataset: no column 'prompt'; it has 'text'"):
        make(tmp_path, data=tiny.prompts().rename_column("prompt", "text"))
    with pytest.raises(ValueError, match="no column 'guide'"):
        make(tmp_path, prefix_schedule="linear", prefix_length=2, prefix_column="guide")


def test_prompt_beyond_the_context(tmp_path):
    data = tiny.prompts(7).add_item({"prompt": " ".join(["w7"] * 60)})
    trainer = make(tmp_path, data=data, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="a prompt of 60 tokens .* exceed the student's context"):
        trainer.train()


def test_nan_stops_and_saves_the_batch(tmp_path):
    teacher = tiny.model(1)
    trainer = make(tmp_path, teacher=teacher)
    with torch.no_grad():
        teacher.lm_head.weight[:] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0") as caught:
        trainer.train()
    (path,) = tmp_path.glob("nonfinite_loss_step_0_process_0.pt")
    assert str(path) in str(caught.value)
    saved = torch.load(path)
    assert torch.equal(saved["inputs"]["completion_ids"], trainer.batches[0]["completion_ids"])


def test_adapter_on_the_head_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        make(tmp_path, peft=config)


def test_saved_config_reads_back(tmp_path):
    """`to_dict` of a config makes the same one again: no default turns into a given value."""
    args = TrOPDConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    again = dataclasses.replace(args)
    assert again.beta is None and again.rule() == args.rule()
    json.dumps(args.to_dict())


def test_regions_are_shown(tmp_path, capsys):
    """Every token once, in its region, with markup of the text escaped."""
    trainer = make(tmp_path, log_regions=True, prefix_schedule="constant", prefix_length=3)
    trainer.train()
    (page,) = (tmp_path / "regions").glob("train_*.html")
    text = page.read_text()
    batch = trainer.batches[0]
    assert text.count('class="prefix"') - 1 == int(batch["prefix_lengths"].sum())  # 1: the legend
    spans = sum(text.count(f'class="{name}"') - 1 for name in ("prefix", "trusted", "outlier"))
    assert spans == int(batch["completion_mask"].sum())
    log = trainer.state.log_history[0]
    own = spans - int(batch["prefix_lengths"].sum())
    assert text.count('class="trusted"') - 1 == round(log["tropd/trust_ratio"] * own)
    assert "<s>" not in text and "<pad>" not in text
    assert "outlier" in capsys.readouterr().out
