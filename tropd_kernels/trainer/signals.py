"""Log-probs of a teacher outside this process, as tensors of a generation batch.

| from                    | ids, log_probs (B, C, K)        | label_log_probs (B, C)   |
|-------------------------|---------------------------------|--------------------------|
| a server (`server.py`)  | `prompt_logprobs`, K = top_k    | likewise                 |
| columns of the data set | teacher_ids, teacher_log_probs  | teacher_label_log_probs  |
| a server of states      | teacher_hidden (B, C, H), for the teacher's head           |

With columns the completions are fixed too, in `completion_ids`, since log-probs belong to tokens.
TRL shuffles and splits the tensors with their completions; the loss gets them as a `TopKTeacher` or
`SampledTeacher`.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..objectives import TokenRule
from ..teachers import SampledTeacher, TopKTeacher, check_serves
from .completions import HiddenStates, TokenScores
from .log_probs import MARGIN, check_labels, impossible_masses

COMPLETION = "completion_ids"
LABEL, IDS, LOG_PROBS = "teacher_label_log_probs", "teacher_ids", "teacher_log_probs"
HIDDEN = "teacher_hidden"
#: Tolerance between two columns' values for one log-prob, which may be stored in bfloat16.
_RELATIVE, _ABSOLUTE = 0.02, 0.05


def columns_of(rules: Sequence[TokenRule]) -> tuple[str, ...]:
    """Columns that a data set needs for an objective with these rules."""
    if not any(rule.uses_teacher for rule in rules):
        return (COMPLETION,)
    on_k = any(rule.uses_top_k for rule in rules)
    return (COMPLETION, LABEL) + ((IDS, LOG_PROBS) if on_k else ())


def check_served(rule: TokenRule) -> None:
    """Raises ValueError if the rule needs more than log-probs of a few ids."""
    k = required_top_k(rule)
    zeros = torch.zeros(1, k)
    known = (
        SampledTeacher(zeros.sum(1)) if k == 0 else TopKTeacher(zeros.long(), zeros, zeros[:, 0])
    )
    check_serves(known, rule)


def required_top_k(rule: TokenRule) -> int:
    """The number of likeliest ids per token whose log-probs this rule needs."""
    return rule.top_k if rule.uses_top_k else 0


def batch_tensors(
    scores: Sequence[TokenScores | HiddenStates], width: int, device: Any
) -> dict[str, Tensor]:
    """Stacks one TokenScores per completion into tensors (B, width) and (B, width, K), or one
    HiddenStates into one (B, width, H).

    Values beyond a completion's end are filled in and have no effect.
    """
    states = [s.states for s in scores if isinstance(s, HiddenStates)]
    if states:
        return {HIDDEN: _stack(states, width, 0.0).to(device)}
    known = [s for s in scores if isinstance(s, TokenScores)]
    batch = {LABEL: _stack([s.label_log_probs for s in known], width, 0.0)}
    if known and known[0].ids is not None:
        batch[IDS] = _stack([s.ids for s in known], width, -1)
        batch[LOG_PROBS] = _stack([s.log_probs for s in known], width, -torch.inf)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def teacher_of(inputs: Mapping[str, Any]) -> TopKTeacher | SampledTeacher | None:
    """The teacher of a micro-batch that holds such tensors."""
    if IDS in inputs:
        return TopKTeacher(inputs[IDS], inputs[LOG_PROBS], inputs[LABEL])
    return SampledTeacher(inputs[LABEL]) if LABEL in inputs else None


def fixed_completions(rows: Sequence[Mapping[str, Any]], limit: int) -> list[list[int]]:
    """The first `limit` ids of each row's completion. Raises ValueError for an empty one."""
    return [_completion(row)[:limit] for row in rows]


def column_scores(rows: Sequence[Mapping[str, Any]], limit: int, top_k: int) -> list[TokenScores]:
    """Scores of the first `limit` tokens of each row.

    Raises ValueError, with the column's name, for a column that is not as long as its completion
    or holds fewer than `top_k` ids per token.
    """
    return [_row_scores(row, limit, top_k) for row in rows]


def _row_scores(row: Mapping[str, Any], limit: int, top_k: int) -> TokenScores:
    tokens = len(_completion(row))
    label = _log_probs(row, LABEL, tokens, 1)
    try:
        check_labels(label)
    except ValueError as error:
        raise ValueError(f"{LABEL}: {error}") from error
    if not top_k:
        return TokenScores(label[:limit].float())
    ids, log_probs = _column(row, IDS, tokens, 2), _log_probs(row, LOG_PROBS, tokens, 2)
    if ids.shape != log_probs.shape:
        raise ValueError(
            f"{IDS}: must have the shape of {LOG_PROBS}, {tuple(log_probs.shape)}; got "
            f"{tuple(ids.shape)}"
        )
    if ids.shape[1] < top_k:
        raise ValueError(
            f"{IDS}: {ids.shape[1]} ids a token, but the objective's top_k is {top_k}: lower "
            "top_k, or ask the teacher for more"
        )
    _check_agreement(row, label, ids.long(), log_probs)
    return TokenScores(label[:limit].float(), ids[:limit].long(), log_probs[:limit].float())


