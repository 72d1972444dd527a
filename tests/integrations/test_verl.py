"""verl's distillation losses through the installed verl's own engine code."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import K

from tropd_kernels import ClipOutlier, SampledTeacher, TopKTeacher, TrOPD, distillation_loss
from tropd_kernels.integrations import verl as integration
from tropd_kernels.integrations.log_probs import token_uniforms
from tropd_kernels.integrations.verl_batch import rule_of
from tropd_kernels.integrations.verl_replaced import take_over_logits

PROMPTS, RESPONSES, V = (3, 2, 4), (25, 1, 30), 29


@pytest.fixture
def verl_losses():
    pytest.importorskip("verl", reason="needs verl: make engines")
    return pytest.importorskip("verl.trainer.distillation.losses")


def test_names_are_registered_for_their_teacher(verl_losses):
    for names, use_topk in ((integration.SAMPLED, False), (integration.TOP_K, True)):
        for name in names:
            settings = verl_losses.get_distillation_loss_settings(name)
            assert (settings.use_topk, settings.use_estimator) == (use_topk, not use_topk)
            verl_losses.get_distillation_loss_fn(name)
    with pytest.raises(ValueError, match="already registered"):
        integration.register("tropd", TrOPD(), "top_k")


@pytest.mark.slow
def test_verl_imports_it_by_its_environment_variable(verl_losses):
    """Half-way through verl's own import."""
    code = (
        "import verl; from verl.workers.config import DistillationLossConfig as C; "
        "print(C(loss_mode='tropd', use_policy_gradient=False).loss_settings.use_topk)"
    )
    environment = os.environ | {
        "VERL_USE_EXTERNAL_MODULES": integration.__name__,
        "PYTHONPATH": str(Path(integration.__file__).parents[2]),
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout.split() == ["True"], run.stderr


def micro_batch(form: str, nested: bool):
    """What verl's engine gets: a TensorDict as after `left_right_2_no_padding`, or all nested."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    draw = torch.Generator().manual_seed(0)
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES)]
    n = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    log_q = (2 * torch.randn(n, V, generator=draw, dtype=torch.float64)).log_softmax(-1)
    ids = torch.randint(V, (n,), generator=draw)
    ids[2::3] = log_q.roll(1, 0)[2::3].topk(K).indices[:, -1]  # tokens just among the k
    if form == "top_k":
        top = log_q.topk(K)
        teacher_ids, teacher_log_probs = top.indices, top.values
    else:
        teacher_ids = ids.roll(-1)[:, None]
        teacher_log_probs = log_q.gather(-1, teacher_ids)

    def jagged(values):
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    widest = max(RESPONSES)
    mask = torch.arange(widest) < torch.tensor(RESPONSES)[:, None]
    mask[2, 1:3] = False  # a tool's tokens
    old = torch.randn(len(PROMPTS), widest, generator=draw, dtype=torch.float64) - 3
    ragged = torch.nested.as_nested_tensor
    sequences = ids.split(lengths)
    if nested:
        layout = {
            "prompts": ragged([s[:p] for s, p in zip(sequences, PROMPTS)], layout=torch.jagged),
            "responses": ragged([s[p:] for s, p in zip(sequences, PROMPTS)], layout=torch.jagged),
            "response_mask": ragged(
                [m[:r].long() for m, r in zip(mask, RESPONSES)], layout=torch.jagged
            ),
            "old_log_probs": ragged([o[:r] for o, r in zip(old, RESPONSES)], layout=torch.jagged),
        }
    else:
        longest = max(PROMPTS)
        left = torch.arange(longest) >= longest - torch.tensor(PROMPTS)[:, None]
        right = torch.arange(widest) < torch.tensor(RESPONSES)[:, None]
        layout = {
            "prompts": torch.zeros(len(PROMPTS), longest, dtype=torch.long),
            "responses": torch.zeros(len(PROMPTS), widest, dtype=torch.long),
            "attention_mask": torch.cat([left, right], 1).long(),
            "response_mask": mask.long(),
            "old_log_probs": old,
        }
    data = TensorDict(
        layout
        | {
            "input_ids": jagged(ids),
            "teacher_ids": jagged(teacher_ids.int()),
            "teacher_logprobs": jagged(teacher_log_probs.float()),
        },
        batch_size=[len(PROMPTS)],
    )
    tu.assign_non_tensor(
        data, dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=len(PROMPTS),
        use_remove_padding=True, use_fused_kernels=False, calculate_entropy=True,
        distillation_use_topk=form == "top_k", distillation_only=form == "top_k",
        max_response_len=widest,
    )  # fmt: skip
    return data, log_q, mask, old


def configs(loss_mode, strategy="fsdp2", **settings):
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

    settings = {
        "use_task_rewards": False, "use_policy_gradient": False, "loss_max_clamp": None,
        "log_prob_min_clamp": None, "topk": K,
    } | settings  # fmt: skip
    actor = ActorConfig(
        strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=1, data_loader_seed=7
    )
    loss = DistillationLossConfig(loss_mode=loss_mode, **settings)
    return actor, DistillationConfig(distillation_loss=loss)


def run_verl(verl_losses, data, logits, actor, distillation):
    """Logits to loss by verl's FSDP engine and its loss function."""
    engines = pytest.importorskip("verl.workers.engine.fsdp.transformer_impl")
    engine = object.__new__(engines.FSDPEngineWithLMHead)
    engine.use_ulysses_sp = False
    engine.engine_config = SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False
    )
    from verl.utils.torch_functional import entropy_from_logits

    engine.compute_entropy_from_logits = entropy_from_logits
    function = partial(
        verl_losses.distillation_ppo_loss, config=actor, distillation_config=distillation
    )
    ids = data["input_ids"]
    arguments = {"input_ids_rmpad_rolled": ids.values().roll(-1), "temperature_is_one": True}
    arguments |= {"temperature_rmpad": torch.ones(len(logits)), "pad_size": 0}
    output = SimpleNamespace(logits=logits.unsqueeze(0))
    model_output = engine.prepare_model_outputs(output, arguments, data, function)
    return function(model_output=model_output, data=data, dp_group=None)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", [*integration.SAMPLED, *integration.TOP_K])
