"""A teacher behind HTTP: vLLM's OpenAI-compatible server, or whatever speaks its protocol.

    GET  /v1/models                    the served name, where none is given, and the context
    POST /v1/completions               prompt (ids), prompt_logprobs=k, max_tokens=1: log-probs of
                                       given tokens, {id: {"logprob": ...}} a position
    POST /v1/completions               prompt (ids), return_token_ids=True: the teacher's own text
    POST /tokenize                     whether its tokenizer is the student's

Only ids, log-probs and, once, a probe text travel: for a token with k log-probs some 75 k bytes of
JSON. Sequences go one a request, several at a time; a request that fails is sent again after a
growing pause, whatever its Retry-After says. vLLM gives a prompt's log-probs before temperature.
`completions.py` reads answers and refusals.

Protocol: the documentation and the source of vLLM's OpenAI-compatible server, 0.32. A vLLM that is
to give more than 20 log-probs is started with `--max-logprobs`; `return_token_ids` came with vLLM
0.10.2.
"""

import json
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

#: urllib3 repeats at once, then after twice this many seconds, doubled each time, 120 at most.
BACKOFF_SECONDS = 0.5
_REPEATED = (408, 429, 500, 502, 503, 504)
#: Tokens that vLLM writes at the least, also after a prompt of which only the log-probs are wanted.
WRITTEN = 1


class TeacherServerError(RuntimeError):
    """A request that the teacher's server did not answer, or not with what was asked."""


class TeacherServer:
    """A client of one served teacher; safe to share between threads.

    url: of the server, with or without "/v1". model: the name that it serves; None asks.
    timeout: seconds that one attempt of a request may take, from connecting to the last byte of the
    answer. retries: further attempts of a request that fails in transport, in time, or by 408, 429,
    500 or 502 to 504, at once, then after 1 s, 2 s, 4 s, ... 120 s. concurrency: requests under way
    at once. api_key: sent as a bearer token; None takes VLLM_API_KEY from the environment, where it
    is set. Raises ValueError for a key that no header can hold, and for a url with more than an
    address.

    context: tokens of a prompt with what is written after it, as the server says (`max_model_len`);
    None where it does not.
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
                allowed_methods=None,  # scoring changes nothing on the server, so POST as well
                raise_on_status=False,
                respect_retry_after_header=False,  # it may ask for hours, and for other statuses
            ),
        )
        self._known_ids = 0  # the teacher has the ids below
        self._contexts = self._served_models(required=model is None)
        self.model = next(iter(self._contexts)) if model is None else model
        self.context = self._read_context(self._contexts.get(self.model))

    def check_scores(self, top_k: int, tokens: int = 1) -> None:
        """Raises TeacherServerError where the server does not give log-probs of given tokens, or
        not of the `top_k` likeliest. Asks for the ids 0 ... tokens - 1 after id 0."""
        self._score("a first request for log-probs", [0], list(range(tokens)), top_k)

    def check_text(self, **sampling: Any) -> None:
        """Raises TeacherServerError where the server does not write, or not with this sampling."""
        self._write("a first request for a text", [0], 1, sampling)

    def count_ids(self, most: int) -> int:
        """How many of the ids 0 ... most - 1 the teacher has: it refuses the others."""
        self._known_ids = self._count_ids(most)
        return self._known_ids

    def _count_ids(self, most: int) -> int:
        if self._has(most - 1):
            return most
        low, high = 1, most - 1
        while low < high:  # the least count whose next id is refused
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._has(middle) else (low, middle)
        return low

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
                return no_scores(top_k)
            what = (
                f"request {place + 1} of {len(prompts)} (the log-probs of {len(completion)} tokens "
                f"after a prompt of {len(prompt)} that begins {prompt[:8]})"
            )
            return self._score(what, prompt, completion, top_k)

        return self._all(one, len(prompts))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        seeds: Sequence[int] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Ids of at most `max_tokens` tokens that the teacher writes after each prompt (ids). A
        text of fewer is one that the teacher ended, and holds that end.

        seeds: one a prompt. sampling: vLLM's parameters: temperature, top_p, top_k, min_p, ...
        Raises TeacherServerError as `score` does, and for a text that the server cut.
        """

        def one(place: int) -> list[int]:
            prompt = list(prompts[place])
            own = {} if seeds is None else {"seed": seeds[place]}
            what = (
                f"request {place + 1} of {len(prompts)} (up to {max_tokens} tokens after a prompt "
                f"of {len(prompt)} that begins {prompt[:8]})"
            )
            return self._write(what, prompt, max_tokens, sampling | own)

        return self._all(one, len(prompts))

    def tokenize(self, text: str) -> list[int] | None:
        """Ids of a text by the server's tokenizer; None where it does not offer that."""
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
            {"prompt": prompt + completion, "prompt_logprobs": top_k, "max_tokens": WRITTEN,
             "temperature": 1.0},
            lambda choice: read_scores(choice, prompt, completion, top_k),
        )  # fmt: skip
        if scores.ids is not None:
            self._check_ids(what, scores.ids)
        return scores

    def _check_ids(self, what: str, ids: Tensor) -> None:
        """Raises TeacherServerError for ids (C, K) of which the teacher does not have one. Those
        that only the student does not have are a larger vocabulary's, and stay."""
        highest = int(ids.max())
        if highest < self._known_ids:
            return
        if not self._has(highest):
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

    def _has(self, token: int) -> bool:
        what = f"the question whether it has id {token}"
        body = {"model": self.model, "prompt": [token], "max_tokens": WRITTEN}
        response = self._request("POST", "/v1/completions", body, what)
        if response.status != 200 and not is_unknown_id(response.status, response.data):
            raise self._refused(what, response, body)
        return response.status == 200

    def _all(self, one: Callable[[int], Any], count: int) -> list[Any]:
        with ThreadPoolExecutor(min(self._concurrency, max(count, 1))) as pool:
            futures = [pool.submit(one, place) for place in range(count)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _read_context(self, sent: Any) -> int | None:
        """Raises TeacherServerError for what is no number of tokens."""
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
        """The names that the server lists, each with what it says of its context, or None."""
        what = "the list of models"
        response = self._request("GET", "/v1/models", None, what)
        entries = read_json(response.data).get("data") if response.status == 200 else None
        contexts: dict[str, Any] = {}
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, Mapping) and isinstance(entry.get("id"), str):
                tokens = entry.get("max_model_len")
                # An adapter's context is that of the model which it belongs to.
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
            words = quote(self._shown(response.data))
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
        words, remedy = refusal(response.status, self._shown(response.data), body, names)
        return self._error(what, f"HTTP {response.status}{tries}: {words}", remedy)

    def _shown(self, answer: bytes) -> bytes:
        """Without the key, which some servers quote: before anything is cut off or escaped."""
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
