"""The trainer on two processes equals the trainer on one, under every engine."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from engines import ENGINES, on_two_processes, saved_together
from training import by_hand, is_the_large_batch, make, rewards_by_hand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


ONE_STEP = """
import sys, torch
from engines import use, whole_parameters
settings = use(sys.argv[2])
from training import make
trainer = make(
    sys.argv[1], per_device_train_batch_size=1, gradient_accumulation_steps=2,
    prefix_schedule="constant", prefix_length=2, **settings,
)
trainer.train()
rank = trainer.accelerator.process_index
parameters = whole_parameters(trainer.model)
log = trainer.state.log_history[0]
torch.save((trainer.batches, parameters, trainer.losses, log), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.parametrize(
    "engine",
    [pytest.param(each, marks=pytest.mark.slow) if each == "fsdp2" else each for each in ENGINES],
)
def test_two_processes_are_the_large_batch(tmp_path, tmp_path_factory, engine):
    """Tokens are counted, draws keyed and metrics summed over both."""
    saved = (
        saved_together("test_trainer_processes", tmp_path_factory)
        if engine == "ddp"
        else on_two_processes(ONE_STEP, tmp_path, engine)
    )
    trainer = make(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.seen = [(batch, True) for batches, *_ in saved for batch in batches]
    keys = torch.cat([batch["sequence_ids"] for batch in trainer.batches])
    assert sorted(keys.tolist()) == [0, 1, 2, 3]
    twin = tiny.model(0).double()
    loss = by_hand(trainer, twin, tiny.model(1, hidden_size=48).double())
    is_the_large_batch(saved, tiny.model(0), twin, loss.item())
    log = saved[0][3]
    assert log["tropd/prefix_length"] == 2
    assert log["tropd/trust_ratio"] + log["tropd/outlier_ratio"] == pytest.approx(1)
    # Over the tokens of both processes' micro-batches.
    own, guided = rewards_by_hand([batch for batches, *_ in saved for batch in batches])
    assert log["tropd/reward_mean"] == pytest.approx(own.mean().item(), rel=1e-4)
    assert log["tropd/prefix_nll"] == pytest.approx(guided.mean().item(), rel=1e-4)


_EVALUATION = """
import sys, torch, tiny
from training import make
from test_trainer_processes import EVALUATION
trainer = make(sys.argv[1], evaluate=tiny.prompts(7), ddp_backend="gloo", **EVALUATION)
found = trainer.evaluate()
torch.save(found, f"{sys.argv[1]}/{trainer.accelerator.process_index}.pt")
"""
EVALUATION = dict(per_device_eval_batch_size=2, objective="reverse_kl",
                  generation_kwargs={"do_sample": False})  # fmt: skip


@pytest.mark.slow
def test_an_evaluation_on_two_processes(tmp_path):
    """Seven rows are four and three: the eighth, which accelerate repeats, does not count."""
    both = on_two_processes(_EVALUATION, tmp_path, "ddp")
    alone = make(tmp_path, evaluate=tiny.prompts(7), **EVALUATION).evaluate()
    names = ["eval_loss", "eval_entropy", *(n for n in alone if n.startswith("eval_tropd/")),
             *(n for n in alone if n.startswith("eval_completions/"))]  # fmt: skip
    assert len(names) > 10
    for found in both:
        for name in names:
            assert found[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name


_RESUME = """
import sys, torch, tiny
from training import make
folder, _, resume = sys.argv[1:]
trainer = make(
    folder, per_device_train_batch_size=1, max_steps=8, save_strategy="steps", save_steps=6,
    ddp_backend="gloo", optim="adamw_torch", learning_rate=1e-3,
)
trainer.train(resume_from_checkpoint=resume or None)
rank = trainer.accelerator.process_index
prompts = [batch["prompt_ids"] for batch in trainer.batches]
torch.save((trainer.losses, prompts), f"{folder}/{rank}.pt")
"""


@pytest.mark.slow
def test_resume_in_the_second_epoch(tmp_path):
    """An epoch is four steps of two rows; what accelerate wraps around the sampler of a resumed run
    hides it from `set_epoch`."""
    whole = on_two_processes(_RESUME, tmp_path, "ddp", "")
    resumed = on_two_processes(_RESUME, tmp_path, "ddp", str(tmp_path / "checkpoint-6"))
    for (losses, prompts), (later, again) in zip(whole, resumed):
        assert later == losses[6:]
        assert all(torch.equal(a, b) for a, b in zip(again, prompts[6:], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(prompts[:4], prompts[4:]))


_CURVE = """
import sys, torch
from engines import use, whole_parameters
settings = use(sys.argv[2])
from datasets import Dataset
from training import make
from test_trainer_processes import CURVE
data = Dataset.from_json(f"{sys.argv[1]}/data.jsonl")
trainer = make(
    sys.argv[1], data=data, per_device_train_batch_size=2, **settings, **CURVE
)
trainer.train()
rank = trainer.accelerator.process_index
parameters = whole_parameters(trainer.model)
torch.save((trainer.losses, parameters), f"{sys.argv[1]}/{rank}.pt")
"""
CURVE = dict(
    max_steps=20, precomputed_teacher=True, objective_kwargs={"top_k": 4}, num_iterations=2,
    kl_discount_factor=0.5, learning_rate=0.05, max_grad_norm=0.5,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_curve_of_two_processes(tmp_path, engine):
    """Fixed completions, so that nobody samples: twenty steps, two rows each on two processes, and
    four on one."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for row, prompt in enumerate(tiny.prompts(12)["prompt"]):
        length = 2 + row % 7
        log_probs = torch.randn(length, tiny.VOCAB, generator=draw).log_softmax(-1)
        ids = torch.randint(4, tiny.VOCAB, (length,), generator=draw)
        best = log_probs.topk(4)
        rows.append(dict(
            prompt=prompt, completion_ids=ids.tolist(), teacher_ids=best.indices.tolist(),
            teacher_log_probs=best.values.tolist(),
            teacher_label_log_probs=log_probs.gather(1, ids[:, None])[:, 0].tolist(),
        ))  # fmt: skip
    data = tiny.Dataset.from_list(rows)
    data.to_json(tmp_path / "data.jsonl")
    saved = on_two_processes(_CURVE, tmp_path, engine)
    trainer = make(tmp_path, data=data, per_device_train_batch_size=4, **CURVE)
    trainer.train()
    curve = [(a + b) / 2 for a, b in zip(saved[0][0], saved[1][0], strict=True)]
    assert curve == pytest.approx(trainer.losses, rel=1e-3, abs=1e-4)
    assert max(curve) - min(curve) > 0.5
    for one, other, alone in zip(saved[0][1], saved[1][1], trainer.model.parameters()):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, alone.detach(), rtol=1e-3, atol=1e-4)
