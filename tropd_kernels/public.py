"""The names that `tropd_kernels` has for its users."""

from .backends import available_backends
from .functional import (
    DistillationOutput,
    TokenStats,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)
from .loss.plan import ChunkPlan, plan_chunks
from .modules import DistillationLoss, LinearDistillationLoss, LinearLogProbs
from .objectives import (
    AOPD,
    CADENCE,
    EOPD,
    GKD,
    KDRL,
    LSM,
    MOPD,
    OPD,
    OPDVR,
    REOPOLD,
    SFT,
    TOPD,
    TVOPD,
    ClipOutlier,
    DemoPSD,
    Divergence,
    EntropyOPD,
    ExOPD,
    Log1pOPD,
    MaskOutlier,
    PowerOPD,
    TokenRule,
    TopKJSD,
    TrOPD,
    TrOPD_AOPD,
    Veto,
)
from .teachers import HiddenTeacher, LogitsTeacher, SampledTeacher, TopKTeacher

__all__ = [
    # functions and their modules
    "linear_distillation_loss",
    "distillation_loss",
    "linear_log_probs",
    "LinearDistillationLoss",
    "DistillationLoss",
    "LinearLogProbs",
    "DistillationOutput",
    "TokenStats",
    # teachers
    "HiddenTeacher",
    "LogitsTeacher",
    "TopKTeacher",
    "SampledTeacher",
    # objectives
    "TokenRule",
    "TrOPD",
    "OPD",
    "ClipOutlier",
    "MaskOutlier",
    "EOPD",
    "EntropyOPD",
    "REOPOLD",
    "AOPD",
    "TrOPD_AOPD",
    "PowerOPD",
    "TOPD",
    "Log1pOPD",
    "TVOPD",
    "KDRL",
    "OPDVR",
    "GKD",
    "Divergence",
    "CADENCE",
    "Veto",
    "DemoPSD",
    "ExOPD",
    "LSM",
    "MOPD",
    "TopKJSD",
    "SFT",
    # what will run, and where
    "plan_chunks",
    "ChunkPlan",
    "available_backends",
]
