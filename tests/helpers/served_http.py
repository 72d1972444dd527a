"""What the test servers share: HTTP with faults, and sampling as both servers do it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers.generation import logits_process

OWN = object()


@dataclass
class Faults:
    status: list[int] = field(default_factory=list)  # answers of the next requests
    reason: str | None = None  # the words of such an answer
    headers: dict[str, str] = field(default_factory=dict)  # sent with such an answer
    dead: bool = False  # closes every connection
    under: str = ""  # the path that a proxy puts before the server's own
    breaks: int = 0  # so many of the next answers to a POST end in their middle
    drips: str | None = None  # "headers" or "body": 100 bytes of it come one at a time
    no_log_probs: bool = False
    most: int | None = None  # log-probs a position, of a server that caps them and does not say so
    drop_last: bool = False  # one position too few
    without_label: bool = False
    nan: bool = False
    without_logprob: bool = False
    no_token_ids: bool = False
    other_tokens: bool = False
    models: object = OWN  # entries of /v1/models
    excluded: float | None = None  # sent for the log-prob of a sequence's last token
    max_new_tokens: int | None = None  # as in vLLM's --override-generation-config
    finish: tuple[str, object] | None = None  # finish_reason and stop_reason, whatever was written
    answer: Callable[[dict], dict] | None = None  # another answer in the place of a completion's
    no_batches: bool = False  # refuses several prompts in a request
    page: str | None = None  # sent with status 200, as by a proxy


@dataclass
class Served:
    url: str = ""
    faults: Faults = field(default_factory=Faults)
    requests: list[dict] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)  # that were sent


class Refused(Exception):
    def __init__(self, message, param=None, status=400, kind="BadRequestError"):
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": status}
        self.answer = {"error": error}


class NoSuchPath(Refused):
    """As FastAPI answers, for the two servers use it."""

    def __init__(self, status):
        super().__init__("", status=status)
        self.answer = {"detail": {404: "Not Found", 405: "Method Not Allowed"}[status]}


@contextlib.contextmanager
def listen(content, served, api_key=None):
    """Serves on a free port of the loopback interface while the block runs.

    content(path, body) makes the answer, or raises Refused; body is None for a GET.
    """
    faults, requests, lock = served.faults, served.requests, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.respond(None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.respond(body)

        def respond(self, body):
            with lock:
                if body is not None:
                    requests.append({"path": self.path} | body)
                status = faults.status.pop(0) if body and faults.status else 200
                self.breaks = body is not None and faults.breaks > 0
                faults.breaks -= self.breaks
            path = self.path.removeprefix(faults.under)
            if faults.dead:
                self.close_connection = True
            elif faults.page is not None:
                self.answer(200, faults.page.encode())
            elif not self.path.startswith(faults.under):
                self.answer(404, b"no such team")
            elif status != 200:
                words = {"error": {"message": faults.reason or f"made to fail with {status}"}}
                self.answer(status, words, faults.headers)
            elif api_key and self.headers["Authorization"] != f"Bearer {api_key}":
                self.answer(401, {"error": "Unauthorized"})
            else:
                try:
                    answered = content(path, body)
                except Refused as refusal:
                    self.answer(refusal.status, refusal.answer)
                else:
                    self.answer(200, answered)

        def answer(self, status, content, headers=None):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            if faults.drips is not None:
                data = b" " * 100 + data
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            if faults.drips == "headers":
                self.drip(b"".join(b"X-%d: .\r\n" % i for i in range(12)))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if faults.drips == "body":
                self.drip(data[:100])
                data = data[100:]
            if self.breaks:
                data, self.close_connection = data[: len(data) // 2], True
            with contextlib.suppress(ConnectionError):  # by a client that has waited long enough
                self.wfile.write(data)

        def drip(self, data):
            self.flush_headers()
            for i in range(len(data)):
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(data[i : i + 1])
                time.sleep(0.02)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    # It ends when it next looks whether it should; by default it looks every half second.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sample(logits, seen, prompt, sampling, draw):
    count = torch.bincount(seen[0, prompt:], minlength=logits.shape[1])[None]
    if sampling["repetition_penalty"] != 1:
        penalty = logits_process.RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"])
        logits = penalty(seen, logits)
    logits = logits - sampling["frequency_penalty"] * count
    logits = logits - sampling["presence_penalty"] * (count > 0)
    if sampling["temperature"] == 0:
        return int(logits.argmax())
    logits = logits / sampling["temperature"]
    if sampling["min_p"] > 0:
        logits = logits_process.MinPLogitsWarper(sampling["min_p"])(seen, logits)
    if sampling["top_k"] > 0:
        logits = logits_process.TopKLogitsWarper(sampling["top_k"])(seen, logits)
    if sampling["top_p"] < 1:
        logits = logits_process.TopPLogitsWarper(sampling["top_p"])(seen, logits)
    return int(torch.multinomial(logits.softmax(-1)[0], 1, generator=draw))


def ends_of(model, tokenizer):
    """Ids that end a text, the tokenizer's own first."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return [tokenizer.eos_token_id, *ends]


def sample_text(model, ids, limit, sampling, seed, ends):
    """Ids of a text of at least one token, with the end that was written."""
    draw, written = torch.Generator().manual_seed(seed), []  # the trainer shares this process
    while True:
        logits = model(torch.tensor([ids + written])).logits[:, -1].float()
        written.append(sample(logits, torch.tensor([ids + written]), len(ids), sampling, draw))
        if written[-1] in ends or len(written) >= limit:
            return written
