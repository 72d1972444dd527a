"""The thin adapters: each framework's own classes where they are installed, gradients against its
own loss on logits that exist, in float32."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from adapters import PPO_CLIP, K, V, assert_same, gradient, make_batch
from torch import nn

from tropd_kernels import (
    GKD,
    OPD,
    LogitsTeacher,
    MaskOutlier,
    PowerOPD,
    TrOPD,
    distillation_loss,
)
from tropd_kernels.integrations import frameworks
from tropd_kernels.integrations.log_probs import row_uniforms

H = 8


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def batch(draw):
    return make_batch(draw)


def assert_drawn(losses, logits, teacher, labels, leaf):
    """Losses of the paper's gate by seed, which draws for a sequence by its labels, in any batch:
    trainers that pass no seed made the objective raise."""
    assert torch.equal(row_uniforms(0, labels)[1:], row_uniforms(0, labels[1:]))
    for seed, ours in losses.items():
        draws = dict(uniforms=row_uniforms(seed, labels))
        truth = distillation_loss(logits(), labels, LogitsTeacher(teacher), TrOPD(top_k=K), **draws)
        assert_same(ours, truth.loss, leaf)
    assert len({loss.item() for loss in losses.values()}) == len(losses)


def assert_no_effect(make, where):
    """Of a loss that is given neither a teacher's prefix nor the sampling policy's log-probs, and
    whose trainer divides the sum."""
    for objective, knob in (("opd", "prefix_weight"), ("tropd", "clip_ratio_low")):
        with pytest.raises(ValueError, match=f"{where}: {knob} has no effect here, .* given no"):
            make(objective, **{knob: 0.2})
        make(objective, **{knob: None})
    with pytest.raises(ValueError, match=f"{where}: objective 'reopold' takes its mean over"):
        make("reopold")


# --- NeMo AutoModel ---


@pytest.fixture
def nemo():
    name = "nemo_automodel.components.loss.kd_loss"
    theirs = pytest.importorskip(name, reason="needs nemo-automodel: make engines")
    from tropd_kernels.integrations import nemo_automodel

    return theirs.KDLoss, nemo_automodel.KDLoss


@pytest.mark.parametrize("count", [None, 40])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nemo_s_own_loss_is_the_forward_kl(nemo, batch, temperature, count):
    student, teacher, labels = batch
    theirs, ours = (kind(temperature=temperature) for kind in nemo)
    call = (student, teacher, labels, count)
    assert_same(ours(*call), theirs(*call), student)


def test_nemo_s_loss_takes_our_objectives_and_refuses_what_it_cannot_honour(nemo, batch):
    student, teacher, labels = batch
    ours = nemo[1](objective="jsd", beta=0.3)
    out = ours(student, teacher, labels)

    truth = distillation_loss(student, labels, LogitsTeacher(teacher), GKD(0.3))
    assert_same(out, truth.loss, student)
    nothing = torch.full_like(labels, -100)
    assert gradient(ours(student, teacher, nothing, 7), student).abs().sum() == 0
    with pytest.raises(ValueError, match="chunk_size have no effect"):
        nemo[1](chunk_size=4)
    with pytest.raises(ValueError, match="kd_loss_fn: objective 'jsd' takes no 'alpha'"):
        nemo[1](objective="jsd", alpha=1)
    assert_no_effect(lambda objective, **knobs: nemo[1](objective, **knobs), "kd_loss_fn")


def test_nemo_s_gate_is_drawn_by_the_labels(nemo, batch):
    losses = {seed: nemo[1]("tropd", seed=seed, top_k=K)(*batch) for seed in (0, 1)}
    student, teacher, labels = batch
    assert_drawn(losses, lambda: student, teacher, labels, student)


def test_nemo_s_hook_of_another_shape_is_named(nemo, monkeypatch):
    monkeypatch.setattr(nemo[0], "forward", lambda self, logits: None)
    with pytest.raises(RuntimeError, match="KDLoss.forward is .self, logits., expected .self, stu"):
        nemo[1]()


def test_nemo_s_split_vocabulary_is_taken_as_it_is(nemo, batch, group):
    """A DTensor whose last dimension is split, over one rank."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from tropd_kernels.integrations.nemo_automodel import vocabulary_group

    student, teacher, labels = batch
    mesh = DeviceMesh("cpu", [0])
    split = [DTensor.from_local(t, mesh, [Shard(2)]) for t in (student, teacher)]
    assert vocabulary_group(split[0]) is not None
    assert vocabulary_group(DTensor.from_local(teacher, mesh, [Replicate()])) is None
    theirs, ours = (kind() for kind in nemo)
    assert_same(ours(*split, labels), theirs(student, teacher, labels), student)


