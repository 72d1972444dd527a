"""Reads the answers of servers: a prompt's log-probs, a text, or a refusal.

A server may shorten a text without an error: vLLM lowers max_tokens to the rest of its context.
`finish_reason` says how a text ended:

    stop      the teacher generated an end, which is the last id and only there; `stop_reason` is
              that id, or None for the tokenizer's eos_token, or text for a stop string
    length    the text has max_tokens tokens, or the server allowed fewer
    others    the server stopped it: abort, error, repetition

A malformed answer raises ValueError with the token's position. Ids of a teacher with a larger
vocabulary are not refused here: the caller knows which ids exist.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .log_probs import MARGIN, check_labels, impossible_masses

#: What vLLM sends for a log-prob of -inf, which JSON does not have.
EXCLUDED = -9999.0
_QUOTED = 300  # characters of a server's answer in an error


@dataclass(frozen=True, eq=False)
class TokenScores:
    """A teacher's log-probs (nats, float32) on one completion of C tokens.

    Attributes:
        label_log_probs: (C,).
        ids: (C, K) int64, the teacher's K likeliest ids, where known.
        log_probs: (C, K), their log-probs.
    """

    label_log_probs: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """A teacher's last hidden states (C, H) that predict the C tokens of one completion."""

    states: Tensor


def read_choices(answer: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """The choices of an answer to `count` prompts, in their order. Raises ValueError for others.

    Raises KeyError or TypeError for an answer without a list of choices.
    """
    choices = answer["choices"]
    indices = [choice.get("index", 0) for choice in choices]
    if sorted(indices) != list(range(count)):
        expected = "the one of index 0" if count == 1 else f"one each of 0 to {count - 1}"
        raise ValueError(f"choices with the indices {indices} came: expected {expected}")
    return sorted(choices, key=lambda choice: choice.get("index", 0))


def read_scores(
    choice: Mapping[str, Any], prompt: Sequence[int], completion: Sequence[int], top_k: int
) -> TokenScores:
    """The completion's part of one choice's `prompt_logprobs`.

    Raises ValueError, with the token's position, for log-probs that are missing or impossible.
    """
    positions = choice.get("prompt_logprobs")
    expected = len(prompt) + len(completion)
    if not isinstance(positions, list) or len(positions) != expected:
        got = len(positions) if isinstance(positions, list) else "none"
        raise ValueError(f"prompt_logprobs for {expected} tokens were asked, {got} came")
    at = [
        {_read_key(i, place): read_log_prob(e["logprob"], place) for i, e in (row or {}).items()}
        for place, row in enumerate(positions[len(prompt) :])
    ]
    remedy = f"start the server with --max-logprobs {top_k}, or lower the objective's top_k"
    return scores_at(at, completion, top_k, remedy)


def scores_at(
    rows: Sequence[Mapping[int, float]], completion: Sequence[int], top_k: int, remedy: str
) -> TokenScores:
    """The scores of a completion from the log-probs {id: value} that came for each of its tokens.

    Raises ValueError, with the token's position, for log-probs that are impossible, or fewer than
    the `top_k` likeliest and the token's own; `remedy` says what to do about that.
    """
    labels, ids, log_probs = [], [], []
    for place, (token, at) in enumerate(zip(completion, rows, strict=True)):
        if any(math.isnan(value) for value in at.values()):
            raise ValueError(f"the log-probs of token {place} hold NaN")
        if max(at.values(), default=0.0) > MARGIN:
            raise ValueError(
                f"the log-probs of token {place} reach {max(at.values()):.4g}, above 0: the server "
                "must give log-probs, not logits"
            )
        # The label's own log-prob is sent even if it is not among the k likeliest.
        best = sorted(at.items(), key=lambda entry: -entry[1])[:top_k]
        if token not in at or len(best) < top_k:
            raise ValueError(
                f"{len(at)} log-probs came for token {place} (id {token}), which should be the "
                f"{top_k} likeliest and its own: {remedy}"
            )
        labels.append(at[token])
        ids.append([i for i, _ in best])
        log_probs.append([value for _, value in best])
    known = torch.tensor(labels, dtype=torch.float32)
    if not top_k:
        check_labels(known)
        return TokenScores(known)
    likeliest = torch.tensor(ids), torch.tensor(log_probs, dtype=torch.float32)
    masses, impossible = impossible_masses(torch.tensor(completion), known, *likeliest)
    if impossible.any():
        place = int(impossible.int().argmax())
        raise ValueError(
            f"the probabilities of token {place} and the {top_k} likeliest ids there sum to "
            f"{masses[place]:.4g}, which no distribution's do: the server must give the natural "
            "logarithms of probabilities, whose sum is more than 0 and 1 at most"
        )
    check_labels(known)
    return TokenScores(known, *likeliest)


def _read_key(sent: str, place: int) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,17}", sent):  # of an int64
        raise ValueError(
            f"{sent!r:.40} is an id of the log-probs of token {place}: expected a whole number of "
            "at least 0"
        )
    return int(sent)


