"""A teacher behind HTTP: vLLM's OpenAI-compatible server, or whatever speaks its protocol.

    GET  /v1/models                    the served name, where none is given
    POST /v1/completions               prompt (ids), prompt_logprobs=k, max_tokens=1: log-probs of
                                       given tokens, {id: {"logprob": ...}} a position
    POST /v1/completions               prompt (ids), return_token_ids=True: the teacher's own text
    POST /tokenize                     whether its tokenizer is the student's

Only ids, log-probs and, once, a probe text travel: for a token with k log-probs some 75 k bytes of
JSON. Sequences go one a request, several at a time; a request that fails is sent again after a
growing pause. vLLM gives a prompt's log-probs before temperature.

Protocol: the documentation of vLLM's OpenAI-compatible server. A vLLM that is to give more than 20
log-probs is started with `--max-logprobs`; `return_token_ids` came with vLLM 0.10.2.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import urllib3
from torch import Tensor

#: urllib3 repeats at once, then after twice this many seconds, doubled each time, 120 at most.
BACKOFF_SECONDS = 0.5
_REPEATED = (408, 429, 500, 502, 503, 504)
#: Above 0 by more than rounding, in nats, no number is a log-prob.
MARGIN = 1e-3
#: What vLLM sends for a log-prob of -inf, which JSON does not have.
EXCLUDED = -9999.0
_QUOTED = 300  # characters of a server's own words in an error


class TeacherServerError(RuntimeError):
    """A request that the teacher's server did not answer, or not with what was asked."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """A teacher's log-probs (nats, float32) on one completion of C tokens.

    label_log_probs: (C,). ids (int64), log_probs: (C, K), the teacher's K likeliest, where known.
    """

    label_log_probs: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None


class TeacherServer:
    """A client of one served teacher; safe to share between threads.

    url: of the server, with or without "/v1". model: the name that it serves; None asks.
    timeout: seconds that one request may take. retries: further attempts of a request that fails in
    transport or by 408, 429 or 5xx. concurrency: requests under way at once. api_key: sent as a
    bearer token; None takes VLLM_API_KEY from the environment, where it is set.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        timeout: float = 600.0,
        retries: int = 9,
        concurrency: int = 8,
        api_key: str | None = None,
    ):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._retries, self._concurrency = timeout, retries, concurrency
        api_key = api_key or os.environ.get("VLLM_API_KEY")
        self._http = urllib3.PoolManager(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            maxsize=concurrency,
            timeout=urllib3.Timeout(total=timeout),
            retries=urllib3.Retry(
                retries,
                backoff_factor=BACKOFF_SECONDS,
                status_forcelist=_REPEATED,
                allowed_methods=None,  # scoring changes nothing on the server, so POST as well
                raise_on_status=False,
            ),
        )
        self.model = model or self._served_model()

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], top_k: int = 0
    ) -> list[TokenScores]:
        """Log-probs of each completion's tokens after its prompt (ids both), and with `top_k` those
        of the likeliest ids.

        Raises TeacherServerError, naming the request, where the server does not answer or its
        answer has too few log-probs.
        """

        def one(place: int) -> TokenScores:
            prompt, completion = list(prompts[place]), list(completions[place])
            if not completion:
                return _no_tokens(top_k)
            return self._complete(
                f"request {place + 1} of {len(prompts)} (the log-probs of {len(completion)} tokens "
                f"after a prompt of {len(prompt)} that begins {prompt[:8]})",
                {"prompt": prompt + completion, "prompt_logprobs": top_k, "max_tokens": 1,
                 "temperature": 1.0},
                lambda choice: read_scores(choice, prompt, completion, top_k),
            )  # fmt: skip

        return self._all(one, len(prompts))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        seeds: Sequence[int] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Ids of at most `max_tokens` tokens that the teacher writes after each prompt (ids).

        seeds: one a prompt. sampling: vLLM's parameters: temperature, top_p, top_k, min_p, ...
        Raises TeacherServerError as `score` does.
        """

        def one(place: int) -> list[int]:
            prompt = list(prompts[place])
            own = {} if seeds is None else {"seed": seeds[place]}
            return self._complete(
                f"request {place + 1} of {len(prompts)} (up to {max_tokens} tokens after a prompt "
                f"of {len(prompt)} that begins {prompt[:8]})",
                {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}
                | sampling
                | own,
                _read_ids,
            )

        return self._all(one, len(prompts))

    def tokenize(self, text: str) -> list[int] | None:
        """Ids of a text by the server's tokenizer; None where it does not offer that."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        response = self._request("POST", "/tokenize", body, "the tokenization of a text")
        if response.status != 200:
            return None
        ids = _json(response).get("tokens")
        return ids if isinstance(ids, list) else None

    def _all(self, one: Callable[[int], Any], count: int) -> list[Any]:
        with ThreadPoolExecutor(min(self._concurrency, max(count, 1))) as pool:
            futures = [pool.submit(one, place) for place in range(count)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _served_model(self) -> str:
        what = "the list of models"
        response = self._request("GET", "/v1/models", None, what)
        entries = _json(response).get("data")
        entries = entries if isinstance(entries, list) else []
        ids = [entry.get("id") for entry in entries if isinstance(entry, Mapping)]
        names = [name for name in ids if isinstance(name, str)]
        if response.status != 200 or not names:
            raise self._error(what, f"HTTP {response.status}: {_quote(response)}")
        return names[0]

    def _complete(self, what: str, body: dict[str, Any], read: Callable[[Mapping], Any]) -> Any:
        response = self._request("POST", "/v1/completions", {"model": self.model} | body, what)
        if response.status != 200:
            tries = f" after {self._retries + 1} attempts" * (response.status in _REPEATED)
            raise self._error(what, f"HTTP {response.status}{tries}: {_quote(response)}")
        choices = _json(response).get("choices")
        if not choices:
            raise self._error(what, f"no choices in its answer {_quote(response)}")
        try:
            return read(choices[0])
        except ValueError as error:
            raise self._error(what, str(error)) from error
        except (AttributeError, KeyError, TypeError) as error:
            raise self._error(what, f"its answer is malformed: {_quote(response)}") from error

    def _request(self, method: str, path: str, body: Any, what: str) -> urllib3.BaseHTTPResponse:
        try:
            return self._http.request(method, self.url + path, json=body)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise self._error(
                what, f"no answer after {self._retries + 1} attempts: {reason}"
            ) from error

    def _error(self, what: str, reason: str) -> TeacherServerError:
        return TeacherServerError(
            f"teacher server {self.url}: {what} failed: {reason}. Look at the server"
        )


def read_scores(
    choice: Mapping[str, Any], prompt: Sequence[int], completion: Sequence[int], top_k: int
) -> TokenScores:
    """The completion's part of one choice's `prompt_logprobs`. Raises ValueError where log-probs
    are missing, no numbers or above 0."""
    positions = choice.get("prompt_logprobs")
    expected = len(prompt) + len(completion)
    if not isinstance(positions, list) or len(positions) != expected:
        got = len(positions) if isinstance(positions, list) else "none"
        raise ValueError(f"prompt_logprobs for {expected} tokens were asked, {got} came")
    labels, ids, log_probs = [], [], []
    for place, token in enumerate(completion):
        at = {
            int(i): _log_prob(e["logprob"])
            for i, e in (positions[len(prompt) + place] or {}).items()
        }
        if any(math.isnan(value) for value in at.values()):
            raise ValueError(f"the log-probs of token {place} hold NaN")
        if max(at.values(), default=0.0) > MARGIN:
            raise ValueError(
                f"the log-probs of token {place} reach {max(at.values()):.4g}, above 0: the server "
                "must give log-probs, not logits"
            )
        # Besides the label's own, which comes even where it is not among the k likeliest.
        best = sorted(at.items(), key=lambda entry: -entry[1])[:top_k]
        if token not in at or len(best) < top_k:
            raise ValueError(
                f"{len(at)} log-probs came for token {place} (id {token}), which should be the "
                f"{top_k} likeliest and its own: start the server with --max-logprobs {top_k}, or "
                "lower the objective's top_k"
            )
        labels.append(at[token])
        ids.append([i for i, _ in best])
        log_probs.append([value for _, value in best])
    known = torch.tensor(labels, dtype=torch.float32)
    if not top_k:
        return TokenScores(known)
    return TokenScores(known, torch.tensor(ids), torch.tensor(log_probs, dtype=torch.float32))


def _log_prob(sent: Any) -> float:
    value = float(sent)
    return -math.inf if value == EXCLUDED else value


def _no_tokens(top_k: int) -> TokenScores:
    none = torch.zeros(0)
    if not top_k:
        return TokenScores(none)
    return TokenScores(none, torch.zeros((0, top_k), dtype=torch.int64), torch.zeros((0, top_k)))


def _read_ids(choice: Mapping[str, Any]) -> list[int]:
    ids = choice.get("token_ids")
    if not isinstance(ids, list):
        raise ValueError(
            "no token_ids in its answer: a server that knows return_token_ids is needed to write "
            "prefixes (vLLM 0.10.2 or later), or a data set with a column of prefixes"
        )
    return [int(i) for i in ids]


def _json(response: urllib3.BaseHTTPResponse) -> Mapping[str, Any]:
    try:
        answer = json.loads(response.data)
    except ValueError:
        return {}
    return answer if isinstance(answer, Mapping) else {}


def _quote(response: urllib3.BaseHTTPResponse) -> str:
    return repr(response.data[:_QUOTED].decode(errors="replace"))
