"""Small calls that a test spoils in one argument, and the check of the error's words."""

from __future__ import annotations

import math

import pytest
import torch

from tropd_kernels import (
    OPD,
    HiddenTeacher,
    SampledTeacher,
    TopKTeacher,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)

BACKENDS = ["reference", "torch", "native", "triton"]
#: Batch, vocabulary, width of student and teacher.
SHAPE, V, H, G, K = (2, 3), 7, 4, 5, 3
INF, NAN = math.inf, math.nan
# Where a value of the wrong type may be called either.
WRONG = (TypeError, ValueError)


def refused(call, error, *words):
    """The error, of exactly one of these types, with all of these words in its message."""
    with pytest.raises(error) as caught:
        call()
    errors = error if isinstance(error, tuple) else (error,)
    assert caught.type in errors, caught.value
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message) < 1500  # nobody reads an argument of a megabyte


def of(*size, **more):
    return torch.randn(size, **more)


def filled(value, shape=SHAPE, **more):
    return torch.full(shape, value, **more)


def labels(*shape):
    return torch.zeros(shape or SHAPE, dtype=torch.int64)


def hidden_teacher(**changes):
    return HiddenTeacher(**(dict(hidden=of(*SHAPE, G), weight=of(V, G)) | changes))


def top_k_teacher(**changes):
    ids = torch.arange(K).expand(*SHAPE, K)
    given = dict(ids=ids, log_probs=of(*SHAPE, K) - 9, label_log_probs=of(*SHAPE) - 9)
    return TopKTeacher(**(given | changes))


def sampled_teacher():
    return SampledTeacher(of(*SHAPE) - 9)


def head_loss(**changes):
    """A call in which nothing is wrong but the changes."""
    given = dict(
        hidden=of(*SHAPE, H), weight=of(V, H), labels=labels(), teacher=hidden_teacher(),
        objective=OPD(), backend="torch",
    )  # fmt: skip
    return linear_distillation_loss(**(given | changes))


def logits_loss(**changes):
    given = dict(
        logits=of(*SHAPE, V), labels=labels(), teacher=hidden_teacher(), objective=OPD(),
        backend="torch",
    )  # fmt: skip
    return distillation_loss(**(given | changes))


def log_probs(**changes):
    given = dict(hidden=of(*SHAPE, H), weight=of(V, H), labels=labels(), backend="torch")
    return linear_log_probs(**(given | changes))
