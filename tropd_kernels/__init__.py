"""Fused on-policy distillation losses for large vocabularies. See README.md."""

from .backends import available_backends
from .chunking import ChunkPlan, plan_chunks
from .functional import (
    DistillationOutput,
    TokenStats,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)
from .objectives import (
    AOPD,
    EOPD,
    GKD,
    MOPD,
    OPD,
    REOPOLD,
    SFT,
    ClipOutlier,
    Divergence,
    EntropyOPD,
    MaskOutlier,
    TokenRule,
    TopKJSD,
    TrOPD,
)
from .teachers import HiddenTeacher, LogitsTeacher, SampledTeacher, TopKTeacher

__version__ = "0.1.0"
