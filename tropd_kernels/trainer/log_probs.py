"""Whether numbers can be a teacher's log-probs on a completion, from a server or from columns.

The probabilities of the K likeliest of V ids sum to between K / V and 1. Log-probs to another base
and scores of another kind break the upper bound, a server that fills in unknown values breaks the
lower one. A single log-prob per token, as pure K1 objectives need, shows neither: there a
completion is refused if the teacher excludes every token of it.
"""

import torch
from torch import Tensor

#: A number above this, in nats, is no log-prob, with room for rounding.
MARGIN = 1e-3
#: Bounds of the sum of a token's probabilities: 1 with the error of log-probs in bfloat16, and less
#: than the likeliest ids have in any vocabulary.
MOST, LEAST = 1.05, 1e-8


def impossible_masses(
    tokens: Tensor,  # (C)
    label_log_probs: Tensor,  # (C)
    ids: Tensor,  # (C, K)
    log_probs: Tensor,  # (C, K), -inf at padding
) -> tuple[Tensor, Tensor]:
    """Finds tokens whose log-probs no distribution has.

    Returns:
        The probability (C,) of each token together with its likeliest ids, and a mask (C,) of the
        impossible ones.
    """
    likeliest = log_probs.double().exp().sum(1)
    among = ((ids == tokens[:, None]) & (log_probs > -torch.inf)).any(1)
    mass = likeliest + label_log_probs.double().exp().masked_fill(among, 0.0)
    return mass, (mass > MOST) | (likeliest < LEAST)


def check_labels(log_probs: Tensor) -> None:
    """Raises ValueError for log-probs (C,) of a completion's tokens that are all -inf.

    A teacher may exclude single tokens, also the only one, but a completion of several excluded
    tokens has no finite loss.
    """
    if len(log_probs) > 1 and bool((log_probs == -torch.inf).all()):
        raise ValueError(
            f"the log-probs of all {len(log_probs)} tokens are -inf, as if the teacher excluded "
            "each of them: expected the finite log-probs of a teacher that has read them"
        )
