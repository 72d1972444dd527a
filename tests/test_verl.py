"""verl's distillation losses: on plain tensors against the reference, and through the installed
verl's own engine code."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import K, make_problem

from tropd_kernels import (
    AOPD,
    EOPD,
    GKD,
    MOPD,
    OPD,
    REOPOLD,
    ClipOutlier,
    Divergence,
    EntropyOPD,
    MaskOutlier,
    SampledTeacher,
    TokenRule,
    TopKJSD,
    TopKTeacher,
    TrOPD,
    distillation_loss,
)
from tropd_kernels.draws import bernoulli_uniforms, philox4x32
from tropd_kernels.integrations import verl as integration

SAMPLED = {
    "opd": OPD(),
    "opd_ppo": OPD(kl_penalty_coef=0.7, clip_ratio_low=0.2, clip_ratio_high=0.2),
    "entropy_bonus": OPD(entropy_coef=0.05),
    "clip_outlier": ClipOutlier(),
    "mask_outlier": MaskOutlier(),
    "mask": TrOPD(outlier="mask"),
    "expected": TrOPD(gate="expected", outlier="mask"),
    "clip": TrOPD(gate="expected", outlier="clip"),
    "entropy_opd": EntropyOPD(top_fraction=0.4),
    "nll": TokenRule(nll_weight=0.3),
}
TOP_K = {
    "tropd": TrOPD(top_k=3),
    "bucket": TrOPD(gate="expected", top_k_tail="bucket"),
    "reward": TrOPD(outlier="forward_kl_reward"),
    "clip": TrOPD(outlier="clip"),
    "aopd": AOPD(),
    "forward_kl": Divergence("forward_kl", top_k=1000),
    "mopd": MOPD(),
    "topk_jsd": TopKJSD(),
}


# --- on plain tensors --------------------------------------------------------------------------


def logits_and_teacher(tokens=24, vocab_size=37):
    """float64: logits (leaf), labels, teacher's log-probs (N, V), uniforms, old log-probs. The odd
    labels are among the teacher's likeliest ids, some of the others are not."""
    problem = make_problem(tokens=tokens, vocab_size=vocab_size)
    logits = (problem.hidden @ problem.weight.T).requires_grad_()
    log_q = problem.teacher_logits().log_softmax(-1)
    labels = problem.labels.clone()
    labels[1::2] = log_q[1::2].topk(3).indices[:, 2]
    draw = torch.Generator().manual_seed(3)
    drift = torch.rand(tokens, generator=draw, dtype=torch.float64) - 0.5
    old = logits.detach().log_softmax(-1).gather(-1, labels[:, None])[:, 0] + drift
    return logits, labels, log_q, problem.options["uniforms"].double(), old


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_loss_from_log_probs_is_the_reference_s(name):
    logits, labels, log_q, uniforms, old = logits_and_teacher()
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[::5] = False
    lq = log_q.gather(-1, labels[:, None])[:, 0]
    lq[3] = -math.inf if SAMPLED[name].gate != "always" else lq[3]

    truth = distillation_loss(
        logits, labels.where(counted, -100), SampledTeacher(lq), SAMPLED[name], uniforms=uniforms,
        old_log_probs=old, reduction="none", backend="reference",
    )  # fmt: skip
    (expected,) = torch.autograd.grad(truth.loss.sum(), logits)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    lp = log_p.gather(-1, labels[:, None])[:, 0]
    lq[::5] = -math.inf  # whatever stands at tokens that do not count
    losses, trust = integration.sampled_losses(
        lp, lq, counted, SAMPLED[name], old_log_probs=old, entropy=entropy, uniforms=uniforms
    )
    (found,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses, truth.loss)
    torch.testing.assert_close(trust, truth.stats.trust)
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0


def test_a_rule_that_reads_the_entropy_asks_for_it():
    some = torch.zeros(3)
    with pytest.raises(ValueError, match="calculate_entropy=true"):
        integration.sampled_losses(some, some, some == 0, EntropyOPD())


