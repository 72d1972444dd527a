"""A teacher behind HTTP, in one of the `protocols`.

    GET  /v1/models    the served name, where none is given, the context, and who serves
    POST               log-probs of given tokens, and texts: by the protocol
    POST /tokenize     whether its tokenizer is the student's

Only ids, log-probs and one probe text are transferred. Sequences to score share requests, as many
as are sent at once; a text has a request of its own, as it has a seed. A failed request is sent
again after a growing pause; Retry-After is ignored. `completions.py` reads answers and refusals.
"""

import contextlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3
from torch import Tensor

from .completions import (
    HiddenStates,
    TokenScores,
    is_unknown_id,
    quote,
    read_any,
    read_json,
    refusal,
)
from .credentials import check_address, read_api_key
from .deadline import TimedPoolManager
from .protocols import PROTOCOLS, Protocol
from .protocols.base import Sample
from .retrying import REPEATED, AnnouncedRetry, FirstContact

#: Of requests with several sequences that may pass one by one: refused, or answered otherwise.
_NOT_TOGETHER = (200, 400, 413, 422)
#: Most log-probs that a request with more than one sequence asks for: 40 MB of vLLM's JSON.
MOST_LOG_PROBS = 2**19


class TeacherServerError(RuntimeError):
    """A request that the teacher's server did not answer, or not as asked."""