def test_verl_s_engine_gives_the_reference_s_loss_and_gradient(verl_losses, name, nested):
    form = "top_k" if name in integration.TOP_K else "sampled"
    data, log_q, mask, old = micro_batch(form, nested)
    rule = integration.RULES[name]
    logits = torch.randn(len(log_q), V, generator=torch.Generator().manual_seed(1))
    logits = (2 * logits).requires_grad_()
    loss, metrics = run_verl(verl_losses, data, logits, *configs(name))
    loss.backward()

    # The same by hand: row i of sequence s predicts its token i + 1.
    ids = data["input_ids"].values()
    labels, old_flat = torch.full_like(ids, -100), torch.zeros(len(ids), dtype=torch.float64)
    start = 0
    for s, (p, r) in enumerate(zip(PROMPTS, RESPONSES)):
        for j in range(r):
            if mask[s, j]:
                labels[start + p + j - 1] = ids[start + p + j]
                old_flat[start + p + j - 1] = old[s, j]
        start += p + r
    teacher_log_probs = data["teacher_logprobs"].values().double()
    teacher_ids = data["teacher_ids"].values().long()
    hit = teacher_ids == labels[:, None]
    lq = torch.where(hit, teacher_log_probs, -math.inf).amax(-1)
    teacher = SampledTeacher(lq.where(labels >= 0, 0.0))
    if form == "top_k":
        teacher = TopKTeacher(teacher_ids, teacher_log_probs, lq)
        rule = replace(rule, top_k=K)
        assert 0 < hit.any(-1).sum() < (labels >= 0).sum()
    leaf = logits.detach().double().requires_grad_()
    offsets = data["input_ids"].offsets()
    truth = distillation_loss(
        leaf, labels, teacher, rule, old_log_probs=old_flat, backend="reference",
        uniforms=token_uniforms(7, ids, offsets),
    )  # fmt: skip
    truth.loss.backward()
    assert (labels >= 0).sum() == mask.sum()
    if rule.gate == "bernoulli":  # the draws decide
        assert 0 < truth.stats.trust[hit.any(-1)].mean() < 1
    torch.testing.assert_close(loss.double(), truth.loss.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)
    trust = metrics["distillation/trust"].aggregate()
    selected = (labels >= 0) & ~truth.stats.trust.isnan()  # M is made for them alone
    assert selected.any()
    assert trust == pytest.approx(float(truth.stats.trust[selected].mean()), rel=1e-6)
    if truth.stats.score is not None:
        score = truth.stats.score[labels >= 0]
        share = score[score >= truth.stats.threshold].sum() / score.sum()
        for name, value in (
            ("select_threshold", truth.stats.threshold),
            ("selected_score_share", share),
        ):
            assert metrics[f"distillation/{name}"].aggregate() == pytest.approx(float(value), 1e-5)