def check_id(sent: Any, what: str) -> int:
    """Raises ValueError for anything but an id."""
    if type(sent) is not int or not 0 <= sent < 2**63:
        raise ValueError(f"{sent!r:.40} came as {what}: expected a whole number of at least 0")
    return sent


def read_log_prob(sent: Any, place: int) -> float:
    """A number as a log-prob. Raises ValueError for anything else."""
    if isinstance(sent, bool) or not isinstance(sent, (int, float)):
        raise ValueError(f"{sent!r:.40} is a log-prob of token {place}: expected a number")
    return -math.inf if sent == EXCLUDED else float(sent)


def no_scores(top_k: int) -> TokenScores:
    """The scores of a completion without tokens."""
    none = torch.zeros(0)
    if not top_k:
        return TokenScores(none)
    return TokenScores(none, torch.zeros((0, top_k), dtype=torch.int64), torch.zeros((0, top_k)))


def read_text(choice: Mapping[str, Any], max_tokens: int) -> list[int]:
    """Token ids of one choice's text.

    Raises ValueError if there are none, or more than `max_tokens`, or fewer without an end of the
    teacher's: a text that was cut must not pass for a whole one.
    """
    ids = choice.get("token_ids")
    if not isinstance(ids, list):
        raise ValueError(
            "no token_ids in its answer: a server that knows return_token_ids is needed to write "
            "prefixes (vLLM 0.10.2 or later), or a data set with a column of prefixes"
        )
    for place, token in enumerate(ids):
        check_id(token, f"id {place} of the text")
    if len(ids) > max_tokens:
        raise ValueError(f"{len(ids)} ids came for a text of at most {max_tokens}")
    reason, cause = choice.get("finish_reason"), choice.get("stop_reason")
    if reason == "stop" and not isinstance(cause, str):
        _check_end(ids, cause)
        return ids
    if reason == "length" and len(ids) == max_tokens:
        return ids
    if reason == "length":
        raise ValueError(
            f"the server cut the text after {len(ids)} of {max_tokens} tokens, before the teacher "
            "ended it: its context (--max-model-len) or a max_new_tokens of its generation config "
            "allows no more; raise that, or lower max_completion_length"
        )
    raise ValueError(
        f"the text broke off after {len(ids)} of {max_tokens} tokens, with finish_reason "
        f"{reason!r} and stop_reason {cause!r}: expected 'stop' at an end that the teacher wrote, "
        "or 'length' at the last token"
    )


def _check_end(ids: Sequence[int], cause: int | None) -> None:
    """Raises ValueError for a text whose last id is not the end that the server reports.

    Without that end the student would continue where the teacher had stopped.
    """
    if not ids or ids[-1] != (ids[-1] if cause is None else cause):
        end = "an end" if cause is None else f"the end {cause}"
        raise ValueError(
            f"finish_reason 'stop' and stop_reason {cause!r} came with {len(ids)} ids, the last of "
            f"them {ids[-1:]}: expected {end} that the teacher wrote as the last id"
        )
    if (first := ids.index(ids[-1])) < len(ids) - 1:
        raise ValueError(
            f"the text goes on after its end, id {ids[-1]}, which is token {first} of {len(ids)}"
        )


def refusal(
    status: int, answer: bytes, remedies: Sequence[tuple[str, str]], known: Mapping[str, Any]
) -> tuple[str, str]:
    """A refusal in the server's own words, and what to do; "" where that is not known.

    remedies: patterns of those words, each with a text that may name what is `known`.
    """
    said = read_json(answer)
    error = said.get("error", said)
    message = error.get("message") if isinstance(error, Mapping) else None
    words = repr(message[:_QUOTED]) if isinstance(message, str) else quote(answer)
    for pattern, remedy in remedies:
        if re.search(pattern, words, re.IGNORECASE):
            return words, remedy.format_map(known)
    return words, "Set VLLM_API_KEY to the server's --api-key" if status in (401, 403) else ""


def is_unknown_id(status: int, answer: bytes) -> bool:
    """Whether a refusal means that the model does not have an id of the prompt."""
    return status == 400 and "vocab" in quote(answer)


def read_json(answer: bytes) -> Mapping[str, Any]:
    """The JSON object of an answer; an empty one if there is none."""
    value = read_any(answer)
    return value if isinstance(value, Mapping) else {}


def read_any(answer: bytes) -> Any:
    """The JSON value of an answer; None if it is none."""
    try:
        return json.loads(answer)
    except ValueError:
        return None


def quote(answer: bytes) -> str:
    """The beginning of a server's answer, for an error."""
    return repr(answer[:_QUOTED].decode(errors="replace"))