@pytest.mark.parametrize("name", TOP_K)
def test_a_top_k_loss_is_the_reference_s_with_labels_outside_k_ruled_out(name):
    logits, labels, log_q, uniforms, old = logits_and_teacher()
    labels[::5] = -100
    top = log_q.topk(K)
    inside = (top.indices == labels[:, None]).any(-1)
    outside = ((labels >= 0) & ~inside).nonzero()[:, 0]
    assert inside.any() and len(outside) > 1
    old[outside[0]] = -35.0  # not even the unlikeliest token is one that the teacher accepts
    lq = log_q.gather(-1, labels.clamp_min(0)[:, None])[:, 0].where(inside, -math.inf)
    rule = TOP_K[name]
    if rule.top_k is not None:
        rule = TokenRule(**{f: getattr(rule, f) for f in RULE_FIELDS} | {"top_k": K})
    truth = distillation_loss(
        logits, labels, TopKTeacher(top.indices, top.values, lq), rule, uniforms=uniforms,
        old_log_probs=old, reduction="none", backend="reference",
    )  # fmt: skip
    assert truth.loss.isfinite().all()
    (expected,) = torch.autograd.grad(truth.loss.sum(), logits)
    for backend in ("reference", "torch", "triton", None):
        dtype = torch.float64 if backend == "reference" else torch.float32
        leaf = logits.detach().to(dtype).requires_grad_()
        found = integration.top_k_losses(
            leaf, labels, top.values.to(dtype), top.indices.int(), TOP_K[name],
            old_log_probs=old.to(dtype), uniforms=uniforms.to(dtype), backend=backend,
        )  # fmt: skip
        losses = found["distillation_losses"]
        losses.sum().backward()
        close = {} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
        torch.testing.assert_close(losses.double(), truth.loss, **close)
        torch.testing.assert_close(leaf.grad.double(), expected, **close)
        assert torch.equal(found["tropd_label_in_topk"] > 0, inside)
        if rule.uses_sums:
            mass = found["teacher_mass"].double()
            torch.testing.assert_close(mass, truth.stats.teacher_topk_mass)


RULE_FIELDS = [
    name for name in TokenRule.__dataclass_fields__ if TokenRule.__dataclass_fields__[name].init
]


def test_the_gate_errs_on_no_more_than_the_teacher_s_tail():
    """The bound of the module's docstring: sum over ids outside k of p min(q/p, 1) <= 1 - mass."""
    logits, _, log_q, _, _ = logits_and_teacher()
    p, q = logits.detach().softmax(-1), log_q.exp()
    outside = torch.ones_like(q, dtype=torch.bool).scatter(-1, log_q.topk(K).indices, False)
    wrong = torch.where(outside, torch.minimum(p, q), 0.0).sum(-1)
    tail = torch.where(outside, q, 0.0).sum(-1)
    assert (wrong <= tail + 1e-12).all() and wrong.max() > 0


def test_draws_depend_on_the_sequence_alone():
    one, two = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 9])

    def draws(*sequences, seed=1):
        offsets = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
        return integration.token_uniforms(seed, torch.cat(sequences), offsets)

    packed = draws(one, two)
    assert packed.dtype == torch.float32 and packed.shape == (7,)
    assert torch.equal(packed, torch.cat([draws(one), draws(two)]))
    assert torch.equal(draws(two, one), torch.cat([draws(two), draws(one)]))
    # Not the prefix alone names a sequence, nor the multiset of its ids.
    assert not torch.equal(packed[:2], packed[4:6])
    assert not torch.equal(draws(torch.tensor([6, 5, 7, 8]))[2:], packed[2:4])
    assert not torch.equal(draws(one, seed=2), draws(one))
    # Named by the whole sequence, and placed at the token that the row is about.
    zero = torch.zeros(3, dtype=torch.int64)
    words = philox4x32((torch.arange(3), two, zero, zero), (zero, zero))
    name = (words[0].sum() % 2**31) + (words[1].sum() % 2**31) * 2**31
    by_hand = bernoulli_uniforms(1, 0, name.expand(3), torch.arange(1, 4))
    assert torch.equal(draws(two), by_hand)
    many = draws(torch.arange(4000))
    assert abs(float(many.mean()) - 0.5) < 0.03 and many.unique().numel() > 3990


