"""Which tokens count, and errors about values that cannot be right.

Values are looked at on the one host sync that a call has anyway. Where it has none
(`ignore_index=None` on a GPU) a label outside the vocabulary makes its own row NaN, and so does a
top-k teacher's repeated id: ids are distinct within a row, since of an id given twice each backend
would take another share. Padding, ids outside the vocabulary and entries of log-prob -inf, may
repeat: it carries no mass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..rows.topk_teacher import repeats
from .problem import Problem

#: How far above 0 a log-prob may lie: a logit of up to 64, rounded to bf16, less the log-sum-exp
#: of logits that were not.
LOG_PROB_MARGIN = 0.125


def may_look(problem: Problem) -> bool:
    """Values can be looked at without a sync of their own."""
    return problem.options.ignore_index is not None or problem.labels.device.type == "cpu"


def tokens_that_count(problem: Problem) -> Tensor | None:
    """Indices of the tokens that count, or None where all do. Raises ValueError on values that
    cannot be right: labels outside the vocabulary, weights, advantages or scores that are not
    finite, draws, mixing or blending weights out of range, given log-probs above 0 or NaN,
    ids that repeat, or that the vocabulary does not have."""
    labels, inputs, ignore_index = problem.labels, problem.inputs, problem.options.ignore_index
    if not may_look(problem):
        return None  # it would wait for the GPU
    counts = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        counts = labels != ignore_index
        if inputs.token_weight is not None:
            counts &= inputs.token_weight != 0
    outside = ((labels < 0) | (labels >= problem.vocab_size)) & counts
    checks = {"label": outside.any()}
    for name in ("token_weight", "advantages", "task_advantages", "old_log_probs", "scores"):
        values = getattr(inputs, name)
        if values is not None:
            checks[name] = (~values.isfinite() & counts).any()
    if inputs.uniforms is not None:
        u = inputs.uniforms
        checks["uniforms"] = (~((u >= 0) & (u < 1)) & counts).any()
    for name in ("mixing", "blending"):
        w = getattr(inputs, name)
        if w is not None:
            checks[name] = (~((w >= 0) & (w <= 1)) & counts).any()
    for name, values in _given_log_probs(problem, counts).items():
        checks[name] = (~(values <= LOG_PROB_MARGIN)).any()  # NaN, too
    if inputs.ids is not None:
        checks["ids"] = (repeated(problem) & counts).any()
        if inputs.topk_log_probs is None:
            checks["a given id"] = (_no_ids(problem) & counts.unsqueeze(-1)).any()
    count, *bad = torch.stack([counts.sum(), *checks.values()]).tolist()
    for name, found in zip(checks, bad, strict=True):
        if found:
            _raise_bad_value(name, problem, outside, counts)
    if ignore_index is None or count == labels.shape[0]:
        return None
    # A stable sort instead of nonzero(): the count is known, so it needs no sync of its own.
    return torch.argsort(~counts, stable=True)[:count]


def repeated(problem: Problem) -> Tensor:
    """(N,): tokens of which a top-k teacher, or the caller, gives an id twice."""
    inputs = problem.inputs
    assert inputs.ids is not None
    return repeats(inputs.ids, inputs.topk_log_probs, problem.vocab_size).any(-1)


def _no_ids(problem: Problem) -> Tensor:
    """(N, K): the caller's ids that are neither ids of the vocabulary nor padding."""
    ids = problem.inputs.ids
    assert ids is not None
    return (ids < -1) | (ids >= problem.vocab_size)


def with_repeats_marked(problem: Problem) -> Problem:
    """The problem, with NaN for the teacher's log-prob in rows with a repeated id, where that
    cannot raise."""
    known = problem.inputs.label_log_probs
    if problem.inputs.ids is None or known is None or may_look(problem):
        return problem
    marked = known.masked_fill(repeated(problem), torch.nan)
    return replace(problem, inputs=replace(problem.inputs, label_log_probs=marked))


