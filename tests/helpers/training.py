"""Runs of the trainer on tiny random models, and one step of them written by hand.

`by_hand` is the specification of one step: every completion alone, without padding, through the
models' own logits in float64, with the reference loss. Whatever the trainer does with padding,
micro-batches, wrappers, heads and draws has to come out the same.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import tiny
import torch
from transformers import TrainerCallback

from tropd_kernels import LogitsTeacher, distillation_loss
from tropd_kernels.credit import drift_gates, importance_weights, return_to_go
from tropd_kernels.draws import bernoulli_uniforms
from tropd_kernels.trainer import TrOPDConfig, TrOPDTrainer

RATE = 0.05
#: Plain SGD, so that a step is the gradient.
SGD = dict(optim="sgd", learning_rate=RATE, max_grad_norm=0.0, lr_scheduler_type="constant")


class Spy(TrOPDTrainer):
    """Keeps the micro-batches, and what the loss was called with."""

    def distill(self, student, teacher, inputs, normalizer):
        loss, stats = super().distill(student, teacher, inputs, normalizer)
        kept = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
        self.__dict__.setdefault("seen", []).append((kept, self.model.training))
        self.__dict__.setdefault("dtypes", set()).add(student.hidden.dtype)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss, stats

    def after_loss(self, loss, stats, inputs):
        super().after_loss(loss, stats, inputs)
        self.__dict__.setdefault("loss_values", []).append(loss.item())

    @property
    def batches(self):
        return [inputs for inputs, training in self.seen if training]


def make(
    folder, student=None, teacher=None, data=None, evaluate=None, peft=None, kind=Spy,
    several=None, **settings
):  # fmt: skip
    """A trainer; a teacher where none is given, unless the settings say where its log-probs are."""
    defaults = dict(
        max_steps=1, per_device_train_batch_size=4, max_completion_length=10, logging_steps=1,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=5, **SGD,
    )  # fmt: skip
    args = TrOPDConfig(str(folder), **(defaults | settings))
    if teacher is None and several is None and args.loads_teacher and not args.teacher_models:
        teacher = tiny.model(1, hidden_size=48)
    return kind(
        tiny.model(0) if student is None else student,
        teacher,
        args,
        train_dataset=tiny.prompts() if data is None else data,
        eval_dataset=evaluate,
        processing_class=tiny.tokenizer(),
        peft_config=peft,
        **({} if several is None else {"teacher_models": several}),
    )


def unloadable(folder) -> str:
    """The name of a model that fails when it is loaded: what raises otherwise came before that."""
    (folder / "config.json").write_text("{}")
    return str(folder)


def split(batches) -> list[dict]:
    """The rows of micro-batches, with what has an item for each."""
    return [
        {
            name: value[i]
            for name, value in batch.items()
            if torch.is_tensor(value) and value.ndim and len(value) == len(batch["prompt_ids"])
        }
        for batch in batches
        for i in range(len(batch["prompt_ids"]))
    ]


def read_by(teacher, row) -> tuple:
    """What a row's teacher reads before the completion, and that teacher: `teacher`, or the row's
    own of a list of them."""
    own = "teacher_prompt" if "teacher_prompt_ids" in row else "prompt"
    one = teacher if "teacher_index" not in row else teacher[int(row["teacher_index"])]
    return row[f"{own}_ids"][row[f"{own}_mask"].bool()], one


def share_written_by(teacher, batch) -> float:
    """Of the prefixes' tokens, those that are the likeliest of the row's teacher."""
    hits = []
    for row in split([batch]):
        read, one = read_by(teacher, row)
        written = row["completion_ids"][: int(row["prefix_lengths"])]
        with torch.no_grad():
            logits = one(torch.cat([read, written])[None]).logits[0, len(read) - 1 : -1]
        hits.append((logits.argmax(-1) == written).float())
    return torch.cat(hits).mean().item()


def no_fields(prompt, completion) -> dict:
    return {}


def by_hand(trainer, student, teacher, step=0, sampler=None, fields=no_fields) -> torch.Tensor:
    """Loss of a step, with gradients in the float64 model `student`.

    sampler: the model that wrote the completions, where it is another one. fields: what a model
    reads besides the ids of a prompt and its completion.
    """
    args = trainer.args
    each = args.gradient_accumulation_steps
    rows = split(trainer.batches[step * each : (step + 1) * each])
    tokens = sum(int(row["loss_mask"].sum()) for row in rows)
    total, kept = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        prompt = row["prompt_ids"][row["prompt_mask"].bool()]
        labels = row["completion_ids"][row["completion_mask"].bool()]
        ids = torch.cat([prompt, labels])[None]
        place = slice(len(prompt) - 1, len(ids[0]) - 1)
        more = fields(prompt, labels)
        logits = student(ids, **more).logits[0, place].double()
        with torch.no_grad():
            read, one = read_by(teacher, row)
            own_ids = torch.cat([read, labels])[None]
            theirs = one(own_ids, **more).logits[0, len(read) - 1 : -1].double()
        positions = torch.arange(len(labels))
        own_words = row["loss_mask"][row["completion_mask"].bool()] != 0  # not a tool's
        counted = labels.masked_fill(~own_words, -100)
        prefix = positions < row["prefix_lengths"]
        options = {}
        lp, lq = (x.detach().log_softmax(-1).gather(1, labels[:, None])[:, 0]
                  for x in (logits / args.temperature, theirs / args.temperature))  # fmt: skip
        lo = lp
        if sampler is not None:
            with torch.no_grad():
                old = sampler(ids, **more).logits[0, place].double() / args.temperature
            lo = options["old_log_probs"] = old.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        reward, own = (lq - lo)[None], (own_words & ~prefix)[None]
        if args.kl_discount_factor:
            future = return_to_go(reward, own, args.kl_discount_factor)[0]
            options["advantages"] = torch.where(prefix, reward[0], future)
        if args.importance_gamma is not None:
            weights = importance_weights(reward, own, args.importance_gamma)[0]
            options["token_weight"] = torch.where(prefix, 1.0, weights)
        if args.drift_tau is not None and sampler is not None:
            # The mean of the gates is over a micro-batch, here a single completion.
            assert args.per_device_train_batch_size == 1
            gates = drift_gates(lo[None], lp[None], own, args.drift_block_size, args.drift_tau)[0]
            earlier = options.get("token_weight", torch.ones_like(gates))
            options["token_weight"] = torch.where(prefix, 1.0, gates * earlier)
        if "task_advantages" in row:
            options["task_advantages"] = row["task_advantages"].double().expand(len(labels))
        out = distillation_loss(
            logits, counted, LogitsTeacher(theirs), args.rule(), reduction="sum",
            temperature=args.temperature, teacher_prefix=prefix, backend="reference",
            uniforms=bernoulli_uniforms(args.seed, step, row["sequence_ids"], positions), **options,
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
    several = isinstance(teacher, list)  # in the order of teacher_models
    exact = [copy.deepcopy(one).double() for one in (teacher if several else [teacher])]
    loss = by_hand(trainer, twin, exact if several else exact[0])
    assert sum(trainer.losses) == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert compare_steps(before, trainer.model, twin, tolerance) > 0.1


def compare_steps(before, after, twin, tolerance=2e-5, rate=RATE) -> float:
    """Compares what a step of SGD did to each parameter with the gradients of `twin`, whose norms'
    sum is returned."""
    moved = 0.0
    old, true = (dict(model.named_parameters()) for model in (before, twin))
    for name, new in after.named_parameters():
        if not new.requires_grad:
            assert torch.equal(new, old[name])
            continue
        step = (old[name] - new).double() / rate
        gradient = true[name].grad
        if gradient is None:  # as of a part that sees images, in a step without any
            gradient = torch.zeros_like(step)
        reach = max(gradient.norm().item(), 1e-3)
        if name.endswith("k_proj.bias"):
            # Without rotary positions it shifts all of a query's scores alike, which changes
            # nothing: float32 has the rounding of what the weight's gradient is made of.
            whole = true[name.replace("bias", "weight")].grad.norm().item()
            reach = whole if reach <= 1e-3 and gradient.norm().item() <= 1e-6 * whole else reach
        # The step is read off float32 parameters.
        rounding = old[name].norm().item() * 1e-7 / rate
        error = (step - gradient).norm().item()
        assert error <= tolerance * reach + rounding, (name, error, reach, rounding)
        moved += gradient.norm().item()
    return moved


class Weights(TrainerCallback):
    """Keeps the model as it was before each step, and after the last."""

    def __init__(self):
        self.models = []

    def on_step_begin(self, args, state, control, model, **keywords):
        self.models.append(copy.deepcopy(model))

    on_train_end = on_step_begin


def every_step_is_the_loop(
    trainer, teacher, fields=no_fields, gradients=True, tolerance=2e-5
) -> list[float]:
    """Trains with SGD and compares losses and gradients of every step with `by_hand`; returns the
    sums of the gradients' norms."""
    kept = Weights()
    trainer.add_callback(kept)
    trainer.train()
    exact, args, moved = copy.deepcopy(teacher).double(), trainer.args, []
    each = args.gradient_accumulation_steps
    for step, (before, after) in enumerate(itertools.pairwise(kept.models)):
        twin = copy.deepcopy(before).double()
        wrote = step - step % args.num_iterations
        sampler = copy.deepcopy(kept.models[wrote]).double() if wrote < step else None
        loss = by_hand(trainer, twin, exact, step, sampler, fields)
        found = sum(trainer.losses[step * each : (step + 1) * each])
        assert found == pytest.approx(loss.item(), rel=2e-5, abs=2e-6), step
        if gradients:
            rate = args.learning_rate
            moved.append(compare_steps(before, after, twin, tolerance, rate))
    return moved


