"""f-divergences from one generator.

With u = p/q, a divergence sum q f(u) has dL/dz = pg - p sum(pg), pg = p g, g = f'(u) up to a
constant. Each is two functions of (lp, lq): q f(u) and p g, formed as products of probabilities so
that u itself, which overflows, is never formed. 0 log 0 = 0.

| kind            | q f(u)                                         | p g                           |
|-----------------|------------------------------------------------|-------------------------------|
| jsd             | c q (lq - lm) + (1-c) p (lp - lm)              | (1-c) p (lp - lm)             |
| skew_forward    | q (lq - lm)                                    | -(1-c) p q / m                |
| skew_reverse    | p (lp - lm), m = c p + (1-c) q                 | p (lp - lm) + (1-c) p q / m   |
| topk_jsd        | c q (lq - lm)                                  | -c (1-c) p q / m              |
| alpha           | (p^c q^(1-c) - c p - (1-c) q) / (c (c-1))      | (p^c q^(1-c) - p) / (c-1)     |
| chi2            | p^2/q - 2 p + q                                | 2 (p^2/q - p)                 |
| total_variation | abs(p - q) / 2                                 | p sign(p - q) / 2             |
| todi            | s q (lq - lp) + (1-s) p (lp - lq), s = q/(p+q) | -s q + (1-s) p (lp - lq + 1)  |
| mopd            | p (lp - lq) - p + q                            | p (lp - lq)                   |
| topk_reverse_kl | p (lp - lq)                                    | p (lp - lq)                   |

with m = c q + (1-c) p but for skew_reverse, lm = log m. The last is no f-divergence: what its tails
add to value and gradient is in `rule.reverse_kl`. Agarwal et al. (2306.13649) for jsd, Ko et al.
(2402.03898) for the skewed KLs, ToDi (2505.16297), the survey (2606.22793) for mopd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generator_terms(kind: str, c: float, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """q f(u) and p g for every entry of lp and lq (same shape; -inf where a side excludes the
    id)."""
    p, q = lp.exp(), lq.exp()
    if kind in ("jsd", "skew_forward", "skew_reverse", "topk_jsd"):
        first, second = (lp, lq) if kind == "skew_reverse" else (lq, lp)
        lm = torch.logaddexp(first + math.log(c), second + math.log1p(-c))
        student = _product(p, lp - lm)
        both = (lp + lq - lm).exp().nan_to_num_(nan=0.0)  # p q / m
        if kind == "jsd":
            return c * _product(q, lq - lm) + (1 - c) * student, (1 - c) * student
        if kind == "skew_forward":
            return _product(q, lq - lm), -(1 - c) * both
        if kind == "skew_reverse":
            return student, student + (1 - c) * both
        return c * _product(q, lq - lm), -c * (1 - c) * both
    if kind in ("alpha", "chi2"):
        c = 2.0 if kind == "chi2" else c
        power = _log_product(c, lp, lq).exp()
        value, gradient = (power - c * p - (1 - c) * q) / (c * (c - 1)), (power - p) / (c - 1)
        return (2 * value, 2 * gradient) if kind == "chi2" else (value, gradient)
    if kind == "total_variation":
        return (p - q).abs() / 2, p * torch.sign(p - q) / 2
    reverse = _product(p, lp - lq)
    if kind == "mopd":
        return reverse - p + q, reverse
    if kind == "topk_reverse_kl":
        return reverse, reverse
    if kind == "todi":
        to_teacher = torch.sigmoid(lq - lp).nan_to_num_(nan=0.5)
        away = (1 - to_teacher) * reverse
        forward = to_teacher * _product(q, lq - lp)
        return forward + away, away + (1 - to_teacher) * p - to_teacher * q
    raise ValueError(f"unknown generator {kind!r}")


def _product(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight > 0, weight * value, 0.0)


def _log_product(c: float, lp: Tensor, lq: Tensor) -> Tensor:
    """c lp + (1 - c) lq. An id that a side excludes has power 0, or infinity at a negative
    exponent; one that both exclude has 0."""
    exponent = c * lp + (1 - c) * lq
    return torch.where((lp == -math.inf) & (lq == -math.inf), -math.inf, exponent)
