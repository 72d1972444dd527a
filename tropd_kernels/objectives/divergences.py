"""The divergences that a rule may name: one table of all that is known of each but its formula.

A divergence is made in one of four ways:

    coefficients   a fixed sum of the exact forward and reverse KL: `kl_weights`
    gaps           the same sum with weights that each token has of its own: "akl"
    mixing         the same sum with weights that the caller gives each token: "mixed"
    generator      sum over ids of q f(p/q), one more pass over the row: all others

The formulas of the generators are in `reference.py`, `rows/generators.py` (torch),
`rows/triton_kernels/generators.py` and `csrc/row_generators.h`; each refuses a name that it has no
formula for. The constructors, the registry's knobs, the checks of a parameter and what a rule needs
of its teacher follow from this table. `docs/extending.md` says how to add a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .checks import number


@dataclass(frozen=True, kw_only=True)
class DivergenceSpec:
    """What the package knows of one divergence."""

    kl_weights: tuple[float, float] | None = None
    """Weights of KL(q || p) and KL(p || q), where it is a fixed sum of them."""
    by_gaps: bool = False
    """Each token weighs the two by its gaps abs(p - q) on the teacher's head and tail."""
    by_mixing: bool = False
    """Each token weighs the two by the call's `mixing` and 1 - `mixing`."""
    ids: Literal["vocabulary", "top_k", "either"] = "vocabulary"
    """The ids that it sums over: all, those of K, or what the rule's `top_k` says."""
    has_tails: bool = False
    """A divergence on K whose value and gradient depend on the rule's `top_k_tail`."""
    on_k: str | None = None
    """The divergence that `Divergence` takes instead where it is given a set K."""
    parameter: str | None = None
    """Name of its parameter: an argument of `Divergence`, a knob of a config."""
    default: float = 0.5
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """The parameter's, inclusive."""
    limits: tuple[tuple[float, str | None], ...] = ()
    """Parameters at which the formula divides by 0, each with the divergence that `Divergence`
    takes instead; None: it refuses."""
    mixes_reward: bool = False
    """A policy gradient beside it is K1 against the mixture of teacher and student that it is made
    of: its reward is "proximal" with its own parameter."""

    @property
    def generator(self) -> bool:
        return self.kl_weights is None and not self.by_token

    @property
    def by_token(self) -> bool:
        """A sum of the two with weights that differ from token to token."""
        return self.by_gaps or self.by_mixing

    @property
    def forward_kl(self) -> bool:
        """The forward KL is a term of it."""
        return self.by_token or (self.kl_weights is not None and self.kl_weights[0] != 0)

    @property
    def reverse_kl(self) -> bool:
        """The reverse KL is a term of it."""
        return self.by_token or (self.kl_weights is not None and self.kl_weights[1] != 0)

    @property
    def knobs(self) -> tuple[str, ...]:
        """The arguments that `Divergence` takes for it."""
        own = () if self.parameter is None else (self.parameter,)
        return (*own, "top_k", "top_k_tail", "top_k_ids") if self.takes_top_k else own

    @property
    def takes_top_k(self) -> bool:
        """`Divergence` may be told to sum over a set K."""
        return self.ids == "either" or self.on_k is not None


_KLS = (0.0, "forward_kl"), (1.0, "reverse_kl")
_NOTHING = (0.0, None), (1.0, None)
_SHARE = (0.0, 1.0)

DIVERGENCES: dict[str, DivergenceSpec] = {
    "forward_kl": DivergenceSpec(kl_weights=(1.0, 0.0), ids="either"),
    "reverse_kl": DivergenceSpec(kl_weights=(0.0, 1.0), on_k="topk_reverse_kl"),
    "jeffreys": DivergenceSpec(kl_weights=(1.0, 1.0)),
    "mixed": DivergenceSpec(by_mixing=True),
    "akl": DivergenceSpec(by_gaps=True, parameter="head_mass", bounds=_SHARE, limits=_NOTHING),
    "jsd": DivergenceSpec(parameter="beta", bounds=_SHARE, limits=_KLS),
    "skew_forward": DivergenceSpec(parameter="alpha", default=0.1, bounds=_SHARE, limits=_NOTHING),
    "skew_reverse": DivergenceSpec(parameter="alpha", default=0.1, bounds=_SHARE, limits=_NOTHING),
    "alpha": DivergenceSpec(parameter="alpha", limits=_KLS),
    "chi2": DivergenceSpec(),
    "total_variation": DivergenceSpec(),
    "todi": DivergenceSpec(),
    "mopd": DivergenceSpec(ids="top_k"),
    "topk_jsd": DivergenceSpec(
        ids="top_k", parameter="beta", bounds=_SHARE, limits=_NOTHING, mixes_reward=True
    ),
    "topk_reverse_kl": DivergenceSpec(ids="top_k", has_tails=True),
}
#: Of a rule that names none.
NO_DIVERGENCE = DivergenceSpec(kl_weights=(0.0, 0.0))


def check_parameter(
    divergence: str, value: Any, name: str = "divergence_parameter", *, take_limits: bool = False
) -> None:
    """Raises where `divergence` has no value at this parameter, called `name`. take_limits: a limit
    that is another divergence will do."""
    spec = DIVERGENCES[divergence]
    number(name, value, *spec.bounds)
    for limit, instead in spec.limits:
        if value == limit and not (take_limits and instead):
            raise ValueError(
                f"{name}={value!r} is a degenerate limit of {divergence!r}: choose one strictly "
                "between, or 'forward_kl' or 'reverse_kl'"
            )