# --- torchtitan ---


@pytest.fixture
def titan():
    pytest.importorskip("torchtitan.components.loss", reason="needs torchtitan: make engines")
    from tropd_kernels.integrations import torchtitan

    return torchtitan


class Decoder(nn.Module):
    """Stops before its head, as torchtitan's models do for such a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lm_head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)

    def forward(self, ids):
        return torch.tanh(self.embedding(ids))


def titan_gradients(loss, model, ids, labels, **inputs):
    loss.set_lm_head(model.lm_head)
    model.zero_grad()
    value, metrics = loss(model(ids), labels, torch.tensor(9.0), **inputs)
    value.backward()
    return value.detach(), metrics, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("form", ["none", "sampled", "top_k", "hidden"])
def test_titan_s_chunked_loss_is_ours_without_logits(titan, draw, form):
    """Its own wrapper around a loss on logits, and ours in the same place."""
    from dataclasses import dataclass

    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss

    class ForwardKL(BaseLoss):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            pass

        def __init__(self, config, *, compile_config=None):
            self.fn = None

        def __call__(self, pred, labels, global_valid_tokens=None, *, log_q, **_):
            kl = (log_q.exp() * (log_q - pred.log_softmax(-1))).sum(-1)
            return kl[labels != -100].sum() / global_valid_tokens, {}

    class PPO(ForwardKL):
        """K1 as an advantage, with PPO's clip."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            pass

        def __call__(self, pred, labels, global_valid_tokens=None, *, log_q, old, **_):
            log_p = pred.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
            ratio, advantage = (log_p - old).exp(), log_q - old
            loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            return loss[labels != -100].sum() / global_valid_tokens, {}

    model, ids = Decoder(), torch.randint(V, (2, 8), generator=draw)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    hidden, weight = torch.randn(2, 8, 5, generator=draw), torch.randn(V, 5, generator=draw)
    log_q = (hidden @ weight.T).log_softmax(-1)
    top = log_q.topk(K)
    inputs, theirs = {}, {}
    label = log_q.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    if form == "sampled":
        old = torch.randn(2, 8, generator=draw) / 4 - 3
        inner, objective = PPO.Config(), dict(objective="opd", knobs=PPO_CLIP)
        theirs, inputs = dict(log_q=label, old=old), dict(label_log_probs=label, old_log_probs=old)
    elif form == "none":
        inner, objective = CrossEntropyLoss.Config(), dict(objective="sft")
    else:
        inner, objective = ForwardKL.Config(), dict(objective="forward_kl")
        theirs = dict(log_q=log_q)
        inputs = dict(teacher_hidden=hidden, teacher_weight=weight)
    if form == "top_k":
        renormalized = torch.full_like(log_q, -1e9).scatter(-1, top.indices, top.values)
        theirs = dict(log_q=renormalized.log_softmax(-1))
        objective["knobs"] = dict(top_k=K, top_k_tail="renormalize_teacher")
        inputs = dict(teacher_ids=top.indices, teacher_log_probs=top.values, label_log_probs=label)
    wrapper = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=inner).build()
    expected = titan_gradients(wrapper, model, ids, labels, **theirs)
    ours = titan.DistillationLoss.Config(**objective).build()
    assert isinstance(ours, ChunkedLossWrapper)  # for which the trainer sets the head
    found = titan_gradients(ours, model, ids, labels, positions=None, **inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(found[2], expected[2]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert set(found[1]) == {"distillation/trust/mean"}
    ChunkedLossWrapper._combine_chunk_metrics(found[1], found[1])  # a name that it can add up


def test_titan_s_hook_of_another_shape_is_named(titan, monkeypatch):
    from torchtitan.components.loss import ChunkedLossWrapper

    monkeypatch.setattr(ChunkedLossWrapper, "__call__", lambda self, logits: None)
    with pytest.raises(RuntimeError, match="ChunkedLossWrapper.__call__ is .self, logits., expect"):
        titan.DistillationLoss.Config().build()


def test_titan_s_options_that_cannot_be_honoured_are_refused(titan):
    compiled = SimpleNamespace(enable=True, components=["loss"])
    with pytest.raises(ValueError, match="compile.components"):
        titan.DistillationLoss.Config().build(compile_config=compiled)
    with pytest.raises(ValueError, match="loss.knobs: .*'beta'"):
        titan.DistillationLoss.Config(objective="tropd", knobs=dict(beta=1)).build()
    with pytest.raises(ValueError, match=r"loss.knobs: objective 'reopold' takes its mean over"):
        titan.DistillationLoss.Config(objective="reopold").build()
    knobs = dict(prefix_weight=0.1, clip_ratio_low=0.2)  # which its call may give meaning to
    titan.DistillationLoss.Config(objective="tropd", knobs=knobs).build()


def test_titan_s_mean_trust_of_selected_tokens(titan, draw):
    """Those that are left out count as the others do: it was the share that is selected."""
    ours = titan.DistillationLoss.Config(objective="entropy_opd").build()
    ours.lm_head = nn.Linear(H, V, bias=False)
    labels = torch.randint(V, (2, 8), generator=draw)
    labels[0, :3] = -100
    count, given = (labels != -100).sum(), dict(label_log_probs=-torch.ones(2, 8))
    _, metrics = ours(torch.randn(2, 8, H, generator=draw), labels, count, **given)
    assert metrics["distillation/trust/mean"] == 1


# --- ms-swift ---


@pytest.fixture
def swift():
    name = "swift.rlhf_trainers.gkd_loss"
    theirs = pytest.importorskip(name, reason="needs ms-swift: make engines")
    from tropd_kernels.integrations import ms_swift

    return theirs, ms_swift


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_swift_s_own_divergence_is_gkd(swift, batch, beta, temperature):
    theirs, adapter = swift
    student, teacher, labels = batch
    output = theirs.TeacherOutput(full_logits=teacher, labels=labels)
    call = (student, output, labels, beta, temperature)
    ours, expected = adapter.loss_of(None)(*call), theirs.gkd_loss(*call)
    assert ours[1] == expected[1] == (labels != -100).sum()
    assert_same(ours[0], expected[0], student)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0, 1])