def _check_agreement(
    row: Mapping[str, Any],
    label: Tensor,  # (C,)
    ids: Tensor,  # (C, K)
    log_probs: Tensor,  # (C, K)
) -> None:
    """Raises ValueError if no distribution has the values of a row's columns at some token."""
    completion = torch.tensor(_completion(row))
    padding = (ids < 0) | (log_probs == -torch.inf)
    ids, log_probs = ids.masked_fill(padding, -1), log_probs.masked_fill(padding, -torch.inf)
    mass, impossible = impossible_masses(completion, label, ids, log_probs)
    ordered = ids.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    odd = impossible | twice.any(1)
    if odd.any():
        at = int(odd.int().argmax())
        raise ValueError(
            f"{IDS}: expected distinct ids whose probabilities sum to more than 0, and with that "
            f"of id {completion[at]} itself to 1 at most, got {ids[at].tolist()!r:.80} with a sum "
            f"of {mass[at]:.4g} at token {at}: id -1 is padding"
        )
    same = ids == completion[:, None]
    far = same & ~torch.isclose(log_probs, label[:, None], _RELATIVE, _ABSOLUTE)
    if far.any():
        at = int(far.any(1).int().argmax())
        raise ValueError(
            f"{LABEL}: {label[at]:.4g} for token {at} (id {completion[at]}), but {LOG_PROBS} has "
            f"{log_probs[at][same[at]].item():.4g} for that id: both belong to the distribution "
            f"that the teacher has before it reads {COMPLETION}[{at}]"
        )


def _log_probs(row: Mapping[str, Any], name: str, tokens: int, dims: int) -> Tensor:
    """A column of log-probs, as `_column` returns it."""
    tensor = _column(row, name, tokens, dims)
    low, high = (tensor.min().item(), tensor.max().item()) if tensor.numel() else (0.0, 0.0)
    if high <= MARGIN:
        return tensor
    looks = "logits: subtract their logsumexp"
    if low >= 0:
        of_one = "probabilities: take their logarithm"
        # Logits of the likeliest ids are all positive, too.
        of_more = "negative log-probs: change their sign; or of logits: subtract their logsumexp"
        looks = of_one if high <= 1 else of_more
    raise ValueError(
        f"{name}: expected log-probs, which are at most 0, got {low:.4g} to {high:.4g}, as of "
        f"{looks}"
    )


def _completion(row: Mapping[str, Any]) -> list[int]:
    ids = row.get(COMPLETION)
    if hasattr(ids, "tolist"):  # a data set with_format("torch") or ("numpy")
        ids = ids.tolist()
    if not isinstance(ids, (list, tuple)) or not ids:
        raise ValueError(
            f"{COMPLETION}: expected a list of at least one id, got {ids!r:.60}: drop such rows"
        )
    odd = next((i for i in ids if isinstance(i, bool) or not isinstance(i, Integral)), None)
    if odd is not None:
        raise ValueError(
            f"{COMPLETION}: expected whole numbers, got {odd!r}: a table with gaps holds its "
            "numbers as floats; drop the gaps and cast the rest to integers"
        )
    if min(ids) < 0:
        raise ValueError(f"{COMPLETION}: holds the id {min(ids)}: take padding off")
    return list(ids)


def _column(row: Mapping[str, Any], name: str, tokens: int, dims: int) -> Tensor:
    """A column of numbers in float64, (tokens,) or (tokens, K)."""
    try:
        tensor = torch.as_tensor(row.get(name), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected numbers, got {row.get(name)!r:.60}") from error
    if tensor.dim() != dims or len(tensor) != tokens or tensor.isnan().any():
        expected = f"{tokens} numbers" if dims == 1 else f"{tokens} rows of K numbers"
        raise ValueError(
            f"{name}: expected {expected} (no NaN), as many as {COMPLETION}; got shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor


def _stack(parts: Sequence[Any], width: int, fill: float) -> Tensor:
    """Stacks parts (C_i,) or (C_i, K_i) into (B, width) or (B, width, K), padded on the right."""
    most = max((part.shape[1] for part in parts if part.dim() == 2), default=0)

    def filled(part: Tensor) -> Tensor:
        further = (0, most - part.shape[1]) if part.dim() == 2 else ()
        return torch.nn.functional.pad(part, (*further, 0, width - len(part)), value=fill)

    return torch.stack([filled(part) for part in parts])
