"""Every kind of rule under `torch.compile(fullgraph=True)`, loss and gradients to the bit.

The rule is a constant of the graph; what a test here catches is a tensor or a branch of a rule that
the op's schema, its fake or its backward does not know."""

import pytest
import torch
from problems import OBJECTIVES, inputs_of, make_problem, reference_of, with_everything

from tropd_kernels import KDRL, OPDVR, Divergence, ExOPD, linear_distillation_loss

#: One of each reward transform, filter, kind of ids and tail, target and cross-entropy.
RULES = {
    name: OBJECTIVES[name]
    for name in (
        "power_opd", "topd_current", "log1p", "tanh_clip", "tv_opd", "topk_reverse_kl",
        "topk_reverse_kl_bucket", "topk_reverse_kl_renormalize_teacher", "lsm", "student_top_k",
        "mixed", "veto", "tropd_target", "tropd_z_loss", "gkd_cross_entropy",
    )
} | {
    "kdrl": KDRL(reward_filter="negative"),
    "opdvr": OPDVR(),
    "exopd": ExOPD(),
    "given": Divergence("reverse_kl", top_k_tail="renormalize_both", top_k_ids="given"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_one_graph_to_the_bit(name, device):
    """With losses of each token, whose backward is an op of its own."""
    rule, problem = RULES[name], with_everything(make_problem(tokens=6, device=device))
    options = problem.options | inputs_of(rule, problem.labels)
    if rule.uses_task_advantages:
        options["task_advantages"] = torch.linspace(-1, 2, 6, device=device)
    if rule.top_k_ids == "given":
        options["ids"] = torch.arange(12, device=device).reshape(6, 2)
    teacher, beside = problem.teacher("hidden", torch.float32), None
    if rule.reference_power:
        beside = reference_of(problem, "hidden", torch.float32)
    options = {
        key: value.float()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in options.items()
    }

    def loss(hidden, weight, bias):
        out = linear_distillation_loss(
            2 * hidden, weight, problem.labels, teacher, rule, bias=bias, reduction="none",
            reference_teacher=beside, backend="torch", **problem.student_head, **options,
        )  # fmt: skip
        return (out.loss * torch.linspace(-1, 2, 6, device=device)).sum(), out.stats.token_loss

    torch._dynamo.reset()
    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [
            each.float().requires_grad_() for each in (problem.hidden, problem.weight, problem.bias)
        ]
        total, per_token = run(*leaves)
        total.backward()
        found.append([total.detach(), per_token, *(leaf.grad for leaf in leaves)])
    assert found[0][0].isfinite() and all(each.any() for each in found[0][2:])
    for compiled, eager in zip(found[1], found[0], strict=True):
        assert torch.equal(compiled, eager)
