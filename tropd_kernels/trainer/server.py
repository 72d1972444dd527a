"""A teacher behind HTTP: vLLM's OpenAI-compatible server, or another one with its protocol.

    GET  /v1/models                    the served name, where none is given, and the context
    POST /v1/completions               prompt (ids), prompt_logprobs=k, max_tokens=1: log-probs of
                                       given tokens, {id: {"logprob": ...}} at each position
    POST /v1/completions               prompt (ids), return_token_ids=True: the teacher's own text
    POST /tokenize                     whether its tokenizer is the student's

Only ids, log-probs and one probe text are transferred: about 75 k bytes of JSON for a token with k
log-probs. Each request holds one sequence, and several are sent at once. A failed request is sent
again after a growing pause; Retry-After is ignored. vLLM's log-probs of a prompt are those before
temperature. `completions.py` reads answers and refusals.

Protocol: the documentation and the source of vLLM's OpenAI-compatible server, 0.32. For more than
20 log-probs vLLM is started with `--max-logprobs`; `return_token_ids` came with vLLM 0.10.2.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3
from torch import Tensor

from .completions import (
    TokenScores,
    is_unknown_id,
    no_scores,
    quote,
    read_choice,
    read_json,
    read_scores,
    read_text,
    refusal,
)
from .credentials import check_address, read_api_key
from .deadline import TimedPoolManager

#: urllib3 retries at once, then after twice this many seconds, doubled each time up to 120.
BACKOFF_SECONDS = 0.5
_REPEATED = (408, 429, 500, 502, 503, 504)
#: Fewest tokens that vLLM generates, even for a request that only asks for a prompt's log-probs.
MIN_NEW_TOKENS = 1


class TeacherServerError(RuntimeError):
    """A request that the teacher's server did not answer, or not as asked."""


