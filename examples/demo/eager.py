"""The TrOPD loss as one would write it in plain PyTorch: what the fused loss is measured against.

It makes the logits of every token over the whole vocabulary, for student and teacher, and lets
autograd do the rest. Tokens that do not count are dropped first, as the fused loss drops them, and
the teacher's logits are freed as soon as they have been read: a careful version, not a straw man.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_tropd(
    hidden: Tensor,  # (N, H)   student
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N)      every token counts
    teacher_hidden: Tensor,  # (N, G)
    teacher_weight: Tensor,  # (V, G)
    uniforms: Tensor,  # (N)      the draws of the Bernoulli gate
    top_k: int = 64,
) -> tuple[Tensor, Tensor]:
    """The mean loss (a scalar to call `backward` on) and the gate's decisions (N), bool."""
    y = labels[:, None]
    with torch.no_grad():
        teacher_log_probs = _log_softmax(F.linear(teacher_hidden, teacher_weight))
        teacher_log_prob = teacher_log_probs.gather(-1, y).squeeze(-1)
        top_log_probs, top_ids = teacher_log_probs.topk(top_k, dim=-1)
        del teacher_log_probs
    log_probs = _log_softmax(F.linear(hidden, weight))
    log_prob = log_probs.gather(-1, y).squeeze(-1)

    reward = (teacher_log_prob - log_prob).detach()
    trusted = uniforms < reward.exp().clamp(max=1)
    # Inside the gate: value -reward, gradient -reward * grad(log_prob).
    policy_gradient = -reward * (log_prob - log_prob.detach()).exp()
    # Outside: the forward KL on the teacher's top-k ids, neither renormalised nor clamped.
    forward_kl = (top_log_probs.exp() * (top_log_probs - log_probs.gather(-1, top_ids))).sum(-1)
    return torch.where(trusted, policy_gradient, forward_kl).mean(), trusted


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least: bfloat16 logits are widened, as every careful trainer does."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
