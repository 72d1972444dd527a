"""Temporal credit assignment: which time step answers for which reward.

Plain torch on (B, T) tensors, run before the fused loss. The results of `returns` enter that loss
as `advantages`; those of `drift` and `weights` are multiplied into `token_weight`. At token t, with
the K1 reward R_t = sg(lq_t - lo_t):

    return_to_go             A_t = sum_{j >= t} discount^(j-t) R_j, over the next `window` positions
    reward_plus_future_mean  A_t = R_t + mean_{j > t} R_j
    generalized_advantages   A_t = d_t + discount gae_lambda A_{t+1},
                             d_t = R_t + discount V_{t+1} - V_t
    exact_kl_baseline        A_t = R_t + KL(p_t || q_t)
    delta_advantages         A_t = log(q_t / r_t) less its mean under p_t, where the teacher agrees
    drift_gates              g_b = exp(-tau |s_b|) / mean g,  s_b = mean of lo - sg(lp) over block b
    importance_weights       w_t = 1 + gamma (1 - sum_{j<t} |R_j| / sum_j |R_j|)
    turn_weights             w_t = tokens / (turns * tokens of t's turn)
    entropy_quantile_mask    whether H(p_t) is among the batch's highest `top_fraction`
    reward_aligned_mask      whether the sequence's sum of R_t has the sign of its outcome

Each function's docstring names its source and says where the source leaves a choice.

Rules that all of them share:

* `mask` ((B, T), bool or integer, non-zero = the token counts; None = all count) is applied with a
  select, never with a product: values at masked positions, NaN included, are not read, and the
  result there is 0 (or False).
* `sequence_ids` ((B, T), integer) marks packed rows: a sequence is a run of equal ids within a row,
  and nothing crosses its border. None = one sequence per row. Padding a sequence and packing it
  with others do not change its result, to the bit (but drift_gates divides by a mean over the whole
  batch, and entropy_quantile_mask ranks the whole batch). Ids are read at masked positions too.
* Results are detached, float32 (float64 if an input is float64), on the inputs' device. Arguments
  are checked by type, shape and option value only; no tensor value is read on the host, so no call
  waits for a GPU.
* No float atomics: two runs agree bitwise. Sums over time take log2(T) vectorised steps; memory is
  a few (B, T) tensors.
* NaN at a token that counts is never hidden; each function says what an infinite value does.
"""

from .drift import drift_gates
from .returns import (
    delta_advantages,
    exact_kl_baseline,
    generalized_advantages,
    return_to_go,
    reward_plus_future_mean,
)
from .runs import packed_sequence_ids
from .weights import (
    entropy_quantile_mask,
    importance_weights,
    reward_aligned_mask,
    turn_weights,
)

__all__ = [
    "delta_advantages",
    "drift_gates",
    "entropy_quantile_mask",
    "exact_kl_baseline",
    "generalized_advantages",
    "importance_weights",
    "packed_sequence_ids",
    "return_to_go",
    "reward_aligned_mask",
    "reward_plus_future_mean",
    "turn_weights",
]
