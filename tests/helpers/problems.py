"""Small distillation problems for the tests: random, but with the spread of real logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from tropd_kernels import (
    AOPD,
    EOPD,
    GKD,
    LSM,
    MOPD,
    OPD,
    REOPOLD,
    SFT,
    TOPD,
    TVOPD,
    ClipOutlier,
    Divergence,
    EntropyOPD,
    HiddenTeacher,
    LogitsTeacher,
    MaskOutlier,
    PowerOPD,
    SampledTeacher,
    TokenRule,
    TopKJSD,
    TopKTeacher,
    TrOPD,
    Veto,
    distillation_loss,
    linear_distillation_loss,
)

K = 6

#: Every objective by name. K is small, so that a top-k teacher of the tests' vocabularies has a
#: tail.
OBJECTIVES = {
    "tropd": TrOPD(top_k=K),
    "tropd_expected": TrOPD(gate="expected", top_k=K),
    "tropd_bucket": TrOPD(gate="expected", top_k=K, top_k_tail="bucket"),
    "tropd_renormalize_teacher": TrOPD(top_k=K, top_k_tail="renormalize_teacher"),
    "tropd_renormalize_both": TrOPD(gate="expected", top_k=K, top_k_tail="renormalize_both"),
    "tropd_whole_vocabulary": TrOPD(top_k=None),
    "tropd_mask": TrOPD(outlier="mask"),
    "tropd_clip": TrOPD(gate="threshold", outlier="clip"),
    "tropd_clip_expected": TrOPD(gate="expected", outlier="clip"),
    "tropd_reward": TrOPD(outlier="forward_kl_reward", top_k=K),
    "tropd_ppo": TrOPD(top_k=K, clip_ratio_low=0.2, clip_ratio_high=0.3, entropy_coef=0.05),
    "opd": OPD(),
    "opd_ppo": OPD(kl_penalty_coef=0.7, clip_ratio_low=0.2, clip_ratio_high=0.2),
    "clip_outlier": ClipOutlier(),
    "mask_outlier": MaskOutlier(),
    "eopd": EOPD(top_k=K),
    "entropy_opd": EntropyOPD(top_fraction=0.4),
    "reopold_1": REOPOLD(stage=1),
    "reopold_2": REOPOLD(stage=2, entropy_quantile=0.5),
    "aopd": AOPD(top_k=K),
    "sft": SFT(),
    "power_opd": PowerOPD(alpha=2.0),
    "topd": TOPD(alpha=0.4),
    "topd_current": TokenRule(
        reward="proximal", reward_parameter=0.6, reward_policy="current", clip_reward_low=-0.5
    ),
    "log1p": TokenRule(reward="log1p", gate="threshold", outlier="forward_kl", top_k=K),
    "tanh_clip": TokenRule(
        reward="tanh", reward_parameter=1.5, gate="expected", outlier="clip", threshold=-0.5,
        clip_reward_high=0.4,
    ),
    "tv_opd": TVOPD(scale=0.5),
    "lsm": LSM(top_k=K),
    "mopd": MOPD(top_k=K),
    "topk_jsd": TopKJSD(top_k=K),
    "gkd": GKD(0.3),
    "gkd_selected": replace(GKD(0.3), select_by="reverse_kl", select_fraction=0.5),
    "forward_kl": Divergence("forward_kl"),
    "forward_kl_top_k": Divergence("forward_kl", top_k=K),
    "reverse_kl": Divergence("reverse_kl"),
    "topk_reverse_kl": Divergence("reverse_kl", top_k=K - 1),
    "topk_reverse_kl_bucket": Divergence("reverse_kl", top_k=K, top_k_tail="bucket"),
    "topk_reverse_kl_renormalize_teacher": Divergence(
        "reverse_kl", top_k=K, top_k_tail="renormalize_teacher"
    ),
    "student_top_k": Divergence(
        "reverse_kl", top_k=K, top_k_tail="bucket", top_k_ids="student"
    ),
    "jeffreys": Divergence("jeffreys"),
    "jeffreys_top_k": TokenRule(policy_gradient=0.0, divergence="jeffreys", top_k=K),
    "mixed": Divergence("mixed"),
    "veto": Veto(student_power=0.4, divergence="reverse_kl"),
    "tropd_target": replace(
        TrOPD(gate="expected", top_k=K), teacher_power=1.3, student_power=-0.2
    ),
    "skew_forward": Divergence("skew_forward"),
    "skew_reverse": Divergence("skew_reverse"),
    "alpha": Divergence("alpha", alpha=0.3),
    "alpha_above_1": Divergence("alpha", alpha=1.5),
    "chi2": Divergence("chi2"),
    "total_variation": Divergence("total_variation"),
    "todi": Divergence("todi"),
    "akl": Divergence("akl"),
    "tropd_z_loss": TokenRule(
        gate="expected", outlier="forward_kl", top_k=K, top_k_tail="renormalize_both",
        prefix_weight=0.001, z_loss=0.01,
    ),
    "gkd_cross_entropy": TokenRule(
        policy_gradient=0.0, divergence="jsd", divergence_parameter=0.3, nll_weight=0.5,
        label_smoothing=0.1, z_loss=0.02,
    ),
}  # fmt: skip

TEACHERS = ("hidden", "logits", "top_k", "sampled")


def serves(form: str, name: str) -> bool:
    """Whether this form of teacher can give what the objective needs (`teachers.check_serves` has
    tests of its own)."""
    rule = OBJECTIVES[name]
    if form == "sampled":
        return not (rule.uses_dense_teacher or rule.uses_top_k or rule.uses_forward_kl)
    return form != "top_k" or not rule.uses_dense_teacher


def inputs_of(rule: TokenRule, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per-token arguments that this rule alone reads: the weight of "mixed", from the reverse KL's
    0 to the forward KL's 1."""
    if not rule.weighs_by_mixing:
        return {}
    mixing = torch.linspace(0, 1, labels.numel(), dtype=torch.float64, device=labels.device)
    return {"mixing": mixing.reshape(labels.shape)}


