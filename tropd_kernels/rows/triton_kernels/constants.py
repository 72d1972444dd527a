"""Row numbers of the matrices, and other constants that kernels read."""

import torch
import triton.language as tl

from ..layout import Coef as _Coef
from ..layout import Stat as _Stat
from ..rule import least_tail as _least_tail

LOG_PROB = tl.constexpr(int(_Stat.LOG_PROB))
TEACHER_LOG_PROB = tl.constexpr(int(_Stat.TEACHER_LOG_PROB))
ENTROPY = tl.constexpr(int(_Stat.ENTROPY))
TEACHER_ENTROPY = tl.constexpr(int(_Stat.TEACHER_ENTROPY))
FORWARD_KL = tl.constexpr(int(_Stat.FORWARD_KL))
REVERSE_KL = tl.constexpr(int(_Stat.REVERSE_KL))
REWARD = tl.constexpr(int(_Stat.REWARD))
TRUST = tl.constexpr(int(_Stat.TRUST))
STAT_OUTLIER = tl.constexpr(int(_Stat.OUTLIER))
TEACHER_TOPK_MASS = tl.constexpr(int(_Stat.TEACHER_TOPK_MASS))
STUDENT_TOPK_MASS = tl.constexpr(int(_Stat.STUDENT_TOPK_MASS))
TOKEN_LOSS = tl.constexpr(int(_Stat.TOKEN_LOSS))
KEPT = tl.constexpr(int(_Stat.KEPT))
LSE = tl.constexpr(int(_Stat.LSE))
STUDENT_MAX = tl.constexpr(int(_Coef.STUDENT_MAX))
STUDENT_LOG_SUM = tl.constexpr(int(_Coef.STUDENT_LOG_SUM))
TEACHER_MAX = tl.constexpr(int(_Coef.TEACHER_MAX))
TEACHER_LOG_SUM = tl.constexpr(int(_Coef.TEACHER_LOG_SUM))
C_ENTROPY = tl.constexpr(int(_Coef.ENTROPY))
C_REVERSE_KL = tl.constexpr(int(_Coef.REVERSE_KL))
C_THRESHOLD = tl.constexpr(int(_Coef.THRESHOLD))
C_MEAN_GAP = tl.constexpr(int(_Coef.MEAN_GAP))
C_P = tl.constexpr(int(_Coef.P))
C_P_TOP_K = tl.constexpr(int(_Coef.P_TOP_K))
C_REVERSE = tl.constexpr(int(_Coef.REVERSE))
C_ENTROPY_WEIGHT = tl.constexpr(int(_Coef.ENTROPY_WEIGHT))
C_Q = tl.constexpr(int(_Coef.Q))
C_LABEL = tl.constexpr(int(_Coef.LABEL))
C_GENERATOR = tl.constexpr(int(_Coef.GENERATOR))
C_UNIFORM = tl.constexpr(int(_Coef.UNIFORM))
# Rows of the scratch matrix between the sums and the rule.
TEACHER_MASS = tl.constexpr(0)
STUDENT_MASS = tl.constexpr(1)
TEACHER_TAIL = tl.constexpr(2)
STUDENT_TAIL = tl.constexpr(3)
STUDENT_LOG_MASS = tl.constexpr(4)
SUM_FORWARD_KL = tl.constexpr(5)
SUM_VALUE = tl.constexpr(6)
SUM_SLOPE = tl.constexpr(7)
SUMS = 8
# `rule.least_tail`.
LEAST_TAIL_32 = tl.constexpr(_least_tail(torch.float32))
LEAST_TAIL_64 = tl.constexpr(_least_tail(torch.float64))
TINY_32 = tl.constexpr(torch.finfo(torch.float32).tiny)
TINY_64 = tl.constexpr(torch.finfo(torch.float64).tiny)
INF = tl.constexpr(float("inf"))


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """`ACC` of the kernels, from the dtype of the matrices."""
    return tl.float64 if dtype == torch.float64 else tl.float32
