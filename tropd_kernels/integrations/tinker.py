"""The objectives as a custom loss of tinker's, whose models train on its servers.

    from tropd_kernels.integrations.tinker import custom_loss
    training_client.forward_backward_custom(data, custom_loss("power_opd"))

tinker sends log-probs of each datum's target_tokens, computes the loss here and sends back its
gradient. The teacher's log-probs and those of sampling go with the datum, in `loss_fn_inputs`:
teacher_logprobs, and, if they are known, sampling_logprobs and mask. The loss is the sum over the
tokens, as tinker's own.

target_tokens (T) are the sampled tokens. Or they are (T, K), the teacher's top k, and so are
teacher_logprobs and what tinker sends: with all that is left in one more column these are the
logits of K + 1 ids, and go through `distillation_loss`. A divergence on the top k is the same there
as on the whole vocabulary. mask is (T) in either case.

`create_custom_loss` takes losses of torch's own functions alone, which these are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import distillation_loss
from ..objectives import TokenRule
from ..teachers import TopKTeacher
from .frameworks import check_version
from .log_probs import check_rule, drawn, mean_trust, named_rule, sampled_losses


def custom_loss(objective: str = "opd", seed: int = 0, **knobs: Any) -> Any:
    """A function (data, logprobs) -> (loss, metrics) for `forward_backward_custom`."""
    check_version("tinker")
    rule = named_rule("tinker", objective, knobs)
    on_top_k = rule.uses_top_k
    (check_top_k if on_top_k else check_rule)("tinker", rule)
    dims, form = (2, "(T, K), of the teacher's top k") if on_top_k else (1, "(T), sampled")

    def loss(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        total, trusts, masks = logprobs[0].new_zeros(()), [], []
        for datum, log_probs in zip(data, logprobs):
            given = {n: field.to_torch().to(log_probs) for n, field in datum.loss_fn_inputs.items()}
            if "teacher_logprobs" not in given:
                raise ValueError(
                    "tinker: a datum has no loss_fn_inputs['teacher_logprobs']: ask a sampling "
                    "client of the teacher for compute_logprobs of the same tokens"
                )
            teacher = given["teacher_logprobs"]
            if log_probs.dim() != dims or teacher.shape != log_probs.shape:
                raise ValueError(
                    f"tinker: {objective!r} takes target_tokens {form}, and teacher_logprobs "
                    f"alike; got {tuple(log_probs.shape)} and {tuple(teacher.shape)}"
                )
            counted = given.get("mask", log_probs.new_ones(len(log_probs))) != 0
            if on_top_k:
                total = total + top_k_loss(log_probs, teacher, counted, rule)
                continue
            old = given.get("sampling_logprobs", log_probs.detach())
            losses, trust, _ = sampled_losses(
                log_probs, teacher, counted, rule,
                old_log_probs=old, uniforms=drawn(seed, old, counted),
            )  # fmt: skip
            total = total + losses.sum()
            trusts.append(trust)
            masks.append(counted)
        if on_top_k:
            return total, {}
        return total, {"trust": float(mean_trust(torch.cat(trusts), torch.cat(masks)))}

    return loss


def top_k_loss(log_probs: Tensor, teacher: Tensor, counted: Tensor, rule: TokenRule) -> Tensor:
    """The sum over the tokens that count, of log-probs (T, K) of both sides."""
    k = log_probs.shape[1]
    if k != rule.top_k:
        raise ValueError(
            f"tinker: target_tokens has {k} ids a token, and the objective top_k={rule.top_k}: "
            "give both the same"
        )
    least = torch.finfo(log_probs.dtype).tiny
    rest = (-log_probs.logsumexp(-1, keepdim=True).expm1()).clamp_min(least).log()
    logits = torch.cat([log_probs, rest], 1)
    ids = torch.arange(k, device=logits.device).expand(len(logits), k)
    labels = torch.zeros_like(ids[:, 0]).masked_fill(~counted, -100)  # which the rule does not read
    answers = TopKTeacher(ids, teacher, teacher[:, 0])
    return distillation_loss(logits, labels, answers, rule, reduction="sum").loss


def check_top_k(where: str, rule: TokenRule) -> None:
    """Raises ValueError for a rule that is more than a divergence on the teacher's top k."""
    more = dict(policy_gradient=0.0, gate="always", nll_weight=0.0, label_smoothing=0.0,
                entropy_coef=0.0, z_loss=0.0, score=None, top_k_ids="teacher")  # fmt: skip
    wrong = [name for name, value in more.items() if getattr(rule, name) != value]
    if rule.uses_dense_teacher or wrong:
        raise ValueError(
            f"{where}: {rule!r} cannot be served: of a top k there are log-probs of its ids alone, "
            f"and {', '.join(wrong) or 'a divergence on the whole vocabulary'} reads more. Take a "
            'divergence on it: "forward_kl" or "reverse_kl", with top_k'
        )
