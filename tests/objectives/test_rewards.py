"""The policy gradient's reward: transforms, clips, policies, the task's advantages, their filter.
Against the reference, against numbers made by hand, and at their ends."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from pairs import covering
from problems import K, loss_and_gradient, make_problem, relative_error, with_everything

from tropd_kernels import (
    KDRL,
    OPD,
    TOPD,
    TVOPD,
    Divergence,
    Log1pOPD,
    LogitsTeacher,
    PowerOPD,
    SampledTeacher,
    TokenRule,
    TopKJSD,
    TrOPD,
    distillation_loss,
)
from tropd_kernels.objectives import GATES, OUTLIERS, REWARDS
from tropd_kernels.objectives.rewards import REWARD_FILTERS
from tropd_kernels.objectives.rule_fields import STATIC_THRESHOLD

FAST = ("torch", "native", "triton")
BACKENDS = ("reference", *FAST)
backends = pytest.mark.parametrize("backend", BACKENDS)

PARAMETERS = {"power": (5.0, 0.5), "proximal": (0.4, 1.0), "tanh": (None, 2.0)}
TRANSFORMS = [(name, a) for name in REWARDS for a in PARAMETERS.get(name, (None,))]
#: What shapes the reward besides its transform.
SHAPES = {
    "plain": {},
    "clipped": dict(clip_reward_low=-0.7, clip_reward_high=0.2),
    "current": dict(reward_policy="current", clip_ratio_low=0.2, clip_ratio_high=0.3),
    "task": dict(task_weight=0.6, clip_ratio_low=0.2, clip_ratio_high=0.3),
    "positive": dict(reward_filter="positive"),
    "negative": dict(reward_filter="negative", task_weight=-1.5, clip_reward_high=0.1),
    "agree": dict(reward_filter="agree", task_weight=0.2, clip_reward_low=-0.7),
    "target": dict(teacher_power=0.7, student_power=0.4, task_weight=0.3),  # dense teachers only
}


def cases():
    """Every two values meet."""
    forms = ("hidden", "top_k", "sampled")
    every = [
        each
        for each in product(TRANSFORMS, GATES, OUTLIERS, forms, SHAPES, (None, 0.3), FAST)
        if (each[1] != "always" or each[2] == "mask")
        and (each[3] != "sampled" or not each[2].startswith("forward_kl"))
        and (each[3] == "hidden" or each[4] != "target")
    ]
    return [every[i] for i in covering(every)]


def shaped(transform, shape="plain", **more):
    reward, parameter = transform
    return TokenRule(reward=reward, reward_parameter=parameter, **SHAPES[shape], **more)


def with_task(problem):
    n, device = problem.labels.shape[0], problem.labels.device
    task = torch.linspace(-1.5, 2.0, n, dtype=torch.float64, device=device)
    problem.options["task_advantages"] = task.roll(2)
    return problem


@pytest.mark.parametrize(
    ("transform", "gate", "outlier", "form", "shape", "prefix_weight", "backend"), cases()
)
def test_every_reward_against_the_reference(
    transform, gate, outlier, form, shape, prefix_weight, backend, device
):
    on_k = {"top_k": K} if outlier.startswith("forward_kl") else {}
    rule = shaped(transform, shape, gate=gate, outlier=outlier, prefix_weight=prefix_weight, **on_k)
    problem = with_everything(make_problem(tokens=9, device=device))
    if rule.uses_task_advantages:
        with_task(problem)
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        setattr(problem, name, getattr(problem, name).float().double())
    loss, gradients, stats = problem.call(rule, form, "reference", torch.float64)
    ours, found, our_stats = problem.call(rule, form, backend)
    assert relative_error(ours, loss) <= 1e-5
    for name, gradient in gradients.items():
        assert relative_error(found[name], gradient) <= 1e-5, name
    for name in ("reward", "trust", "kept", "token_loss"):
        mine, theirs = getattr(our_stats, name), getattr(stats, name)
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-4, atol=2e-4, msg=name)


# --- by hand ------------------------------------------------------------------------------------

#: T at q/p = 2 and at q/p = 1/2 for the probabilities 1/4 and 1/2: 2^-5 - 2^-10, log(0.4 * 2 +
#: 0.6), log(0.4 / 2 + 0.6), log(1 + log 2), (2 - 1/2) / (2 + 1/2), and (2 - 1) / (2 + 1).
BY_HAND = {
    ("log_ratio", None): (0.6931471806, -0.6931471806),
    ("power", 5.0): (0.0302734375, -0.0302734375),
    ("power", 0.5): (0.2071067812, -0.2071067812),
    ("proximal", 0.4): (0.3364722366, -0.2231435513),
    ("proximal", 1.0): (0.6931471806, -0.6931471806),
    ("log1p", None): (0.5265890341, -0.5265890341),
    ("tanh", None): (0.6, -0.6),
    ("tanh", 2.0): (0.3333333333, -0.3333333333),
    ("sign", None): (1.0, -1.0),
}


def two_tokens(device, dtype=torch.float64):
    """Logits of student and teacher: p(y) is 1/4 and 1/2, q(y) 1/2 and 1/4."""
    low = torch.tensor([1 / 4, 1 / 2, 1 / 4], dtype=dtype, device=device).log()
    high = torch.tensor([1 / 2, 1 / 4, 1 / 4], dtype=dtype, device=device).log()
    return torch.stack([low, high]), torch.stack([high, low]), torch.tensor([0, 0], device=device)


@backends
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_by_hand(transform, backend, device):
    """Sources: the table of `objectives.rewards`. The gradient of -R rho is -R (1[y] - p)."""
    z, t, labels = two_tokens(device)
    loss, gradient, stats = loss_and_gradient(
        z, labels, LogitsTeacher(t), shaped(transform), backend, reduction="none"
    )
    exact = torch.tensor(BY_HAND[transform], dtype=torch.float64, device=device)
    torch.testing.assert_close(stats.reward, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, -exact, rtol=1e-9, atol=0)
    one_hot = torch.eye(3, dtype=torch.float64, device=device)[0]
    torch.testing.assert_close(gradient, -exact[:, None] * (one_hot - z.exp()), rtol=1e-9, atol=0)


@backends
def test_clips_of_the_reward_by_hand(backend, device):
    z, t, labels = two_tokens(device)
    teacher = LogitsTeacher(t)
    rule = TokenRule(clip_reward_low=-0.25, clip_reward_high=0.5)
    loss, _, stats = loss_and_gradient(z, labels, teacher, rule, backend, reduction="none")
    assert stats.reward.tolist() == [0.5, -0.25] and loss.tolist() == [-0.5, 0.25]
    # The caller's advantages are clipped, and not transformed.
    rule = TokenRule(reward="sign", clip_reward_low=-0.25)
    given = torch.tensor([0.75, -2.0], dtype=torch.float64, device=device)
    loss, _, stats = loss_and_gradient(
        z, labels, teacher, rule, backend, reduction="none", advantages=given
    )
    assert stats.reward.tolist() == [0.75, -0.25] and loss.tolist() == [-0.75, 0.25]


@backends
def test_a_static_gate_compares_the_callers_advantages_before_the_clip(backend, device):
    z, t, labels = two_tokens(device)
    rule = TokenRule(reward="sign", gate="threshold", threshold=-0.5, clip_reward_low=-0.25)
    given = torch.tensor([-1.0, 0.75], dtype=torch.float64, device=device)  # R0 is log 2, -log 2
    stats = distillation_loss(
        z, labels, LogitsTeacher(t), rule, backend=backend, advantages=given
    ).stats
    assert stats.trust.tolist() == [0, 1] and stats.reward.tolist() == [-0.25, 0.75]


@backends
def test_the_current_policys_reward(backend, device):
    """AsyncOPD: R0 = lq - sg(lp), while rho and the acceptance go on to read lo."""
    z, t, labels = two_tokens(device)
    old = torch.tensor([1 / 2, 1 / 8], dtype=torch.float64, device=device).log()
    rule = TokenRule(reward_policy="current", gate="expected")
    loss, _, stats = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule, backend, reduction="none", old_log_probs=old
    )
    ln2 = math.log(2)
    torch.testing.assert_close(stats.reward, loss.new_tensor([ln2, -ln2]))
    torch.testing.assert_close(stats.trust, loss.new_tensor([1.0, 1.0]))
    torch.testing.assert_close(loss, loss.new_tensor([-0.5 * ln2, 4 * ln2]))
    # A transform takes the p that R0 does: T of q = 1/2 and 1/4 beside lo, and beside lp.
    for policy, exact in (("old", [0, 2**-10 - 2**-15]), ("current", [2**-5 - 2**-10] * 2)):
        power = replace(rule, reward="power", reward_parameter=5.0, reward_policy=policy)
        stats = distillation_loss(
            z, labels, LogitsTeacher(t), power, backend=backend, old_log_probs=old
        ).stats
        signs = loss.new_tensor([1, -1]) if policy == "current" else 1
        torch.testing.assert_close(stats.reward, signs * loss.new_tensor(exact))
    # A static gate compares the same R0: here lq - lo would be 0 and log 2.
    rule = replace(rule, gate="threshold", threshold=-0.5)
    stats = distillation_loss(
        z, labels, LogitsTeacher(t), rule, backend=backend, old_log_probs=old
    ).stats
    assert stats.trust.tolist() == [1, 0]


def test_the_named_objectives_are_their_papers():
    """Fields by hand (their defaults: `test_presets`); A + beta R at beta 0.004 in KDRL."""
    task = TokenRule(policy_gradient=0.004, task_weight=250.0, reward_filter="negative")
    assert replace(PowerOPD(), prefix_weight=None) == shaped(("power", 5.0))
    open_clip = dict(clip_ratio_low=None, clip_ratio_high=None, prefix_weight=None)
    assert TOPD(alpha=0.3, **open_clip) == shaped(("proximal", 0.3))
    assert Log1pOPD(prefix_weight=None) == shaped(("log1p", None))
    assert TVOPD(scale=0.1, prefix_weight=None) == shaped(("sign", None), policy_gradient=0.1)
    named = KDRL(
        task_weight=250.0, kl_penalty_coef=0.004, reward_filter="negative", prefix_weight=None
    )
    assert named == task
    assert PowerOPD().prefix_weight == OPD().prefix_weight


@backends
def test_tv_opd_expects_the_gradient_of_the_total_variation(backend, device):
    """Its reward's source: sum_y p(y) of the gradients with label y is 2 scale times TV's."""
    z, t = torch.randn(2, 6, dtype=torch.float64, device=device)
    rows = lambda row: row.expand(6, 6).contiguous()  # every id is one token's label
    labels, teacher = torch.arange(6, device=device), LogitsTeacher(rows(t))
    _, sampled, _ = loss_and_gradient(
        rows(z), labels, teacher, TVOPD(scale=0.5), backend, token_weight=z.softmax(-1),
        reduction="sum",
    )  # fmt: skip
    _, exact, _ = loss_and_gradient(
        rows(z), labels, teacher, Divergence("total_variation"), backend, reduction="mean"
    )
    torch.testing.assert_close(sampled.sum(0), exact.sum(0), rtol=1e-9, atol=1e-12)


# --- what stays ---------------------------------------------------------------------------------


def same_bits(problem, form, backend, rule, neutral, **more):
    loss, gradients, stats = problem.call(rule, form, backend)
    ours, found, our_stats = problem.call(neutral, form, backend, **more)
    assert torch.equal(ours, loss)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name
    for name, value in vars(stats).items():
        mine = getattr(our_stats, name)
        assert mine is value or torch.equal(mine.nan_to_num(), value.nan_to_num()), name


@pytest.mark.pairs
@backends
@pytest.mark.parametrize(
    ("gate", "outlier"), [("always", "mask"), *product(GATES[1:], ["clip", "forward_kl"])]
)
def test_neutral_settings_change_no_bit(gate, outlier, backend, device):
    problem = with_everything(make_problem(tokens=6, vocab_size=23, device=device))
    top_k = K if outlier == "forward_kl" else None
    rule = TokenRule(gate=gate, outlier=outlier, top_k=top_k, prefix_weight=0.01)
    one, n = torch.ones(6, dtype=torch.float64, device=device), 1e30
    same_bits(
        problem, "hidden", backend, rule, replace(rule, reward="proximal", reward_parameter=1.0)
    )
    same_bits(
        problem, "hidden", backend, rule, replace(rule, clip_reward_low=-n, clip_reward_high=n)
    )
    bounded = replace(rule, reward="tanh")
    same_bits(problem, "hidden", backend, bounded, replace(bounded, reward_parameter=1.0))
    keep = replace(rule, reward_filter="positive")
    same_bits(problem, "hidden", backend, rule, keep, task_advantages=one)
    zero = replace(rule, task_weight=1.0)
    same_bits(problem, "hidden", backend, rule, zero, task_advantages=0 * one)
    problem.options["old_log_probs"] = None  # the sample is the student's own
    same_bits(problem, "hidden", backend, rule, replace(rule, reward_policy="current"))


@backends
def test_top_k_jsd_has_the_proximal_reward(backend, device):
    """... to the bit, also for another policy, and its static gate compares that reward."""
    problem = with_everything(make_problem(device=device))
    for policy in ("old", "current"):
        rule = replace(TopKJSD(top_k=K, beta=0.3), reward_policy=policy)
        proximal = TokenRule(reward="proximal", reward_parameter=0.3, reward_policy=policy)
        mixed, alone = (problem.call(r, "hidden", backend)[2] for r in (rule, proximal))
        assert torch.equal(mixed.reward, alone.reward)
        gated = replace(rule, gate="threshold", threshold=-0.2)
        stats = problem.call(gated, "hidden", backend)[2]
        counts = (problem.labels >= 0) & (problem.options["token_weight"] != 0)
        assert torch.equal(stats.trust.bool()[counts], (stats.reward > -0.2)[counts])
        assert 0 < stats.trust.sum() < counts.sum()


@backends
@pytest.mark.parametrize("gate", ["bernoulli", "expected", "threshold"])
def test_no_gate_sees_the_transform(gate, backend, device):
    """A static gate at -0.5 nats would reject no reward of PowerOPD."""
    problem = with_everything(make_problem(device=device))
    rule = TokenRule(gate=gate, threshold=-0.5 if gate == "threshold" else STATIC_THRESHOLD)
    plain = problem.call(rule, "sampled", backend)[2]
    assert 0 < plain.trust.sum() < problem.labels.shape[0]
    for reward, parameter in TRANSFORMS:
        other = replace(rule, reward=reward, reward_parameter=parameter, clip_reward_low=-0.1)
        assert torch.equal(problem.call(other, "sampled", backend)[2].trust, plain.trust)


# --- infinities ---------------------------------------------------------------------------------

#: T where only the teacher excludes the token, p = 1/4; and where only the student does, q = 1/4.
ENDS = {
    ("log_ratio", None): (-math.inf, math.inf),
    ("power", 5.0): (-(2.0**-10), 2.0**-10),
    ("power", 0.5): (-0.5, 0.5),
    ("proximal", 0.4): (math.log(0.6), math.inf),
    ("proximal", 1.0): (-math.inf, math.inf),
    ("log1p", None): (-math.inf, math.inf),
    ("tanh", None): (-1.0, 1.0),
    ("tanh", 2.0): (-1.0, 1.0),
    ("sign", None): (-1.0, 1.0),
}


@backends
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tokens_that_a_side_excludes(transform, backend, device):
    """A bounded transform makes the reward finite, with a gradient. One that both exclude is
    undefined, but for the power, 0 - 0."""
    z, t = (torch.zeros(4, 4, device=device) for _ in "zt")
    quarter = torch.zeros(4, device=device)
    t[0], z[1] = (torch.tensor([-math.inf, 0, 0, 0], device=device) for _ in "tz")
    t[2, 0] = z[2, 0] = -math.inf
    t[1], z[0] = quarter, quarter
    labels = torch.zeros(4, dtype=torch.long, device=device)
    loss, gradient, stats = loss_and_gradient(
        z, labels, LogitsTeacher(t), shaped(transform), backend, reduction="none"
    )
    ends = torch.tensor(ENDS[transform], device=device)
    torch.testing.assert_close(stats.reward[:2], ends)
    torch.testing.assert_close(loss[:2], -ends)
    assert gradient[:2].isfinite().all()
    assert gradient[0].any() == ends[0].isfinite() and stats.reward[3] == 0
    if transform[0] == "power":
        assert stats.reward[2] == 0
    else:
        assert stats.reward[2].isnan()


@backends
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_not_a_number_says_so(transform, backend, device):
    z, t = torch.randn(2, 2, 5, device=device)
    t[1, 2] = math.nan
    label = torch.tensor([1, 1], device=device)
    rule = shaped(transform, clip_reward_low=-1.0, clip_reward_high=1.0)
    loss, _, stats = loss_and_gradient(z, label, LogitsTeacher(t), rule, backend, reduction="none")
    assert stats.reward.isnan().tolist() == loss.isnan().tolist() == [False, True]


@backends
def test_a_clip_or_a_filter_bounds_an_infinite_reward(backend, device):
    z, t, labels = two_tokens(device)
    t[0] = torch.tensor([-math.inf, 0, 0], dtype=torch.float64, device=device)
    teacher = LogitsTeacher(t)

    def run(rule, **more):
        return loss_and_gradient(z, labels, teacher, rule, backend, reduction="none", **more)

    loss, gradient, _ = run(TokenRule(clip_reward_low=-4.0))
    assert loss[0] == 4 and gradient[0].any()
    task = torch.tensor([2.0, 2.0], dtype=torch.float64, device=device)
    rule = TokenRule(reward_filter="negative", task_weight=1.0)
    loss, gradient, stats = run(rule, task_advantages=task)
    assert stats.reward[0] == -math.inf and loss[0] == -2 and gradient[0].any()
    # Rejected, it leaves the task's advantage; trusted, it is infinite all the same.
    rule = replace(TrOPD(outlier="mask"), task_weight=1.0)
    uniforms = torch.zeros(2, dtype=torch.float64, device=device)
    loss, gradient, _ = run(rule, task_advantages=task, uniforms=uniforms)
    assert loss[0] == -2 and gradient[0].any()
    loss, gradient, _ = run(replace(OPD(), task_weight=1.0), task_advantages=task)
    assert loss[0] == math.inf and not gradient[0].any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(transform, backend, device):
    """Finite differences: with lo given, R is a constant of the student. Both signs of A, and each
    filter in turn."""
    n = 6
    z, t = torch.randn(2, n, 7, dtype=torch.float64, device=device)
    labels = torch.arange(n, device=device)
    teacher = SampledTeacher(t.log_softmax(-1).gather(-1, labels[:, None])[:, 0])
    filters = (None, *REWARD_FILTERS)
    rule = shaped(
        transform, gate="expected", task_weight=0.5, clip_ratio_low=0.9, clip_reward_low=-0.8,
        outlier="clip", reward_filter=filters[TRANSFORMS.index(transform) % len(filters)],
    )  # fmt: skip

    def run(z):
        return distillation_loss(
            z, labels, teacher, rule, backend=backend, reduction="none",
            old_log_probs=torch.linspace(-3.0, -1.0, n, dtype=torch.float64, device=device),
            task_advantages=torch.linspace(-1, 2, n, dtype=torch.float64, device=device),
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(run, z.requires_grad_(), fast_mode=True)


def test_torch_compile_takes_rewards_and_the_tasks_advantages(device):
    """One graph, for batches of another size; a number that it knows by a symbol makes the rule."""

    def run(z, t, labels, task, number):
        teacher = LogitsTeacher(t)
        rule = replace(
            TOPD(alpha=number), clip_reward_low=-number, task_weight=number,
            reward_filter="negative",
        )  # fmt: skip
        out = distillation_loss(z, labels, teacher, rule, backend="torch", task_advantages=task)
        return out.loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, number in ((3, 0.25), (5, 0.5)):
        z, t = torch.randn(2, n, 11, device=device)
        task = torch.linspace(-1, 1, n, device=device)
        given = t, torch.arange(n, device=device), task, number
        leaves = [z.clone().requires_grad_() for _ in range(2)]
        for leaf, call in zip(leaves, (run, compiled), strict=True):
            call(leaf, *given).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