def own(verl_losses, rule, monkeypatch):
    """Registers a rule for one test."""
    for registry in (verl_losses.DISTILLATION_LOSS_REGISTRY, integration.RULES):
        monkeypatch.setitem(registry, "mine", None)
        monkeypatch.delitem(registry, "mine")  # undone at the end, and with it the registration
    integration.register("mine", rule, "top_k")


def test_a_rule_of_one_s_own_is_registered_alike(verl_losses, monkeypatch):
    """It has no sum over the k ids, and so no masses to report."""
    own(verl_losses, ClipOutlier(threshold=-2.0), monkeypatch)
    data, log_q, *_ = micro_batch("top_k", nested=True)
    loss, metrics = run_verl(verl_losses, data, torch.randn(len(log_q), V), *configs("mine"))
    assert loss.isfinite() and "distillation/label_in_topk" in metrics
    assert not [name for name in metrics if "mass" in name or "select" in name]
    assert all(math.isfinite(metric.aggregate()) for metric in metrics.values())


def test_ranks_whose_micro_batches_select_nothing(verl_losses, monkeypatch):
    """verl's own way from micro-batches to ranks to a number, which fails where ranks give
    different numbers of values: here no token of one micro-batch reaches the threshold."""
    from verl.utils.metric import Metric
    from verl.utils.py_functional import append_to_dict

    rule = replace(TrOPD(), select_by="entropy", select_threshold=2.0)
    own(verl_losses, rule, monkeypatch)
    data, log_q, *_ = micro_batch("top_k", nested=True)
    logits = torch.randn(len(log_q), V, generator=torch.Generator().manual_seed(2))
    some, none = (
        run_verl(verl_losses, data, scale * logits, *configs("mine"))[1] for scale in (2, 50)
    )
    share = some["distillation/selected_score_share"].aggregate()
    lowest = some["distillation/select_threshold"].aggregate()
    assert 0.1 < share < 0.99 and 2 < lowest < 2.5
    ranks = []
    for batches in ((some, some), (some, none)):
        metrics = {}
        for batch in batches:
            append_to_dict(metrics, batch)
        ranks.append(metrics)
    found = {name: Metric.aggregate_dp([rank[name] for rank in ranks]) for name in ranks[0]}
    assert found["distillation/selected_score_share"] == pytest.approx(share * 3 / 4)
    assert found["distillation/select_threshold"] == pytest.approx((3 * lowest + 2.0) / 4)
    for name in ("student_mass_min", "student_mass_max", "teacher_mass_min", "teacher_mass_max"):
        name = f"distillation/{name}"
        assert found[name] == some[name].aggregate(), name
    assert all(math.isfinite(value) for value in found.values())


def test_other_losses_stay_verl_s_own(verl_losses):
    data, log_q, *_ = micro_batch("top_k", nested=False)
    logits = torch.randn(len(log_q), V).requires_grad_()
    loss, metrics = run_verl(verl_losses, data, logits, *configs("forward_kl_topk"))
    assert "distillation/overlap_ratio" in metrics and "distillation/trust" not in metrics
    assert loss.isfinite()