def test_swift_s_own_divergence_on_a_teacher_s_answers(swift, batch, beta, temperature):
    theirs, adapter = swift
    student, teacher, labels = batch
    top = teacher.log_softmax(-1).topk(K)
    values = top.values.clone()
    values[1, 2] = -torch.inf  # a token that the teacher did not score
    output = theirs.TeacherOutput(topk_logprobs=values, topk_indices=top.indices, labels=labels)
    call = (student, output, labels, beta, temperature)
    ours, expected = adapter.loss_of(None)(*call), theirs.gkd_loss(*call)
    assert ours[1] == expected[1] == (labels != -100).sum() - 1
    assert_same(ours[0], expected[0], student)
    with pytest.raises(ValueError, match=r"beta=0\.5 on the teacher's top k"):
        adapter.loss_of(None)(*call[:3], 0.5, 1.0)


def test_swift_s_top_k_teacher_and_a_reward_without_a_bound(swift, batch):
    """A token outside the k has no log-prob of the teacher's: its reward was minus infinity."""
    theirs, adapter = swift
    student, teacher, labels = batch
    top = teacher.log_softmax(-1).topk(K)
    output = theirs.TeacherOutput(topk_logprobs=top.values, topk_indices=top.indices, labels=labels)
    call = (student, output, labels, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"ms-swift: .* outside the top k: take an objective with"):
        adapter.loss_of(OPD())(*call)
    for rule in (PowerOPD(), MaskOutlier(), TrOPD(top_k=K)):
        assert adapter.loss_of(rule)(*call)[0].isfinite()