class TeacherServer:
    """A client of one served teacher; safe to share between threads.

    Args:
        url: Address of the server, with or without "/v1".
        model: The name that it serves; None asks the server.
        timeout: Seconds for one attempt of a request, from connecting to the answer's last byte.
        retries: Further attempts of a request that fails in transport, in time, or with HTTP 408,
            429, 500 or 502 to 504: at once, then after 1 s, 2 s, 4 s, ... 120 s.
        concurrency: Number of requests at once.
        api_key: Sent as a bearer token; None takes VLLM_API_KEY from the environment, if set.

    Attributes:
        context: Most tokens of a prompt and its completion (`max_model_len`); None if the server
            does not say.

    Raises:
        ValueError: A key that no header can hold, or a url that is more than an address.
        TeacherServerError: The server does not list its models.
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
        check_address("url", url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._retries, self._concurrency = timeout, retries, concurrency
        self._api_key = api_key = read_api_key(api_key)
        self._http = TimedPoolManager(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            maxsize=concurrency,
            timeout=urllib3.Timeout(total=timeout),
            retries=urllib3.Retry(
                retries,
                backoff_factor=BACKOFF_SECONDS,
                status_forcelist=_REPEATED,
                allowed_methods=None,  # POST as well: scoring changes nothing on the server
                raise_on_status=False,
                respect_retry_after_header=False,  # it may ask for hours, and for other statuses
            ),
        )
        self._known_ids = 0  # the teacher has the ids below
        self._contexts = self._served_models(required=model is None)
        self.model = next(iter(self._contexts)) if model is None else model
        self.context = self._read_context(self._contexts.get(self.model))

    def check_scores(self, top_k: int, tokens: int = 1) -> None:
        """Raises TeacherServerError if the server gives no log-probs of tokens or of the `top_k`.

        Scores the ids 0 ... tokens - 1 after id 0.
        """
        self._score("a first request for log-probs", [0], list(range(tokens)), top_k)

    def check_text(self, **sampling: Any) -> None:
        """Raises TeacherServerError if the server does not generate with this sampling."""
        self._write("a first request for a text", [0], 1, sampling)

    def count_ids(self, most: int) -> int:
        """Number of the ids 0 ... most - 1 that the teacher has; it refuses the others."""
        ids = range(most - 1)
        lacks = lambda token: not self._has_id(token)
        self._known_ids = most if self._has_id(most - 1) else bisect_left(ids, True, 1, key=lacks)
        return self._known_ids

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], top_k: int = 0
    ) -> list[TokenScores]:
        """Log-probs of each completion's tokens after its prompt.

        Args:
            prompts: Token ids.
            completions: Token ids.
            top_k: Number of likeliest ids at each token whose log-probs are read as well.

        Raises:
            TeacherServerError: The server does not answer, or with too few log-probs; the text
                names the request.
        """

        def one(place: int) -> TokenScores:
            prompt, completion = list(prompts[place]), list(completions[place])
            if not completion:
                return no_scores(top_k)
            what = (
                f"request {place + 1} of {len(prompts)} (the log-probs of {len(completion)} tokens "
                f"after a prompt of {len(prompt)} that begins {prompt[:8]})"
            )
            return self._score(what, prompt, completion, top_k)

        return self._map(one, len(prompts))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        seeds: Sequence[int] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Texts that the teacher generates after each prompt.

        Args:
            prompts: Token ids.
            max_tokens: Most tokens of a text.
            seeds: One for each prompt.
            **sampling: vLLM's parameters: temperature, top_p, top_k, min_p, ...

        Returns:
            Token ids. A text of fewer than `max_tokens` includes the end that the teacher wrote.

        Raises:
            TeacherServerError: As in `score`, and for a text that the server cut.
        """

        def one(place: int) -> list[int]:
            prompt = list(prompts[place])
            own = {} if seeds is None else {"seed": seeds[place]}
            what = (
                f"request {place + 1} of {len(prompts)} (up to {max_tokens} tokens after a prompt "
                f"of {len(prompt)} that begins {prompt[:8]})"
            )
            return self._write(what, prompt, max_tokens, sampling | own)

        return self._map(one, len(prompts))

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids of a text by the server's tokenizer; None if it does not offer that."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        response = self._request("POST", "/tokenize", body, "the tokenization of a text")
        if response.status != 200:
            return None
        ids = read_json(response.data).get("tokens")
        return ids if isinstance(ids, list) else None

    def _score(
        self, what: str, prompt: list[int], completion: list[int], top_k: int
    ) -> TokenScores:
        scores: TokenScores = self._complete(
            what,
            {"prompt": prompt + completion, "prompt_logprobs": top_k,
             "max_tokens": MIN_NEW_TOKENS, "temperature": 1.0},
            lambda choice: read_scores(choice, prompt, completion, top_k),
        )  # fmt: skip
        if scores.ids is not None:
            self._check_ids(what, scores.ids)
        return scores

    def _check_ids(self, what: str, ids: Tensor) -> None:
        """Raises TeacherServerError if the teacher does not have one of these ids (C, K).

        Ids that only the student lacks belong to a larger vocabulary, and stay.
        """
        highest = int(ids.max())
        if highest < self._known_ids:
            return
        if not self._has_id(highest):
            place = int((ids == highest).any(1).int().argmax())
            raise self._error(
                what,
                f"id {highest} came among the likeliest of token {place}, and in a prompt the "
                "server refuses it as one that the teacher does not have",
            )
        self._known_ids = highest + 1

    def _write(
        self, what: str, prompt: list[int], max_tokens: int, sampling: Mapping[str, Any]
    ) -> list[int]:
        return self._complete(
            what,
            {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True, **sampling},
            lambda choice: read_text(choice, max_tokens),
        )

    def _has_id(self, token: int) -> bool:
        what = f"the question whether it has id {token}"
        body = {"model": self.model, "prompt": [token], "max_tokens": MIN_NEW_TOKENS}
        response = self._request("POST", "/v1/completions", body, what)
        if response.status != 200 and not is_unknown_id(response.status, response.data):
            raise self._refused(what, response, body)
        return response.status == 200

    def _map(self, one: Callable[[int], Any], count: int) -> list[Any]:
        with ThreadPoolExecutor(min(self._concurrency, max(count, 1))) as pool:
            futures = [pool.submit(one, place) for place in range(count)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _read_context(self, sent: Any) -> int | None:
        """Raises TeacherServerError for anything but a number of tokens."""
        if sent is None:
            return None
        if isinstance(sent, (int, float)) and not isinstance(sent, bool):
            if sent >= 1 and sent == sent // 1:
                return int(sent)
        raise self._error(
            "the list of models",
            f"max_model_len of {self.model!r} is {sent!r:.40}: expected the context, a whole "
            "number of at least 1 token, or null",
        )

    def _served_models(self, required: bool) -> dict[str, Any]:
        """The names that the server lists, each with its context, or None if it does not say."""
        what = "the list of models"
        response = self._request("GET", "/v1/models", None, what)
        entries = read_json(response.data).get("data") if response.status == 200 else None
        contexts: dict[str, Any] = {}
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, Mapping) and isinstance(entry.get("id"), str):
                tokens = entry.get("max_model_len")
                # An adapter has the context of its base model.
                above = contexts.get(entry.get("parent") or "")
                contexts[entry["id"]] = above if tokens is None else tokens
        if required and not contexts:
            raise self._refused(what, response, {})
        return contexts

    def _complete(self, what: str, body: dict[str, Any], read: Callable[[Mapping], Any]) -> Any:
        response = self._request("POST", "/v1/completions", {"model": self.model} | body, what)
        if response.status != 200:
            raise self._refused(what, response, body)
        try:
            return read(read_choice(response.data))
        except ValueError as error:
            raise self._error(what, str(error)) from error
        except (AttributeError, KeyError, TypeError) as error:
            words = quote(self._without_key(response.data))
            raise self._error(what, f"its answer is malformed: {words}") from error

    def _request(self, method: str, path: str, body: Any, what: str) -> urllib3.BaseHTTPResponse:
        try:
            return self._http.request(method, self.url + path, json=body)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            late = isinstance(reason, urllib3.exceptions.TimeoutError)
            more = f", or allow an attempt more than {self._timeout:g} s (teacher_server_timeout)"
            raise self._error(
                what,
                f"no answer after {self._retries + 1} attempts: {reason}",
                f"Look at the server{more * late}",
            ) from error

    def _refused(
        self, what: str, response: urllib3.BaseHTTPResponse, body: Mapping[str, Any]
    ) -> TeacherServerError:
        tries = f" after {self._retries + 1} attempts" * (response.status in _REPEATED)
        names = list(self._contexts) if hasattr(self, "_contexts") else []
        words, remedy = refusal(response.status, self._without_key(response.data), body, names)
        return self._error(what, f"HTTP {response.status}{tries}: {words}", remedy)

    def _without_key(self, answer: bytes) -> bytes:
        """An answer without the key, which some servers quote, before it is cut or escaped."""
        key = self._api_key
        for form in () if key is None else (key, json.dumps(key)[1:-1]):
            answer = answer.replace(form.encode(), b"***")
        return answer

    def _error(self, what: str, reason: str, remedy: str = "") -> TeacherServerError:
        if self._api_key is not None:
            reason = reason.replace(self._api_key, "***")
        return TeacherServerError(
            f"teacher server {self.url}: {what} failed: {reason}. {remedy or 'Look at the server'}"
        )