def resume_and_compare(folder, stop: int, other=None, **settings):
    """A run, and one that goes on from its checkpoint at this step with another student in hand:
    the same losses and weights, to the bit."""
    settings |= dict(
        save_strategy="steps", save_steps=stop, optim="adamw_torch", learning_rate=1e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    whole = make(folder, **settings)
    whole.train()
    resumed = make(folder, **settings | {"student": tiny.model(9) if other is None else other})
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert resumed.losses == whole.losses[2 * stop :]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs)


def is_the_large_batch(saved, student, twin, loss, parts=1):
    """Checks a step of two processes, of each of which batches, parameters and losses are saved.

    Args:
        student: As it was before the step.
        twin: Its copy in float64, whose gradients are `parts` times those of the loss.
        loss: Of all their batches together.
    """
    # Each process has divided by its share of the tokens, and DDP takes the mean.
    assert sum(sum(losses) for _, _, losses, *_ in saved) / 2 == pytest.approx(loss, rel=1e-5)
    old, true = ([p for p in each.parameters() if p.requires_grad] for each in (student, twin))
    for new, other, before, exact in zip(saved[0][1], saved[1][1], old, true, strict=True):
        assert torch.equal(new, other)
        torch.testing.assert_close(
            (before.detach() - new).double() / RATE, exact.grad / parts, rtol=1e-3, atol=2e-4
        )