def test_swift_s_fused_loss_is_the_one_on_logits(swift, draw):
    """What its trainer gives Liger's class: heads with biases, labels shifted."""
    theirs, adapter = swift
    student, teacher = (torch.randn(2, 6, H, generator=draw) for _ in range(2))
    student.requires_grad_()
    heads = [nn.Linear(H, V) for _ in range(2)]
    labels = torch.randint(V, (2, 6), generator=draw)
    labels[:, 0] = -100
    settings = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, ignore_index=-100, compiled=False)
    fused = adapter.FusedLoss(None, beta=0.5, temperature=0.7, **settings)
    ours = fused(
        student_input=student, student_weight=heads[0].weight, true_labels=labels,
        teacher_input=teacher, teacher_weight=heads[1].weight.detach(),
        student_bias=heads[0].bias, teacher_bias=heads[1].bias.detach(),
    )  # fmt: skip
    output = theirs.TeacherOutput(full_logits=heads[1](teacher).detach(), labels=labels)
    total, count = theirs.gkd_loss(heads[0](student), output, labels, 0.5, 0.7)
    assert_same(ours, total / count, student)
    with pytest.raises(ValueError, match="weight_hard_loss"):
        adapter.FusedLoss(None, weight_hard_loss=0.5)
    with pytest.raises(ValueError, match="compiled of Liger's loss"):
        adapter.FusedLoss(None, compiled=True)


def test_swift_s_gates_are_drawn_by_the_labels(swift, batch, draw):
    theirs, adapter = swift
    student, teacher, labels = batch
    output = theirs.TeacherOutput(full_logits=teacher, labels=labels)
    losses = {}
    for seed in (0, 1):
        total, count = adapter.loss_of(TrOPD(top_k=K), seed)(student, output, labels, 0.5, 1.0)
        losses[seed] = total / count
    assert_drawn(losses, lambda: student, teacher, labels, student)
    hidden = torch.randn(*labels.shape, H, generator=draw).requires_grad_()
    weight, identity = torch.randn(V, H, generator=draw), torch.eye(V)
    heads = dict(student_weight=weight, teacher_weight=identity)
    call = dict(student_input=hidden, teacher_input=teacher, true_labels=labels, **heads)
    losses = {seed: adapter.FusedLoss(TrOPD(top_k=K), seed)(**call) for seed in (0, 1)}
    assert_drawn(losses, lambda: hidden @ weight.T, teacher, labels, hidden)


def test_swift_s_trainer_takes_both(swift, monkeypatch):
    """In a double of its trainer's module, which wants another TRL than this one; its function is
    its own."""
    theirs, adapter = swift
    double = ModuleType("gkd_trainer")
    double.gkd_loss, double._liger_kernel_available = theirs.gkd_loss, False
    monkeypatch.setitem(sys.modules, "swift.rlhf_trainers.gkd_trainer", double)
    monkeypatch.setattr(sys.modules["swift.rlhf_trainers"], "gkd_trainer", double, raising=False)
    install = lambda objective, **knobs: adapter.rule_of(objective, knobs)
    assert_no_effect(install, "ms_swift.install")
    adapter.install("jsd", seed=5, beta=0.3)
    assert double._liger_kernel_available and double.gkd_loss is not theirs.gkd_loss
    fused = double.LigerFusedLinearJSDLoss(beta=0.5, temperature=1.0)
    assert (fused.rule, fused.seed) == double.gkd_loss.args == (GKD(0.3), 5)
    with pytest.raises(RuntimeError, match="has an objective from an earlier call"):
        adapter.install("reverse_kl")  # of which the one name took, and not the other
    double.gkd_loss = lambda logits: None
    with pytest.raises(RuntimeError, match="gkd_loss is .logits., expected .student_logits"):
        adapter.install()


# --- slime and miles ---