def test_logits_that_verl_overwrites_in_its_backward_do_not_matter(verl_losses):
    """With task rewards verl takes log-probs from the same logits, by flash-attn's in-place
    backward where it is installed."""
    from verl.utils import tensordict_utils as tu

    gradients = []
    for overwritten in (False, True):
        data, log_q, *_ = micro_batch("top_k", nested=False)
        tu.assign_non_tensor(data, distillation_only=False)
        leaf = torch.randn(1, len(log_q), V, generator=torch.Generator().manual_seed(1))
        leaf.requires_grad_()
        logits = leaf * 1.0
        actor, distillation = configs("tropd", use_task_rewards=True)
        outputs = verl_losses.distillation_ppo_loss(
            actor, distillation, data=data, student_logits=logits
        )
        if overwritten:
            logits.data.fill_(1.0)
        outputs["distillation_losses"].sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_sequence_parallel_ranks_give_the_pieces_of_the_whole(verl_losses, monkeypatch):
    """Under Ulysses a rank has its share of the rows, padded to equal lengths."""
    from verl.utils import ulysses

    data, log_q, *_ = micro_batch("top_k", nested=True)
    rows = torch.randn(len(log_q), V, generator=torch.Generator().manual_seed(1))
    actor, distillation = configs("tropd")

    def outputs(logits):
        return verl_losses.distillation_ppo_loss(
            actor, distillation, data=data, student_logits=logits.unsqueeze(0)
        )

    def padded(tensor):
        return torch.cat([tensor, tensor.new_zeros(-len(tensor) % 2, *tensor.shape[1:])])

    whole, pieces = outputs(rows), []
    assert len(rows) % 2  # the last rank's share is padded
    monkeypatch.setattr(ulysses, "get_ulysses_sequence_parallel_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(
            ulysses, "slice_input_tensor",
            lambda x, dim, rank=rank: padded(x[0]).chunk(2)[rank].unsqueeze(0),
        )  # fmt: skip
        pieces.append(outputs(padded(rows).chunk(2)[rank]))
    for name, value in whole.items():
        together = torch.cat([piece[name] for piece in pieces], 1)[:, : len(rows)]
        torch.testing.assert_close(together, value)


@pytest.mark.parametrize(
    ("setting", "value"), [("use_policy_gradient", True), ("log_prob_min_clamp", -10.0)]
)
@pytest.mark.parametrize("name", ["tropd", "tropd_opd"])
def test_settings_that_would_change_the_objective_are_refused(verl_losses, name, setting, value):
    form = "top_k" if name == "tropd" else "sampled"
    data, log_q, *_ = micro_batch(form, nested=False)
    with pytest.raises(ValueError, match=f"distillation_loss.{setting}="):
        run_verl(verl_losses, data, torch.randn(len(log_q), V), *configs(name, **{setting: value}))


def test_logits_of_another_strategy_or_none_are_refused(verl_losses):
    data, log_q, *_ = micro_batch("top_k", nested=False)
    actor, distillation = configs("tropd", strategy="torchtitan")
    with pytest.raises(NotImplementedError, match="not tested with strategy='torchtitan'"):
        verl_losses.distillation_ppo_loss(
            actor, distillation, data=data, student_logits=torch.randn(1, len(log_q), V)
        )
    forward_kl_alone = {name: torch.zeros(1) for name in ("distillation_losses", "student_mass")}
    with pytest.raises(RuntimeError, match="use_fused_kernels=false"):
        verl_losses.distillation_ppo_loss(actor, distillation, forward_kl_alone, data)


def test_a_verl_with_another_plug_in_point_is_named():
    losses = SimpleNamespace(__name__="losses", compute_topk_loss=lambda logits: None)
    with pytest.raises(
        RuntimeError, match="losses.compute_topk_loss is \\(logits\\), expected .config.*verl 0.9.1"
    ):
        take_over_logits(losses)


def test_hooks_of_another_shape_are_named(verl_losses, monkeypatch):
    from tropd_kernels.integrations import verl_fused

    monkeypatch.setattr(verl_losses, "distillation_loss", lambda config, data: None)
    with pytest.raises(RuntimeError, match="losses.distillation_loss is .config, data., expected"):
        integration.register("mine", TrOPD(), "top_k")
    engine = type("Engine", (), {"forward_step": lambda self, batch: None})
    with pytest.raises(RuntimeError, match="Engine.forward_step is .self, batch., expected"):
        verl_fused.check_engine(engine)


def test_the_example_fits_verl_s_configuration(verl_losses):
    hydra = pytest.importorskip("hydra", reason="needs hydra: make engines")
    import verl
    from verl.utils.config import omega_conf_to_dataclass

    folder = Path(verl.__file__).parent / "trainer/config"
    with hydra.initialize_config_dir(str(Path(integration.__file__).parent), version_base="1.3"):
        config = hydra.compose("verl_example", [f"hydra.searchpath=[file://{folder}]"])
    distillation = omega_conf_to_dataclass(config.distillation)
    assert distillation.distillation_loss.loss_mode == "tropd"
    rule_of(distillation)
    module = config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES
    assert module == integration.__name__
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"
