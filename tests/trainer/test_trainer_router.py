"""The load-balancing loss of a mixture-of-experts student, against the model's own."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="the trainer needs trl")

import tiny
from training import RATE, by_hand, make

from tropd_kernels.trainer.router import RouterLoss, router_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
COEFFICIENT = 0.7
#: Weights of the router in each model.
GATES = {"mixtral": "gate.weight", "qwen3_moe": "gate.weight", "granitemoe": "router.weight"}


def mixture(name: str, seed: int = 0, **changes):
    kinds = {
        "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig,
                    dict(num_local_experts=4)),
        "qwen3_moe": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig,
                      dict(num_experts=4, moe_intermediate_size=32, head_dim=8)),
        "granitemoe": (transformers.GraniteMoeForCausalLM, transformers.GraniteMoeConfig,
                       dict(num_local_experts=4)),
    }  # fmt: skip
    kind, config, experts = kinds[name]
    # Those of torch multiply no float64.
    settings = experts | dict(num_experts_per_tok=2, experts_implementation="eager")
    settings |= dict(router_aux_loss_coef=COEFFICIENT) | changes
    return tiny.model(seed, kind=kind, config=config, **settings)


def auxiliary(trainer, model) -> list[torch.Tensor]:
    """The model's own auxiliary loss of each micro-batch, padding and all."""
    values = []
    for batch in trainer.batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        values.append(
            model(
                ids, attention_mask=mask, position_ids=positions, output_router_logits=True
            ).aux_loss
        )
    return values


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_gradient_of_the_router_s_loss(tmp_path, name, checkpointing):
    teacher = tiny.model(1, hidden_size=48)
    trainer = make(
        tmp_path, mixture(name), teacher, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    before = copy.deepcopy(trainer.model)
    twin = copy.deepcopy(before).double()
    trainer.train()
    assert any((batch["prompt_mask"] == 0).any() for batch in trainer.batches)
    loss = by_hand(trainer, twin, copy.deepcopy(teacher).double())
    old, true = dict(before.named_parameters()), dict(twin.named_parameters())
    alone = {key: p.grad.clone() for key, p in true.items()}
    values = auxiliary(trainer, twin)
    added = COEFFICIENT * torch.stack(values).mean()
    added.backward()
    assert sum(trainer.loss_values) == pytest.approx((loss + added).item(), rel=1e-4)
    gates = 0
    for key, new in trainer.model.named_parameters():
        step, gradient = (old[key] - new).double() / RATE, true[key].grad
        rounding = old[key].norm().item() * 1e-7 / RATE
        assert (step - gradient).norm() <= 1e-4 * gradient.norm().clamp_min(1e-3) + rounding, key
        if key.endswith(GATES[name]):
            gates += 1
            assert (alone[key] - gradient).norm() > 0.01 * gradient.norm()
    assert gates == 2
    logged = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert logged == pytest.approx([torch.stack(values).mean().item()], rel=1e-4)


def test_router_s_loss_left_out(tmp_path):
    losses = []
    for settings in ({"router_aux_loss_coef": 0.0}, {"router_aux_loss_coef": 0.3}, {}):
        trainer = make(tmp_path, mixture("mixtral"), **settings)
        trainer.train()
        losses.append(trainer.loss_values[0])
        logged = any("aux_loss" in entry for entry in trainer.state.log_history)
        assert logged is (settings.get("router_aux_loss_coef") != 0.0)
        (own,) = trainer.losses
    assert losses[0] == own
    assert (losses[1] - own) / (losses[2] - own) == pytest.approx(0.3 / COEFFICIENT, rel=1e-4)
    trainer = make(tmp_path, mixture("mixtral", router_aux_loss_coef=0.0))
    assert trainer._router is None


def test_router_s_loss_in_an_adapter_s_student(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = make(tmp_path, mixture("mixtral"), peft=adapter)
    trainer.train()
    (loss,), (own,) = trainer.loss_values, trainer.losses
    (value,) = auxiliary(trainer, mixture("mixtral"))
    assert loss == pytest.approx(own + COEFFICIENT * value.item(), rel=1e-4)


def test_a_weight_of_a_loss_that_the_model_does_not_have():
    """Llama 4's config has one, and transformers computes no such loss of it."""
    model = transformers.Llama4ForCausalLM.__new__(transformers.Llama4ForCausalLM)
    torch.nn.Module.__init__(model)
    model.config = transformers.Llama4TextConfig()
    assert model.config.router_aux_loss_coef and model.config.output_router_logits is False
    args = SimpleNamespace(router_aux_loss_coef=None, gradient_checkpointing=False)
    assert router_loss(model, args) is None
    args.router_aux_loss_coef = 0.5
    with pytest.raises(ValueError, match="0.5, but Llama4ForCausalLM is no mixture of experts wi"):
        router_loss(model, args)


def test_router_s_loss_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="router_aux_loss_coef: 0.5, but LlamaForCausalLM is no"):
        make(tmp_path, router_aux_loss_coef=0.5)
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs: with use_reentrant"):
        make(
            tmp_path, mixture("mixtral"), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
    student = mixture("mixtral")
    student.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="^router_aux_loss_coef: the router's loss has no gradi"):
        make(tmp_path, student).train()
    make(tmp_path, student, gradient_checkpointing=True).train()  # transformers' own, in its place
    student = mixture("mixtral").requires_grad_(False)
    student.model.norm.requires_grad_(True)  # behind the routers, whose loss is a constant then
    make(tmp_path, student).train()
    with pytest.raises(ValueError, match="router_aux_loss_coef: must be in"):
        make(tmp_path, router_aux_loss_coef=-1.0)
    doge = tiny.model(
        0, kind=transformers.DogeForCausalLM, config=transformers.DogeConfig, is_moe=True,
        num_experts=16, num_experts_per_tok=2, router_aux_loss_coef=0.1,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="DogeForCausalLM .* router_aux_loss_coef=0"):
        make(tmp_path, doge)
    monkeypatch.setattr(RouterLoss, "recording", lambda self, model: _nothing())
    trainer = make(tmp_path, mixture("mixtral"))
    with pytest.raises(NotImplementedError, match="the backbone gives no router logits"):
        trainer.train()


class _nothing:
    def __enter__(self):
        return [None]

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", GATES)
def test_router_logits_that_a_config_asks_for(tmp_path, name):
    """As TRL's SFT leaves it: transformers' generation fails on them beside padding."""
    found = []
    for asks in (False, True):
        models = [mixture(name, seed, output_router_logits=asks) for seed in (0, 1)]
        trainer = make(tmp_path, *models, prefix_schedule="constant", prefix_length=3)
        trainer.train()
        assert all(model.config.output_router_logits is asks for model in models)
        found.append((trainer.losses, [batch["completion_ids"] for batch in trainer.batches]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))