@pytest.fixture
def megatron(monkeypatch, group):
    """A double of Megatron's parallel state, with a tensor-parallel group of this process."""
    mpu = ModuleType("megatron.core.mpu")
    mpu.get_context_parallel_world_size = lambda: 1
    mpu.get_tensor_model_parallel_group = lambda: group
    core = ModuleType("megatron.core")
    core.mpu = mpu
    for name, module in (("megatron", ModuleType("megatron")), ("megatron.core", core)):
        monkeypatch.setitem(sys.modules, name, module)
    return mpu


@pytest.mark.parametrize("miles", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_slime_s_policy_loss_is_opd_on_its_logits(megatron, draw, own, miles):
    """A double of its step: packed samples, temperature, a mean of each sample, PPO's clip. miles
    gives the teacher's log-probs of prompts, too."""
    from tropd_kernels.integrations import slime

    totals, lengths = [6, 4, 5], [4, 1, 3]
    logits = torch.randn(1, sum(totals) + 2, V, generator=draw).mul_(2).requires_grad_()  # padded
    ids = [torch.randint(V, (n,), generator=draw) for n in totals]
    sampled = [-2 * torch.rand(n, generator=draw) - 2 for n in lengths]
    teacher = [-3 * torch.rand(n, generator=draw) - 1 for n in lengths]
    masks = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1])
    args = SimpleNamespace(rollout_temperature=0.8, use_rollout_logprobs=own, tropd_knobs=PPO_CLIP)
    key = "rollout_log_probs" if own else "log_probs"
    batch = {"unconcat_tokens": ids, "total_lengths": totals, "response_lengths": lengths,
             "teacher_log_probs": teacher, key: sampled}  # fmt: skip
    if miles:
        prompts = [torch.zeros(total - length) for total, length in zip(totals, lengths)]
        batch["teacher_log_probs"] = [torch.cat(pair) for pair in zip(prompts, teacher)]

    def mean(values):
        parts = (values * masks).split(lengths)
        return sum(p.sum() / m.sum() for p, m in zip(parts, masks.split(lengths)))

    ours, metrics = slime.loss(args, batch, logits, mean)
    log_probs, start = [], 0
    for sample, total, length in zip(ids, totals, lengths):
        rows = logits[0, start + total - length - 1 : start + total - 1] / 0.8
        picked = rows.log_softmax(-1).gather(-1, sample[-length:, None])[:, 0]
        log_probs.append(picked)
        start += total
    log_probs, old, reference = (torch.cat(t) for t in (log_probs, sampled, teacher))
    ratio, advantage = (log_probs - old).exp(), reference - old
    theirs = mean(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    assert_same(ours, theirs, logits)
    assert metrics["trust"] == len(totals)  # 1 of each sample


def test_slime_s_batch_without_a_teacher_and_split_samples_are_refused(megatron):
    from tropd_kernels.integrations import slime

    args = SimpleNamespace(rollout_temperature=1.0, use_rollout_logprobs=False)
    with pytest.raises(ValueError, match="no teacher_log_probs"):
        slime.loss(args, {}, torch.zeros(1, 2, V), None)
    args.use_tis, args.entropy_coef = True, 0.0
    with pytest.raises(ValueError, match="--use-tis is read by slime's own loss"):
        slime.loss(args, {}, torch.zeros(1, 2, V), None)
    args.use_tis = False
    megatron.get_context_parallel_world_size = lambda: 2
    with pytest.raises(NotImplementedError, match="context parallelism"):
        slime.loss(args, {}, torch.zeros(1, 2, V), None)
    args.tropd_objective = "tropd"
    with pytest.raises(ValueError, match="slime: .*cannot be served"):
        slime.loss(args, {}, torch.zeros(1, 2, V), None)


# --- the table ---


def test_the_tested_versions_are_those_of_this_environment():
    """What `make engines` installs; elsewhere nothing is installed, and nothing is compared."""
    installed = {n: f.installed for n, f in frameworks.FRAMEWORKS.items() if f.installed}
    assert installed == {name: frameworks.FRAMEWORKS[name].tested for name in installed}
    if "verl" in installed:
        assert len(installed) == sum(bool(f.distribution) for f in frameworks.FRAMEWORKS.values())
