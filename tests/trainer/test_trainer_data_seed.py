"""data_seed: the order of the rows, and nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import make

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
#: Two epochs of four steps each.
RUN = dict(
    max_steps=8, per_device_train_batch_size=2, max_completion_length=3, optim="adamw_torch",
    learning_rate=1e-3,
)  # fmt: skip


def run(folder, *, stream=False, resume=None, **settings):
    data = tiny.prompts().to_iterable_dataset() if stream else tiny.prompts()
    trainer = make(folder, data=data, **RUN, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def order(trainer):
    """The prompts of each step; TRL shuffles them within it, by the generators of `seed`."""
    return [
        sorted(ids[mask.bool()].tolist() for ids, mask in zip(b["prompt_ids"], b["prompt_mask"]))
        for b in trainer.batches
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_data_seed_is_the_order_of_the_rows(tmp_path, stream):
    plain, same, other = (
        order(run(tmp_path, stream=stream, **given))
        for given in ({}, {"data_seed": 5}, {"data_seed": 99})
    )
    assert plain == same != other
    by_seed = order(run(tmp_path, stream=stream, seed=99))
    assert by_seed == other
    assert other[:4] != other[4:]  # of the next epoch


@pytest.mark.parametrize(("stream", "step"), [(False, 2), (False, 6), (True, 2)])
def test_resume_by_data_seed(tmp_path, stream, step):
    """A stream's length is not known, and transformers resume it in its first epoch alone."""
    settings = dict(data_seed=99, save_strategy="steps", save_steps=step)
    whole = run(tmp_path, stream=stream, **settings)
    assert order(whole) != order(run(tmp_path, stream=stream))
    resume = str(tmp_path / f"checkpoint-{step}")
    resumed = run(tmp_path, stream=stream, resume=resume, **settings)
    assert order(resumed) == order(whole)[step:]
    assert resumed.losses == whole.losses[step:]


def test_data_seed_leaves_weights_and_draws(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    made = [make(tmp_path, peft=adapter, data_seed=seed) for seed in (None, 99)]
    inputs = {"completion_ids": torch.zeros(2, 7), "sequence_ids": torch.arange(2)}
    weights, draws, states = zip(
        *((dict(t.model.named_parameters()), t._uniforms(inputs), t._is_off_policy()) for t in made)
    )
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(*draws) and states[0] == states[1]
