"""Distillation objectives as data: nothing here computes a loss.

rule               TokenRule: how one token's statistics become its loss
rule_fields        its fields, and what follows from them
divergences        the table of divergences that a rule may name
rewards            the table of transforms of the reward
rule_checks        what a rule refuses when it is made
named              TrOPD() ... ExOPD(): published objectives with a reward on the sampled tokens
named_divergences  SFT(), and Divergence() ... TopKJSD(): those without
registry           objectives and their knobs by name, for a config or a command line
"""

from .divergences import DIVERGENCES, DivergenceSpec
from .named import (
    AOPD,
    EOPD,
    KDRL,
    OPD,
    OPDVR,
    REOPOLD,
    TOPD,
    TVOPD,
    ClipOutlier,
    EntropyOPD,
    ExOPD,
    Log1pOPD,
    MaskOutlier,
    PowerOPD,
    TrOPD,
    TrOPD_AOPD,
)
from .named_divergences import CADENCE, GKD, LSM, MOPD, SFT, DemoPSD, Divergence, TopKJSD, Veto
from .rewards import REWARDS
from .rule import TokenRule, decode_rule
from .rule_checks import GATES, NORMALIZE, OUTLIERS, TAILS
from .rule_fields import STATIC_THRESHOLD

__all__ = [
    "AOPD",
    "CADENCE",
    "DIVERGENCES",
    "EOPD",
    "GATES",
    "GKD",
    "KDRL",
    "LSM",
    "MOPD",
    "NORMALIZE",
    "OPD",
    "OPDVR",
    "OUTLIERS",
    "REOPOLD",
    "REWARDS",
    "SFT",
    "STATIC_THRESHOLD",
    "TAILS",
    "TOPD",
    "TVOPD",
    "ClipOutlier",
    "DemoPSD",
    "Divergence",
    "DivergenceSpec",
    "EntropyOPD",
    "ExOPD",
    "Log1pOPD",
    "MaskOutlier",
    "PowerOPD",
    "TokenRule",
    "TopKJSD",
    "TrOPD",
    "TrOPD_AOPD",
    "Veto",
    "decode_rule",
]
