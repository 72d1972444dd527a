"""The objectives as a custom loss of tinker's, whose models train on its servers.

    from tropd_kernels.integrations.tinker import custom_loss
    training_client.forward_backward_custom(data, custom_loss("power_opd"))

tinker sends log-probs of each datum's target_tokens, computes the loss here and sends back its
gradient. The teacher's log-probs and those of sampling go with the datum, in `loss_fn_inputs`:
teacher_logprobs, and, if they are known, sampling_logprobs and mask. No kernel of this package
runs: there are no logits here. The loss is the sum over the tokens, as tinker's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .log_probs import check_rule, drawn, mean_trust, named_rule, sampled_losses


def custom_loss(objective: str = "opd", seed: int = 0, **knobs: Any) -> Any:
    """A function (data, logprobs) -> (loss, metrics) for `forward_backward_custom`."""
    rule = check_rule("tinker", named_rule("tinker", objective, knobs))

    def loss(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        total, trusts, masks = logprobs[0].new_zeros(()), [], []
        for datum, log_probs in zip(data, logprobs):
            given = {n: field.to_torch().to(log_probs) for n, field in datum.loss_fn_inputs.items()}
            if "teacher_logprobs" not in given:
                raise ValueError(
                    "tinker: a datum has no loss_fn_inputs['teacher_logprobs']: ask a sampling "
                    "client of the teacher for compute_logprobs of the same tokens"
                )
            if log_probs.dim() != 1:
                raise ValueError(
                    f"tinker: logprobs must be (T,), of the sampled tokens; got "
                    f"{tuple(log_probs.shape)}, of several tokens a position"
                )
            old = given.get("sampling_logprobs", log_probs.detach())
            counted = given.get("mask", torch.ones_like(log_probs)) != 0
            losses, trust, _ = sampled_losses(
                log_probs, given["teacher_logprobs"], counted, rule,
                old_log_probs=old, uniforms=drawn(seed, old, counted),
            )  # fmt: skip
            total = total + losses.sum()
            trusts.append(trust)
            masks.append(counted)
        return total, {"trust": float(mean_trust(torch.cat(trusts), torch.cat(masks)))}

    return loss