class TeacherServer:
    """A client of one served teacher; safe to share between threads.

    Args:
        url: Address of the server, with or without "/v1".
        model: The name that it serves; None asks the server.
        timeout: Seconds for one attempt of a request, from connecting to the answer's last byte.
        retries: Further attempts of a request that fails in transport, in time, or with HTTP 408,
            429, 500 or 502 to 504: at once, then after 1 s, 2 s, 4 s, ... 120 s, each announced in
            the log. The first request has none where the host's name is unknown.
        concurrency: Number of requests at once.
        api_key: Sent as a bearer token; None takes VLLM_API_KEY from the environment, if set.
        protocol: One of `protocols.PROTOCOLS`; None finds it out.

    Attributes:
        context: Most tokens of a prompt and its completion (`max_model_len`); None if the server
            does not say.

    Raises:
        ValueError: A key that no header can hold, a url that is more than an address, or an unknown
            protocol.
        TeacherServerError: The server does not list its models, or not this one.
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
        protocol: str | None = None,
    ):
        check_address("url", url)
        if protocol is not None and protocol not in PROTOCOLS:
            raise ValueError(f"protocol: must be one of {[*PROTOCOLS]} or None, got {protocol!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._retries, self._concurrency = timeout, retries, concurrency
        self._api_key = api_key = read_api_key(api_key)
        self._http = TimedPoolManager(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            maxsize=concurrency,
            timeout=urllib3.Timeout(total=timeout),
        )
        self._again: AnnouncedRetry = FirstContact.times(retries)
        self._known_ids = 0  # the teacher has the ids below
        self._models = self._served_models(required=model is None)
        self._again = AnnouncedRetry.times(retries)
        self.model = next(iter(self._models)) if model is None else model
        entry = self._models.get(self.model, {})
        if entry.get("max_model_len") is None:  # an adapter has its base's context
            entry = self._models.get(entry.get("parent") or "", {})
        self.context = self._read_context(entry.get("max_model_len"))
        self.protocol = self._make_protocol(protocol)
        self._shares = self.protocol.batches  # several sequences in a request

    def check_scores(self, top_k: int, tokens: int = 1) -> None:
        """Raises TeacherServerError if the server gives no log-probs of tokens or of the `top_k`.

        Scores the ids 0 ... tokens - 1 after id 0.
        """
        self._score_together(["a first request for log-probs"], [([0], range(tokens))], top_k)

    def check_text(self, **sampling: Any) -> None:
        """Raises TeacherServerError if the server does not generate with this sampling."""
        self._write("a first request for a text", [0], 1, sampling, None)

    def count_ids(self, most: int) -> int:
        """Number of the ids 0 ... most - 1 that the teacher has; it refuses the others."""
        ids = range(most - 1)
        lacks = lambda token: not self._has_id(token)
        self._known_ids = most if self._has_id(most - 1) else bisect_left(ids, True, 1, key=lacks)
        return self._known_ids

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], top_k: int = 0
    ) -> list[Any]:
        """Log-probs of each completion's tokens after its prompt, as `TokenScores`; the hidden
        states that predict them, as `HiddenStates`, of a protocol that sends those.

        Args:
            prompts: Token ids.
            completions: Token ids.
            top_k: Number of likeliest ids at each token whose log-probs are read as well.

        Raises:
            TeacherServerError: The server does not answer, or with too few log-probs; the text
                names the request.
        """
        sequences = list(zip(map(list, prompts), map(list, completions), strict=True))
        names = [
            f"request {place + 1} of {len(prompts)} (the log-probs of {len(completion)} tokens "
            f"after a prompt of {len(prompt)} that begins {prompt[:8]})"
            for place, (prompt, completion) in enumerate(sequences)
        ]

        def ask(places: list[int]) -> list[TokenScores | HiddenStates]:
            some = [names[i] for i in places], [sequences[i] for i in places]
            return self._score_together(*some, top_k)

        scores = [self.protocol.nothing(top_k)] * len(sequences)
        requests = self._requests(sequences, top_k)
        for places, found in zip(requests, self._map(ask, requests), strict=True):
            for place, one in zip(places, found, strict=True):
                scores[place] = one
        return scores

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
            **sampling: vLLM's parameters, which are also SGLang's: temperature, top_p, top_k, ...

        Returns:
            Token ids. A text of fewer than `max_tokens` includes the end that the teacher wrote.

        Raises:
            TeacherServerError: As in `score`, and for a text that the server cut.
        """

        def one(place: int) -> list[int]:
            prompt = list(prompts[place])
            seed = None if seeds is None else seeds[place]
            what = (
                f"request {place + 1} of {len(prompts)} (up to {max_tokens} tokens after a prompt "
                f"of {len(prompt)} that begins {prompt[:8]})"
            )
            return self._write(what, prompt, max_tokens, sampling, seed)

        return self._map(one, range(len(prompts)))

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids of a text by the server's tokenizer; None if it does not offer that."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        response = self._request("POST", "/tokenize", body, "the tokenization of a text")
        if response.status != 200:
            return None
        ids = read_json(response.data).get("tokens")
        return ids if isinstance(ids, list) else None

    def _requests(self, sequences: Sequence[Sample], top_k: int) -> list[list[int]]:
        """The places of these sequences by the request that asks for them, without empty ones."""
        places = [place for place, (_, completion) in enumerate(sequences) if completion]
        most = -(-len(places) // self._concurrency) if self._shares else 1
        requests: list[list[int]] = []
        held = 0
        for place in places:
            size = sum(map(len, sequences[place])) * self.protocol.size(top_k)
            if not requests or len(requests[-1]) == most or held + size > MOST_LOG_PROBS:
                requests.append([])
                held = 0
            requests[-1].append(place)
            held += size
        return requests

    def _score_together(
        self, names: Sequence[str], sequences: Sequence[Sample], top_k: int
    ) -> list[TokenScores | HiddenStates]:
        """The scores of sequences in one request; of each by itself where there are none.

        So an error names the sequence that is at fault, and a server need not know batches.
        """
        protocol, more = self.protocol, len(sequences) - 1
        what = names[0] + (f" and {more} more with it" if more else "")
        body = protocol.scoring(sequences, top_k)
        response = self._request("POST", protocol.path, body, what)
        try:
            parts = self._parts(what, response, more + 1, top_k)
        except TeacherServerError:
            if not more or response.status not in _NOT_TOGETHER:
                raise
            alone = [
                self._score_together([name], [one], top_k)[0]
                for name, one in zip(names, sequences, strict=True)
            ]
            self._shares = False
            return alone
        scores = []
        for name, part, one in zip(names, parts, sequences, strict=True):
            with self._reading(name, response):
                read = protocol.read_scores(part, one, top_k)
            if isinstance(read, TokenScores) and read.ids is not None:
                self._check_ids(name, read.ids)
            scores.append(read)
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
        self,
        what: str,
        prompt: list[int],
        max_tokens: int,
        sampling: Mapping[str, Any],
        seed: int | None,
    ) -> list[int]:
        body = self.protocol.writing(prompt, max_tokens, sampling, seed)
        response = self._request("POST", self.protocol.path, body, what)
        (part,) = self._parts(what, response, 1)
        with self._reading(what, response):
            return self.protocol.read_text(part, max_tokens)

    def _has_id(self, token: int) -> bool:
        what = f"the question whether it has id {token}"
        response = self._request("POST", self.protocol.path, self.protocol.asking(token), what)
        if response.status != 200 and not is_unknown_id(response.status, response.data):
            raise self._refused(what, response)
        return response.status == 200

    def _map(self, one: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(min(self._concurrency, max(len(items), 1))) as pool:
            futures = [pool.submit(one, item) for item in items]
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

    def _served_models(self, required: bool) -> dict[str, Mapping[str, Any]]:
        """The entries of the models that the server lists, by their names."""
        what = "the list of models"
        response = self._request("GET", "/v1/models", None, what)
        sent = read_json(response.data).get("data") if response.status == 200 else None
        entries = [e for e in sent if isinstance(e, Mapping)] if isinstance(sent, list) else []
        models = {entry["id"]: entry for entry in entries if isinstance(entry.get("id"), str)}
        if required and not models:
            raise self._refused(what, response)
        return models

    def _make_protocol(self, name: str | None) -> Protocol:
        name = name or self._find_protocol()
        parents = {model: entry.get("parent") for model, entry in self._models.items()}
        try:
            return PROTOCOLS[name](self.model, parents)
        except ValueError as error:
            names = ", ".join(parents) or "see /v1/models"
            remedy = f"Set teacher_model_name_or_path to a name that the server has: {names}"
            raise self._error("the list of models", str(error), remedy) from error

    def _find_protocol(self) -> str:
        """By who says to own the models; else by the paths, which a GET finds and refuses."""
        owners = {entry.get("owned_by") for entry in self._models.values()}
        if not owners & {"vllm", "sglang"}:
            for name, kind in PROTOCOLS.items():
                if kind.sends_states:
                    continue
                if self._request("GET", kind.path, None, "a look at its paths").status == 405:
                    return name
        return "sglang" if "sglang" in owners else "vllm"

    def _parts(
        self, what: str, response: urllib3.BaseHTTPResponse, count: int, top_k: int | None = None
    ) -> Sequence[Any]:
        if response.status != 200:
            raise self._refused(what, response, top_k)
        if (answer := read_any(response.data)) is None:
            words = quote(self._without_key(response.data))
            remedy = "Is teacher_model_server_url the address of the server itself?"
            raise self._error(what, f"its answer is no JSON: {words}", remedy)
        with self._reading(what, response):
            return self.protocol.parts(answer, count)

    @contextlib.contextmanager
    def _reading(self, what: str, response: urllib3.BaseHTTPResponse) -> Iterator[None]:
        """Raises what a protocol's reading raises as a TeacherServerError."""
        try:
            yield
        except ValueError as error:
            raise self._error(what, str(error)) from error
        except (AttributeError, KeyError, TypeError) as error:
            words = quote(self._without_key(response.data))
            raise self._error(what, f"its answer is malformed: {words}") from error

    def _request(self, method: str, path: str, body: Any, what: str) -> urllib3.BaseHTTPResponse:
        try:
            return self._http.request(method, self.url + path, json=body, retries=self._again)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            late = isinstance(reason, urllib3.exceptions.TimeoutError) and not isinstance(
                reason,
                urllib3.exceptions.NewConnectionError,  # refused at once, yet of that kind
            )
            if isinstance(reason, urllib3.exceptions.NameResolutionError) and isinstance(
                self._again, FirstContact
            ):
                remedy = "Is teacher_model_server_url right?"
                raise self._error(what, f"no host of this name: {reason}", remedy) from error
            more = f", or allow an attempt more than {self._timeout:g} s (teacher_server_timeout)"
            raise self._error(
                what,
                f"no answer after {self._retries + 1} attempts: {reason}",
                f"Look at the server{more * late}",
            ) from error

    def _refused(
        self, what: str, response: urllib3.BaseHTTPResponse, top_k: int | None = None
    ) -> TeacherServerError:
        tries = f" after {self._retries + 1} attempts" * (response.status in REPEATED)
        names = list(self._models) if hasattr(self, "_models") else []
        known = {"k": top_k, "names": ", ".join(names) or "see /v1/models"}
        protocol = getattr(self, "protocol", None)
        remedies = protocol.remedies if protocol else ()
        words, remedy = refusal(response.status, self._without_key(response.data), remedies, known)
        if protocol and response.status in (404, 405) and not remedy:
            remedy = f"There is nothing at {protocol.path}: {protocol.no_path}"
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
