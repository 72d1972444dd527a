"""Which tokens enter the loss: those that a rule selects by a score.

The scores of all tokens come first, from the logits of the sides that the score is made of. The
loop then walks over the selected tokens alone, so a token that is left out costs no other product:

    entropy                    S + f (3 S + T)
    teacher_entropy            T + f (3 S + T), nothing more than f (3 S + T) where it is given
    reverse_kl                 S + T + f (3 S + T)
    reward, disagreement       likewise, without S where `old_log_probs` are given, and without T of
                               a teacher that gives log-probs
    scores, advantages         f (3 S + T)

with f the share that is selected, S and T as in `plan`. On a GPU a selection waits for the device
once, to know how many tokens there are: ties, prefixes and rows that hold NaN come on top of the
number that a fraction names.

Where one chunk holds all tokens, as in a micro-batch, the logits that the score has read are still
there: the rows of the selected tokens are copied, and made no second time. In longer batches they
are made again. In units of S, at f = 0.1 and 0.3, with T = 2 S:

                             all tokens    one chunk     several
    entropy, sampled         3             1.2   1.6     1.3   1.9
    entropy, dense           5             1.4   2.2     1.5   2.5
    teacher_entropy          5             2.3   2.9     2.5   3.5
    reverse_kl               5             3.2   3.6     3.5   4.5

Several chunks could keep rows as well. With a threshold, each would drop its own tokens; a GPU
would then wait in every chunk. With a fraction, which tokens enter is known after the last chunk:
until then the highest rows so far would be kept, some f N (1 + ln 1/f) copies in all, and memory
would grow with N. Copies of 8 V bytes a row cost less than products of 2 V H FLOP only where a
processor multiplies slowly, so neither is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import TokenRule
from ..rows.layout import Coef, Matrices, RowOptions, Stat, TokenInputs
from ..rows.rule import gate, topk_entropy
from ..rows.topk_teacher import topk_teacher_ids
from .problem import Problem

#: STUDENT_LOG_SUM of a token that was left out, by which a backward knows it: no row has one below
#: 0.
LEFT_OUT = -1.0

#: Logits of the selected tokens, of student and teacher (or what stands in for the teacher's),
#: where a score has read them and they need not be made again.
Kept = tuple[Tensor | None, Tensor | None]
NONE_KEPT: Kept = (None, None)


@dataclass(frozen=True)
class Selection:
    """What a first pass knows of the n tokens that count: statistics and coefficients of those that
    are left out, the scores, NaN at tokens that are not ranked, the places of those that are
    selected, and logits of theirs that need not be made again."""

    stats: Tensor
    coefs: Tensor
    score: Tensor
    chosen: Tensor
    kept: Kept

    def completed(self, stats: Tensor, coefs: Tensor) -> Matrices:
        """Statistics and coefficients of all tokens, with these of the selected ones."""
        return (
            self.stats.index_copy_(1, self.chosen, stats),
            self.coefs.index_copy_(1, self.chosen, coefs),
        )


def sides_read(problem: Problem) -> tuple[bool, bool]:
    """Whether the rule's score is made of the student's logits, and of the teacher's."""
    rule, inputs = problem.options.rule, problem.inputs
    if rule.score == "reward" and inputs.advantages is not None:
        return False, False
    relative = rule.score == "disagreement" or (
        rule.score == "reward" and rule.reward_policy == "old"
    )
    student = rule.score_reads_student and not (relative and inputs.old_log_probs is not None)
    teacher = rule.score_reads_teacher and problem.teacher is not None
    return student or (teacher and rule.student_power != 0), teacher


def keep_known(stats: Tensor, made: Tensor, student: bool, teacher: bool) -> None:
    """Copies what a first pass made (Stat, n) of the sides read. If only the teacher is
    read, the engine got its logits as the student's."""
    rows = {Stat.LOG_PROB: Stat.LOG_PROB, Stat.ENTROPY: Stat.ENTROPY}
    if student and teacher:
        others = (
            Stat.TEACHER_LOG_PROB, Stat.TEACHER_ENTROPY, Stat.FORWARD_KL, Stat.REVERSE_KL
        )  # fmt: skip
        rows |= {row: row for row in others}
    elif teacher:
        rows = {Stat.TEACHER_LOG_PROB: Stat.LOG_PROB, Stat.TEACHER_ENTROPY: Stat.ENTROPY}
    for row, source in rows.items():  # one by one: a list of rows would be copied to the device
        stats[row] = made[source]


def keep_given(stats: Tensor, inputs: TokenInputs, vocab_size: int) -> None:
    """Fills in what a teacher gives that is not dense."""
    if inputs.label_log_probs is not None:
        stats[Stat.TEACHER_LOG_PROB] = inputs.label_log_probs
    if inputs.teacher_entropy is not None:
        stats[Stat.TEACHER_ENTROPY] = inputs.teacher_entropy
    elif inputs.topk_log_probs is not None:
        ids, log_probs = inputs.topk
        known = topk_teacher_ids(ids, log_probs.to(stats.dtype), None, vocab_size)[1]
        stats[Stat.TEACHER_ENTROPY] = topk_entropy(known)


def scores(stats: Tensor, batch: TokenInputs, options: RowOptions) -> Tensor:
    """(n,), from statistics (Stat, n) that hold what the sides read give."""
    score = options.rule.score
    if score == "scores":
        assert batch.scores is not None
        return batch.scores.to(stats.dtype)
    if score == "disagreement":
        lo = stats[Stat.LOG_PROB] if batch.old_log_probs is None else batch.old_log_probs
        return (stats[Stat.TEACHER_LOG_PROB] - lo).abs()
    if score == "reward":
        return gate(stats, batch, options).reward
    named = {"entropy": Stat.ENTROPY, "teacher_entropy": Stat.TEACHER_ENTROPY}
    return stats[named.get(str(score), Stat.REVERSE_KL)]


def selected(score: Tensor, rule: TokenRule) -> Tensor:
    """Which tokens (n,) the rule selects by their scores; one without a score (NaN) enters."""
    # Between two infinite scores there is nothing to interpolate.
    most = torch.finfo(score.dtype).max / 4
    # In float64, so that every dtype selects as many.
    ranked = score.clamp(-most, most).double()
    if rule.select_threshold is not None:
        return ~(ranked < rule.select_threshold)
    if rule.fraction is None or ranked.numel() == 0:
        return torch.ones_like(ranked, dtype=torch.bool)
    return ~(ranked < torch.nanquantile(ranked, 1 - rule.fraction))


def without_left_out(coefs: Tensor, index: Tensor | None) -> Tensor:
    """Of the tokens `index` (None: all), those that were selected, by their coefficients (Coef,
    N)."""
    log_sums = coefs[Coef.STUDENT_LOG_SUM]
    if index is None:
        return (log_sums != LEFT_OUT).nonzero().squeeze(-1)
    return index[log_sums[index] != LEFT_OUT]