@pytest.mark.parametrize(
    ("rule", "teacher", "why"),
    [
        (GKD(), "top_k", "whole distribution"),
        (TrOPD(top_k=None), "top_k", "whole distribution"),
        (TrOPD(), "sampled", "teacher='top_k'"),
        (MOPD(), "sampled", "teacher='top_k'"),
        (EOPD(), "top_k", "outside the top k"),
        (OPD(), "top_k", "teacher='sampled'"),
        (REOPOLD(), "sampled", "mean is over the tokens kept"),
        (OPD(), "dense", "'sampled' or 'top_k'"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(rule, teacher, why):
    with pytest.raises(ValueError, match=why):
        integration.check_rule("mine", rule, teacher)


def test_every_name_can_be_served():
    for teacher, rules in (("sampled", integration.SAMPLED), ("top_k", integration.TOP_K)):
        for name, rule in rules.items():
            integration.check_rule(name, rule, teacher)
            assert name.startswith("tropd")


# --- through the installed verl ----------------------------------------------------------------

PROMPTS, RESPONSES, V = (3, 2, 4), (25, 1, 30), 29


@pytest.fixture
def verl_losses():
    pytest.importorskip("verl")
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
        rule = TokenRule(**{f: getattr(rule, f) for f in RULE_FIELDS} | {"top_k": K})
        assert 0 < hit.any(-1).sum() < (labels >= 0).sum()
    leaf = logits.detach().double().requires_grad_()
    offsets = data["input_ids"].offsets()
    truth = distillation_loss(
        leaf, labels, teacher, rule, old_log_probs=old_flat, backend="reference",
        uniforms=integration.token_uniforms(7, ids, offsets),
    )  # fmt: skip
    truth.loss.backward()
    assert (labels >= 0).sum() == mask.sum()
    if rule.gate == "bernoulli":  # the draws decide
        assert 0 < truth.stats.trust[hit.any(-1)].mean() < 1
    torch.testing.assert_close(loss.double(), truth.loss.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)
    trust = metrics["distillation/trust"].aggregate()
    assert trust == pytest.approx(float(truth.stats.trust[labels >= 0].mean()), rel=1e-6)


def test_a_rule_of_one_s_own_is_registered_alike(verl_losses, monkeypatch):
    """It has no sum over the k ids, and so no masses to report."""
    for registry in (verl_losses.DISTILLATION_LOSS_REGISTRY, integration.RULES):
        monkeypatch.setitem(registry, "mine", None)
        monkeypatch.delitem(registry, "mine")  # undone at the end, and with it the registration
    integration.register("mine", ClipOutlier(threshold=-2.0), "top_k")
    data, log_q, *_ = micro_batch("top_k", nested=True)
    loss, metrics = run_verl(verl_losses, data, torch.randn(len(log_q), V), *configs("mine"))
    assert loss.isfinite() and "distillation/label_in_topk" in metrics
    assert all(math.isfinite(metric.aggregate()) for metric in metrics.values())


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


def test_logits_in_pieces_or_none_are_refused(verl_losses):
    data, log_q, *_ = micro_batch("top_k", nested=False)
    actor, distillation = configs("tropd", strategy="megatron")
    with pytest.raises(NotImplementedError, match="whole rows of logits"):
        verl_losses.distillation_ppo_loss(
            actor, distillation, data=data, student_logits=torch.randn(1, len(log_q), V)
        )
    forward_kl_alone = {name: torch.zeros(1) for name in ("distillation_losses", "student_mass")}
    with pytest.raises(RuntimeError, match="use_fused_kernels=false"):
        verl_losses.distillation_ppo_loss(actor, distillation, forward_kl_alone, data)


def test_a_verl_with_another_plug_in_point_is_named():
    losses = SimpleNamespace(compute_topk_loss=lambda logits: None)
    with pytest.raises(RuntimeError, match="otherwise than verl 0.9"):
        integration._take_over_logits(losses)


def test_the_example_fits_verl_s_configuration(verl_losses):
    hydra = pytest.importorskip("hydra")
    import verl
    from verl.utils.config import omega_conf_to_dataclass

    folder = Path(verl.__file__).parent / "trainer/config"
    with hydra.initialize_config_dir(str(Path(integration.__file__).parent), version_base="1.3"):
        config = hydra.compose("verl_example", [f"hydra.searchpath=[file://{folder}]"])
    distillation = omega_conf_to_dataclass(config.distillation)
    assert distillation.distillation_loss.loss_mode == "tropd"
    integration._rule_of(distillation)
    module = config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES
    assert module == integration.__name__
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"
