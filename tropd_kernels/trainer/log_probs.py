"""Whether numbers can be a teacher's log-probs on a completion: one check, wherever they come from.

The probabilities of the K likeliest ids of a vocabulary of V sum to 1 at most, and to K / V at
least. Log-probs to another base and scores of another kind break the first bound, a server that
fills up what it does not know breaks the second. Of one log-prob a token, as objectives of K1 alone
ask for, neither shows: there a completion is refused of which the teacher excludes every token.
"""

import torch
from torch import Tensor

#: Above 0 by more than rounding, in nats, no number is a log-prob.
MARGIN = 1e-3
#: What the probabilities of a token's ids sum to. Above 1 by what log-probs in bfloat16 differ by;
#: no vocabulary has so many ids that the likeliest of them fall below the least.
MOST, LEAST = 1.05, 1e-8


def impossible_masses(
    tokens: Tensor,  # (C)
    label_log_probs: Tensor,  # (C)
    ids: Tensor,  # (C, K)
    log_probs: Tensor,  # (C, K), -inf at padding
) -> tuple[Tensor, Tensor]:
    """(C,) the probability of each token and its likeliest ids together, and (C,) bool: where no
    distribution has these log-probs."""
    likeliest = log_probs.double().exp().sum(1)
    among = ((ids == tokens[:, None]) & (log_probs > -torch.inf)).any(1)
    mass = likeliest + label_log_probs.double().exp().masked_fill(among, 0.0)
    return mass, (mass > MOST) | (likeliest < LEAST)


def check_labels(log_probs: Tensor) -> None:
    """Raises ValueError for log-probs (C,) of a completion's tokens that are all -inf. A teacher
    may exclude a token, also the only one, but a text of tokens that it excludes has no loss."""
    if len(log_probs) > 1 and bool((log_probs == -torch.inf).all()):
        raise ValueError(
            f"the log-probs of all {len(log_probs)} tokens are -inf, as if the teacher excluded "
            "each of them: expected the finite log-probs of a teacher that has read them"
        )
