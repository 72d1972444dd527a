"""The objectives as prime-rl's loss of the rl component, for a reference that scores the tokens.

    [trainer.loss]
    type = "custom"
    import_path = "tropd_kernels.integrations.prime_rl.loss"
    kwargs = { objective = "power_opd" }

prime-rl gives per-token log-probs of the trainer, of the sampling policy and of the reference, and
wants the sum over a sequence; it divides by the tokens of the step. It calls this for the tokens of
its rl component, so an algorithm has to give them a reference's log-probs: its own `opd` has a
component of its own, with a loss that no option replaces. Written from
src/prime_rl/trainer/rl/loss.py at 559b447.
"""

from __future__ import annotations

import sys
from typing import Any

from .log_probs import check_rule, drawn, mean_trust, named_rule, sampled_losses


def loss(inputs: Any, objective: str = "opd", seed: int = 0, **knobs: Any) -> Any:
    """prime-rl's LossOutputs of its LossInputs.

    seed: of the draws of a Bernoulli gate, which go with the sequence, too.
    """
    rule = check_rule("trainer.loss", named_rule("trainer.loss", objective, knobs))
    if inputs.ref_logprobs is None:
        raise ValueError(
            "trainer.loss: the batch has no ref_logprobs, the teacher's: take an algorithm that "
            "asks a reference model for the tokens of the rl component"
        )
    counted = inputs.loss_mask.bool()
    losses, trust, _ = sampled_losses(
        inputs.trainer_logprobs, inputs.ref_logprobs, counted, rule,
        old_log_probs=inputs.inference_logprobs,
        uniforms=drawn(seed, inputs.inference_logprobs, counted),
    )  # fmt: skip
    if inputs.loss_weights is not None:
        losses = losses * inputs.loss_weights
    metrics = {"tropd/trust": mean_trust(trust, counted)}
    return outputs_of(inputs)(loss=losses.sum(), metrics=metrics)


def outputs_of(inputs: Any) -> Any:
    """LossOutputs, from the module that has the LossInputs."""
    return sys.modules[type(inputs).__module__].LossOutputs