def _raise_repeated(problem: Problem, counts: Tensor) -> None:
    """For a token that counts (N,)."""
    token = int((repeated(problem) & counts).nonzero()[0])
    inputs = problem.inputs
    assert inputs.ids is not None
    ids, log_probs = inputs.ids[[token]], inputs.topk_log_probs
    if log_probs is not None:
        log_probs = log_probs[[token]]
        ids = torch.where(log_probs != -torch.inf, ids, -1)
    same = repeats(ids, log_probs, problem.vocab_size)
    twice = next(int(i) for i in ids[0] if i >= 0 and (ids[0] == i).sum() > 1)
    if log_probs is None:
        raise ValueError(
            f"ids hold {twice} twice at token {token} (of the flat batch): the ids of a token must "
            "be distinct, padding is -1"
        )
    raise ValueError(
        f"teacher ids hold {twice} twice at token {token} (of the flat batch), and "
        f"{int(same.sum())} repeats in all there: the ids of a token must be distinct, padding has "
        "log-prob -inf or an id outside the vocabulary; check what the teacher returns, and that "
        "lists of several sources were merged"
    )


def _given_log_probs(problem: Problem, counts: Tensor) -> dict[str, Tensor]:
    """Log-probs that the caller gives, by the names of `_WHOSE`, with -inf in padding and at tokens
    that do not count."""
    inputs, found = problem.inputs, {}
    for name, values in (("sampled", inputs.old_log_probs), ("label", inputs.label_log_probs)):
        if values is not None:
            found[f"{name} log-probs"] = torch.where(counts, values, -torch.inf)
    if inputs.topk_log_probs is not None:
        ids, log_probs = inputs.topk
        valid = (ids >= 0) & (ids < problem.vocab_size) & counts[:, None]
        found["top-k log-probs"] = torch.where(valid, log_probs, -torch.inf)
    return found


def _raise_bad_value(name: str, problem: Problem, outside: Tensor, counts: Tensor) -> None:
    """For the first of `tokens_that_count`'s checks that found something."""
    if name == "label":
        label = int(problem.labels[outside][0])
        held = "" if problem.shard is None else problem.shard.describe_shards()
        raise ValueError(
            f"label {label} lies outside the vocabulary of {problem.vocab_size} ids that student "
            f"and teacher share{held}, and is not ignore_index={problem.options.ignore_index}: "
            "mask such tokens, or check that labels and model use the same tokenizer"
        )
    if name == "ids":
        _raise_repeated(problem, counts)
    if name == "a given id":
        wrong = _no_ids(problem) & counts.unsqueeze(-1)
        ids = problem.inputs.ids
        assert ids is not None
        raise ValueError(
            f"ids hold {int(ids[wrong][0])} at token {int(wrong.any(-1).nonzero()[0])} (of the "
            f"flat batch), which is none of the {problem.vocab_size} ids that student and teacher "
            "share, nor -1, the padding"
        )
    if name == "uniforms":
        raise ValueError("uniforms must lie in [0, 1), as torch.rand draws them")
    if name == "mixing":
        raise ValueError("mixing must lie in [0, 1]: 1 is the forward KL, 0 the reverse KL")
    if name == "blending":
        raise ValueError("blending must lie in [0, 1]: 1 is the rule's target, 0 the teacher")
    if name in _WHOSE:
        _raise_not_log_probs(name, _given_log_probs(problem, counts)[name])
    raise ValueError(
        f"{name} holds values that are not finite, at tokens that count: leave such tokens out by "
        "a label of ignore_index or a token_weight of 0"
    )


#: What errors call log-probs that are given, and who gives them.
_WHOSE = {
    "sampled log-probs": ("old_log_probs", "policy that sampled"),
    "label log-probs": ("teacher label_log_probs", "teacher"),
    "top-k log-probs": ("teacher log_probs", "teacher"),
}


def _raise_not_log_probs(name: str, values: Tensor) -> None:
    public, giver = _WHOSE[name]
    if values.isnan().any():
        padding = "; padding is -inf" if name == "top-k log-probs" else ""
        raise ValueError(
            f"{public} hold NaN at tokens that count{padding}: check what the {giver} returns"
        )
    values = values[values > -torch.inf]
    cause = f"check what the {giver} returns"
    if not (values < 0).any():
        probabilities = values.max() <= 1 + LOG_PROB_MARGIN
        cause = (
            "they look like probabilities: pass their logarithm"
            if probabilities
            # The likeliest ids' logits are all above 0, too.
            else "they look like negative log-likelihoods: pass them with the sign changed; or, if "
            "they are logits, less the logsumexp over the vocabulary"
        )
    raise ValueError(
        f"{public} hold values above 0, up to {values.max():.3g}, at tokens that count, "
        f"which no log-prob is: {cause}"
    )