@dataclass
class Problem:
    """Tensors of one problem in float64; `call` casts and runs it."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    bias: torch.Tensor | None = None
    teacher_bias: torch.Tensor | None = None
    student_head: dict = field(default_factory=dict)  # logit_scale, softcap
    teacher_head: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def teacher(self, form: str, dtype: torch.dtype, temperature: float = 1.0):
        hidden, weight, bias = (
            None if t is None else t.to(dtype)
            for t in (self.teacher_hidden, self.teacher_weight, self.teacher_bias)
        )
        if form == "hidden":
            return HiddenTeacher(hidden, weight, bias, **self.teacher_head)
        logits = self.teacher_logits()
        if form == "logits":
            return LogitsTeacher(logits.to(dtype))
        vocab_size = min(self.weight.shape[0], self.teacher_weight.shape[0])
        log_q = (logits / temperature).log_softmax(-1)
        label = log_q.gather(-1, self.labels.clamp(0, vocab_size - 1).unsqueeze(-1)).squeeze(-1)
        if form == "sampled":
            return SampledTeacher(label.to(dtype))
        top = log_q.topk(K + 2, dim=-1)
        return TopKTeacher(top.indices, top.values.to(dtype), label.to(dtype))

    def teacher_logits(self) -> torch.Tensor:
        logits = self.teacher_hidden @ self.teacher_weight.T
        if self.teacher_bias is not None:
            logits = logits + self.teacher_bias
        logits = logits * self.teacher_head.get("logit_scale", 1.0)
        cap = self.teacher_head.get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def call(self, objective, form, backend, dtype=torch.float32, incoming=None, **more):
        """(loss, gradients by name, stats)."""
        leaves = {
            name: t.to(dtype).clone().requires_grad_()
            for name, t in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias))
            if t is not None
        }
        options = self.options | inputs_of(objective, self.labels) | more
        teacher = None
        if objective.uses_teacher:
            teacher = self.teacher(form, dtype, options.get("temperature", 1.0))
        floats = {
            k: v.to(torch.promote_types(dtype, torch.float32))
            if isinstance(v, torch.Tensor) and v.is_floating_point()
            else v
            for k, v in options.items()
        }
        out = linear_distillation_loss(
            leaves["hidden"], leaves["weight"], self.labels, teacher, objective,
            bias=leaves.get("bias"), backend=backend, **self.student_head, **floats,
        )  # fmt: skip
        loss = out.loss if incoming is None else (out.loss * incoming.to(out.loss.dtype)).sum()
        loss.backward()
        return out.loss.detach(), {k: v.grad for k, v in leaves.items()}, out.stats


def make_problem(
    tokens: int = 10,
    vocab_size: int = 37,
    teacher_vocab_size: int | None = None,
    width: int = 16,
    teacher_width: int = 24,
    spread: float = 2.5,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Logits of standard deviation `spread` on both sides, independent of each other."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(device)

    teacher_vocab_size = teacher_vocab_size or vocab_size
    return Problem(
        hidden=normal(tokens, width),
        weight=normal(vocab_size, width, scale=spread / width**0.5),
        labels=torch.randint(vocab_size, (tokens,), generator=draw).to(device),
        teacher_hidden=normal(tokens, teacher_width),
        teacher_weight=normal(teacher_vocab_size, teacher_width, scale=spread / teacher_width**0.5),
        options={"uniforms": torch.rand(tokens, generator=draw).to(device)},
    )


def reference_of(problem: Problem, form: str, dtype: torch.dtype, vocab_size: int | None = None):
    """A reference teacher of its own width, vocabulary and head, or the logits of one."""
    draw = torch.Generator().manual_seed(5)
    n, (v, g) = len(problem.labels), problem.teacher_weight.shape
    v, g = vocab_size or v + 2, g + 3

    def normal(*shape):
        drawn = torch.randn(*shape, generator=draw, dtype=torch.float64)
        return drawn.to(problem.hidden.device, dtype)

    hidden, weight, bias = normal(n, g), normal(v, g) / 2, normal(v)
    if form == "hidden":
        return HiddenTeacher(hidden, weight, bias, 1.1, 12.0)
    return LogitsTeacher(hidden @ weight.T)


def with_everything(problem: Problem, seed: int = 1) -> Problem:
    """Turns on soft cap, scale, bias, temperature, mask, weights, prefix and old_log_probs."""
    draw = torch.Generator().manual_seed(seed)
    n, device = problem.labels.shape[0], problem.labels.device

    def uniform():
        return torch.rand(n, generator=draw, dtype=torch.float64).to(device)

    problem.bias = torch.randn(problem.weight.shape[0], generator=draw, dtype=torch.float64).to(
        device
    )
    problem.teacher_bias = torch.randn(
        problem.teacher_weight.shape[0], generator=draw, dtype=torch.float64
    ).to(device)
    problem.student_head = {"logit_scale": 1.3, "softcap": 9.0}
    problem.teacher_head = {"logit_scale": 0.8, "softcap": 7.0}
    problem.labels = problem.labels.clone()
    problem.labels[::4] = -100
    token_weight = uniform() + 0.5
    token_weight[1] = 0.0
    problem.options |= {
        "temperature": 1.2,
        "token_weight": token_weight,
        "teacher_prefix": uniform() < 0.25,
        "old_log_probs": -4 * uniform(),
    }
    return problem


def loss_and_gradient(logits, labels, teacher, objective, backend, **options):
    """(loss, d_logits, stats) of the summed loss on logits."""
    z, options = logits.clone().requires_grad_(), inputs_of(objective, labels) | options
    out = distillation_loss(z, labels, teacher, objective, backend=backend, **options)
    out.loss.sum().backward()
    return out.loss.detach(), z.grad, out.stats


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64; NaN stays NaN."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))


def assert_stats_agree(ours, truth, tolerance: float) -> None:
    """Where both know them. What the reference does not know, nobody does."""
    for key, value in vars(truth).items():
        found = getattr(ours, key)
        assert (found is None) == (value is None), key
        if value is not None:
            assert not (value.isnan() & ~found.isnan()).any(), f"{key}: the reference has none"
            known = ~found.isnan()
            torch.testing.assert_close(
                found[known].double(), value[known].double(), rtol=tolerance, atol=tolerance,
                msg=key,
            )  # fmt: skip


def rows_of_several_blocks() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Student's and teacher's logits, whose maxima stand in the last of their blocks of 1024."""
    vocab, block = 3172, torch.arange(3172) // 1024
    z, t = torch.randn(vocab), torch.randn(vocab)
    excluded = torch.where(block == 0, -math.inf, 0.0)
    low = torch.full((vocab,), -160.0)
    low[0], low[2000] = -100.0, 0.0
    cases = {
        "rise by 50": (z + 50.0 * block, t + 50.0 * block),
        "rise by 200": (z + 200.0 * block, t - 200.0 * block),
        "only one rises": (z + 200.0 * block, t),
        "student excludes the first block": (z + excluded, t - 300.0 * (block == 0)),
        "teacher excludes the first block": (z - 300.0 * (block == 0), t + excluded),
        "both exclude it": (z + excluded, t + excluded),
        "a weight that is 0 beside the row's maximum": (low, t.clone()),
        "a mask on one side": (z + 200.0 * (block == 2), t.clone()),
        "infinite": (z.clone(), t + excluded),
    }
    cases["a weight that is 0 beside the row's maximum"][1][1] = -math.inf
    low = low.clone()
    low[0], low[1025] = -160.0, -80.0
    cases["... and beside that of its lane is not"] = low, t.clone()
    cases["... and beside that of its lane is not"][1][1] = -math.inf
    cases["a mask on one side"][1][5] = torch.finfo(torch.float32).min
    return cases
