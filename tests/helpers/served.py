"""A small real HTTP server of a tiny model that answers as vLLM 0.32's completions endpoint does.

It refuses what vLLM refuses, with the same status and message, and shortens what vLLM shortens
(`entrypoints/openai/completion/protocol.py`, `entrypoints/serve/utils/api_utils.py`,
`renderers/params.py`, `sampling_params.py`, `v1/engine/input_processor.py` and
`v1/core/sched/utils.py` of its package):

    max_tokens beyond the context       400
    a prompt as long as the context     400, as there is no token left to write
    prompt + max_tokens beyond it       max_tokens is capped, silently
    prompt_logprobs > max_logprobs      400; 20 unless the server is started with more
    another model's name                404
    an id that the model does not have  400
    a parameter that is not sent        the model's own generation_config

`Faults` says what it does wrong, and when.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers.generation import logits_process

DEFAULTS = dict(
    temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0,
)  # fmt: skip
OWN = object()


@dataclass
class Faults:
    status: list[int] = field(default_factory=list)  # answers of the next requests
    reason: str | None = None  # the words of such an answer
    headers: dict[str, str] = field(default_factory=dict)  # sent with such an answer
    dead: bool = False  # closes every connection
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


@dataclass
class Served:
    url: str
    faults: Faults
    requests: list[dict]
    texts: list[list[int]]  # that were sent


class Refused(Exception):
    def __init__(self, message, param=None, status=400, kind="BadRequestError"):
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": status}


@contextlib.contextmanager
def serve(model, tokenizer, *, max_model_len=None, max_logprobs=20, name="teacher", api_key=None):
    """Served, on a free port of the loopback interface, while the block runs.

    max_model_len, max_logprobs: as vLLM's flags; None: the model's context.
    """
    faults, requests, texts, lock = Faults(), [], [], threading.Lock()
    context = max_model_len or model.config.max_position_embeddings
    height = model.get_input_embeddings().weight.shape[0]

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
            if faults.dead:
                self.close_connection = True
            elif status != 200:
                words = {"error": {"message": faults.reason or f"made to fail with {status}"}}
                self.answer(status, words, faults.headers)
            elif api_key and self.headers["Authorization"] != f"Bearer {api_key}":
                self.answer(401, {"error": "Unauthorized"})
            else:
                try:
                    content = self.content(body)
                except Refused as refusal:
                    self.answer(refusal.status, {"error": refusal.error})
                else:
                    self.answer(200, content)

        def content(self, body):
            if self.path == "/v1/models" and body is None:
                return {"object": "list", "data": models()}
            if self.path == "/tokenize" and body is not None:
                check_model(body)
                special = body.get("add_special_tokens", True)
                ids = tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]
                ids = ids[:-1] if faults.other_tokens else ids
                return {"count": len(ids), "max_model_len": context, "tokens": ids}
            if self.path == "/v1/completions" and body is not None:
                with lock:
                    answer = complete(body)
                return faults.answer(answer) if faults.answer else answer
            raise Refused("Not Found", status=404, kind="Not Found")

        def answer(self, status, content, headers=None):
            data = json.dumps(content).encode()
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
            with contextlib.suppress(ConnectionError):  # by a client that has waited long enough
                self.wfile.write(data)

        def drip(self, data):
            self.flush_headers()
            for i in range(len(data)):
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(data[i : i + 1])
                time.sleep(0.02)

    def models():
        if faults.models is not OWN:
            return faults.models
        return [{"id": name, "object": "model", "owned_by": "vllm", "root": name, "parent": None,
                 "max_model_len": context}]  # fmt: skip

    def check_model(body):
        if body.get("model") not in (None, name):
            raise Refused(
                f"The model `{body['model']}` does not exist. Valid aliases: {name}.",
                "model", 404, "NotFoundError",
            )  # fmt: skip

    def checked(body):
        """Ids, number of tokens to write, log-probs a position and sampling, in vLLM's order."""
        ids, k = body.get("prompt"), body.get("prompt_logprobs")
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise Refused("1 validation error: body.prompt", "body.prompt", kind="Bad Request")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < -1):
            message = "`prompt_logprobs` must be a positive value or -1."
            raise Refused(message, "prompt_logprobs", kind="Bad Request")
        seed = body.get("seed")
        if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
            raise Refused("1 validation error: body.seed", "body.seed", kind="Bad Request")
        check_model(body)
        limit = 16 if body.get("max_tokens") is None else body["max_tokens"]
        if limit > context:
            raise Refused(
                f"max_tokens={limit} cannot be greater than max_model_len={context}. Please "
                "request fewer output tokens.", "max_tokens",
            )  # fmt: skip
        if len(ids) > context:
            least = "at least " if len(ids) == context + 1 else ""
            raise Refused(
                f"This model's maximum context length is {context} tokens. However, your prompt "
                f"contains {least}{len(ids)} input tokens, which exceeds this limit even without "
                "any output tokens. Please reduce the length of the input prompt.", "input_tokens",
            )  # fmt: skip
        limit = min(limit, context - len(ids), faults.max_new_tokens or limit)
        return ids, limit, k, check_sampling(body, limit, k, ids)

    def check_sampling(body, limit, k, ids):
        own = model.generation_config
        sampling = {
            key: next(v for v in (body.get(key), getattr(own, key, None), neutral) if v is not None)
            for key, neutral in DEFAULTS.items()
        }
        for key, low, high in (
            ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2), ("temperature", 0, 2),
            ("min_p", 0, 1),
        ):  # fmt: skip
            if not low <= sampling[key] <= high:
                raise Refused(f"{key} must be in [{low}, {high}], got {sampling[key]}.", key)
        if sampling["repetition_penalty"] <= 0:
            raise Refused("repetition_penalty must be greater than zero.")
        if not 0 < sampling["top_p"] <= 1:
            raise Refused(f"top_p must be in (0, 1], got {sampling['top_p']}.", "top_p")
        if not isinstance(sampling["top_k"], int) or sampling["top_k"] < -1:
            raise Refused(f"top_k must be 0 (disable), or at least 1, got {sampling['top_k']}.")
        if limit < 1:
            raise Refused(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
        most = height if max_logprobs == -1 else max_logprobs
        if k is not None and (height if k == -1 else k) > most:
            raise Refused(
                f"Requested prompt logprobs of {height if k == -1 else k}, which is greater than "
                f"max allowed: {most}", "prompt_logprobs",
            )  # fmt: skip
        if ids and max(ids) > max(len(tokenizer), height) - 1:
            raise Refused(f"Token id {max(ids)} is out of vocabulary")
        return sampling

    @torch.no_grad()
    def complete(body):
        ids, limit, k, sampling = checked(body)
        if not ids:  # for vLLM a list of no prompts
            return {"object": "text_completion", "model": name, "choices": []}
        choice = {"index": 0, "logprobs": None, "prompt_logprobs": None, "token_ids": None}
        if k is not None and not faults.no_log_probs:
            log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            rows = [row(log_probs[i], ids[i + 1], k) for i in range(len(ids) - 1)]
            if faults.excluded is not None and rows:
                rows[-1][str(ids[-1])]["logprob"] = faults.excluded
            choice["prompt_logprobs"] = [None, *rows[: -1 if faults.drop_last else None]]
        written, finish, stop = write(ids, limit, sampling, body.get("seed") or 0)
        choice["text"] = tokenizer.decode(written, skip_special_tokens=True)
        choice["finish_reason"], choice["stop_reason"] = faults.finish or (finish, stop)
        if body.get("return_token_ids") and not faults.no_token_ids:
            choice |= {"token_ids": written, "prompt_token_ids": ids}
            texts.append(written)
        return {"object": "text_completion", "model": name, "choices": [choice]}

    def write(ids, limit, sampling, seed):
        """Ids, with the end that was written, finish_reason and stop_reason."""
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        draw, written = torch.Generator().manual_seed(seed), []  # the trainer shares this process
        while True:
            logits = model(torch.tensor([ids + written])).logits[:, -1].float()
            written.append(sample(logits, torch.tensor([ids + written]), len(ids), sampling, draw))
            if written[-1] == tokenizer.eos_token_id:
                return written, "stop", None
            if written[-1] in ends:
                return written, "stop", written[-1]
            if len(written) >= limit:
                return written, "length", None

    def sample(logits, seen, prompt, sampling, draw):
        count = torch.bincount(seen[0, prompt:], minlength=logits.shape[1])[None]
        if sampling["repetition_penalty"] != 1:
            penalty = logits_process.RepetitionPenaltyLogitsProcessor(
                sampling["repetition_penalty"]
            )
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

    def row(log_probs, label, k):
        """The label first, then the k likeliest; the label twice is once, as the keys are ids."""
        k = len(log_probs) if k == -1 else k
        best = log_probs.topk(min(k, faults.most or k)).indices.tolist() if k else []
        named = best if faults.without_label else [label, *best]
        values = {i: float("nan") if faults.nan else log_probs[i].item() for i in named}
        values = {i: -9999.0 if v == -math.inf else v for i, v in values.items()}
        key = "rank" if faults.without_logprob else "logprob"
        words = {i: tokenizer.decode([i]) for i in values}
        rank = {i: int((log_probs >= log_probs[i]).sum()) for i in values}
        return {str(i): {"rank": rank[i], "decoded_token": words[i], key: v}
                for i, v in values.items()}  # fmt: skip

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_port}", faults, requests, texts)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
