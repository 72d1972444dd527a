"""Distillation objectives as data.

A `TokenRule` says how one token's statistics become a loss and a handful of per-row numbers; the
fused kernels need nothing else (see `rows/`). Every published objective here is a named constructor
that fills in a rule: `TrOPD()`, `OPD()`, `GKD()`, ... A rule is frozen, checked when it is made,
and its `repr` can be pasted back.

Symbols, at one position: p student, q teacher, y the token, lp = log p(y), lq = log q(y),
lo = log-probability of y under the policy that sampled it (lp, detached, where none is given),
rho = exp(lp - lo), R0 = sg(lq - lo), R = T(R0), clipped, or the caller's advantages, A the caller's
task advantages, K the teacher's top-k ids, or those of `top_k_ids`.

On a token that the student sampled, a rule's loss is

    policy_gradient * (-(R' + task_weight * A) * rho)
                                    K1 as a policy gradient; PPO-clipped if asked
  + KL_K(q || p)                    where `outlier` or `forward_kl_entropy` choose it
  + divergence(p, q)                `divergence`: exact, over the vocabulary (or on K)
  - nll_weight * ((1 - label_smoothing) * lp + label_smoothing * mean of log p over all ids)
  - entropy_coef * H(p)
  + z_loss * lse^2                lse = logsumexp of the student's transformed logits

where the gate M splits the tokens: inside (M = 1) R' = R; outside, `outlier` decides, and A counts
with R' = 0 where it names no reward. On a token of a teacher-written prefix the loss is
prefix_weight * (sg(lq) - lp), or the same as everywhere where `prefix_weight` is None.

Sources: TrOPD (arXiv 2606.01249), GKD (2306.13649), EOPD (2603.07079), REOPOLD (2603.11137), AOPD
(2605.06387), AKL (2404.02657), ToDi (2505.16297), DistiLLM's skewed KL (2402.03898), the on-policy
distillation survey (2606.22793), Thinking Machines' on-policy distillation (tinker-cookbook); of
task advantages KDRL (2506.02208), of their filter OPDVR (2608.24696), of `reward_policy` AsyncOPD
(2606.24143); of the reward's transforms those that `rewards` names.
"""

from __future__ import annotations

from ast import literal_eval
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from .rule_checks import check_rule
from .rule_fields import RuleFields


@dataclass(frozen=True, repr=False)
class TokenRule(RuleFields):
    __doc__ = RuleFields.__doc__

    def __post_init__(self):
        check_rule(self)
        for f in fields(self):  # a NumPy number is a float, but is not written like one
            value = getattr(self, f.name)
            if isinstance(value, float) and type(value) is not float:
                object.__setattr__(self, f.name, float(value))
        # An f-string rather than json, which torch.compile cannot trace.
        given = [_known(getattr(self, name)) for name in _FIELDS]
        object.__setattr__(self, "_key", ";".join([f"{value!r}" for value in given]))

    def __repr__(self):
        changed = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"TokenRule({', '.join(changed)})"

    @property
    def key(self) -> str:
        """The rule as a string, for the custom op's schema: `decode_rule(rule.key) == rule`. No
        field, or `TokenRule(**asdict(rule))` would not give the rule back."""
        return self._key  # type: ignore[attr-defined]

    def of_all(self) -> TokenRule:
        """The same rule for all tokens."""
        nothing = dict.fromkeys(
            ("select_by", "select_fraction", "select_threshold", "entropy_top_fraction")
        )
        powers = {}
        if not self.terms_use_teacher:  # only the score did
            powers = {"teacher_power": 1.0, "student_power": 0.0, "reference_power": 0.0}
        return replace(self, **nothing, **powers)  # type: ignore[arg-type]


_FIELDS = tuple(f.name for f in fields(TokenRule))


@lru_cache(maxsize=256)
def decode_rule(key: str) -> TokenRule:
    """The rule with this `key`."""
    values = map(literal_eval, key.split(";"))
    return TokenRule(**dict(zip(_FIELDS, values, strict=True)))


def _known(value):
    """The value itself; where torch.compile traces a symbol for it, the number that the graph is
    made for."""
    return float.fromhex(value.hex()) if isinstance(value, float) else value
