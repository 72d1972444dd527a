"""The objectives as SkyRL's policy losses, for a teacher whose K1 is the advantage.

    import tropd_kernels.integrations.skyrl as tropd   # where the other losses are registered, too
    tropd.register("tropd_opd", objective="opd", clip_ratio_low=0.2, clip_ratio_high=0.2)
    # trainer.algorithm.policy_loss_type=tropd_opd

SkyRL's distillation has the teacher's log-probs in the rewards: its reward of a token is
log q - log p_old, and an advantage estimator that changes nothing hands it on. So the teacher's
log-prob is old_log_probs + advantages, and a loss has all that a sampled teacher gives. Rewards of
a task, means or whitening among the advantages would make it another teacher. The sum is weighted
by the loss mask, as SkyRL's losses are, whose masks hold the mean's divisor. Its off-policy
correction is its own function, of our losses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .frameworks import check_parameters, check_version
from .log_probs import check_rule, drawn, mean_trust, named_rule, sampled_losses

_OF_A_LOSS = (
    "log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"
)  # fmt: skip
_OF_A_CORRECTION = (
    "loss", "old_log_probs", "rollout_logprobs", "loss_mask", "off_policy_correction"
)  # fmt: skip


def register(name: str, objective: str = "opd", seed: int = 0, **knobs: Any) -> None:
    """Registers the objective as SkyRL's policy loss `name`. Raises ValueError for an objective
    that a sampled teacher does not serve, and SkyRL's own error for a name that is taken."""
    from skyrl.backends.skyrl_train.utils import ppo_utils

    check_version("skyrl")
    check_parameters("skyrl", ppo_utils, "ppo_policy_loss", _OF_A_LOSS)
    check_parameters("skyrl", ppo_utils, "apply_off_policy_correction", _OF_A_CORRECTION)
    ppo_utils.PolicyLossRegistry.register(name, policy_loss(objective, seed, **knobs))


def policy_loss(objective: str = "opd", seed: int = 0, **knobs: Any) -> Any:
    """A function that takes what SkyRL gives a policy loss, and gives (loss, metrics)."""
    rule = check_rule("skyrl", named_rule("skyrl", objective, knobs))

    def loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        from skyrl.backends.skyrl_train.utils.ppo_utils import apply_off_policy_correction

        weights = log_probs.new_ones(log_probs.shape) if loss_mask is None else loss_mask
        counted = weights != 0
        losses, trust, _ = sampled_losses(
            log_probs, old_log_probs + advantages, counted, rule,
            old_log_probs=old_log_probs, uniforms=drawn(seed, old_log_probs, counted),
        )  # fmt: skip
        losses, weights, metrics = apply_off_policy_correction(
            losses, old_log_probs, rollout_logprobs, weights, config.off_policy_correction
        )
        return (losses * weights).sum(), metrics | {"trust": float(mean_trust(trust, counted))}

    return loss
