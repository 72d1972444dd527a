"""A small real HTTP server of a tiny model, in the protocol of vLLM's completions endpoint.

`Faults` says what it does wrong, and when.
"""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


@dataclass
class Faults:
    status: list[int] = field(default_factory=list)  # answers of the next requests
    dead: bool = False  # closes every connection
    most: int | None = None  # log-probs a position, as --max-logprobs that nobody checks
    drop_last: bool = False  # one position too few
    without_label: bool = False
    nan: bool = False
    without_logprob: bool = False
    no_token_ids: bool = False
    other_tokens: bool = False
    models: object = field(default_factory=lambda: [{"id": "teacher"}])
    excluded: float | None = None  # sent for the log-prob of a sequence's last token


@dataclass
class Served:
    url: str
    faults: Faults
    requests: list[dict]


@contextlib.contextmanager
def serve(model, tokenizer):
    """Served, on a free port of the loopback interface, while the block runs."""
    faults, requests, lock = Faults(), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            models = {"data": faults.models} if self.path == "/v1/models" else {}
            self.answer(200, models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append({"path": self.path} | body)
                status = faults.status.pop(0) if faults.status else 200
            if faults.dead:
                self.close_connection = True
                return
            if status != 200:
                self.answer(status, {"error": {"message": f"made to fail with {status}"}})
            elif self.path == "/tokenize":
                ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                self.answer(200, {"tokens": ids[:-1] if faults.other_tokens else ids})
            else:
                with lock:
                    choice = complete(body)
                self.answer(200, {"choices": [choice]})

        def answer(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    @torch.no_grad()
    def complete(body):
        ids = body["prompt"]
        choice = {"index": 0, "text": ""}
        if "prompt_logprobs" in body:
            log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            rows = [
                row(log_probs[i], ids[i + 1], body["prompt_logprobs"]) for i in range(len(ids) - 1)
            ]
            if faults.excluded is not None:
                rows[-1][str(ids[-1])]["logprob"] = faults.excluded
            choice["prompt_logprobs"] = [None, *rows[: -1 if faults.drop_last else None]]
        if body.get("return_token_ids") and not faults.no_token_ids:
            # A generator of its own: the trainer lives in the same process.
            draw, written = torch.Generator().manual_seed(body.get("seed", 0)), []
            while len(written) < body["max_tokens"] and written[-1:] != [model.config.eos_token_id]:
                logits = model(torch.tensor([ids + written])).logits[0, -1]
                p = (logits / body["temperature"]).softmax(-1)
                written.append(int(torch.multinomial(p, 1, generator=draw)))
            choice["token_ids"] = written
        return choice

    def row(log_probs, label, k):
        best = log_probs.topk(min(k, faults.most or k)).indices.tolist() if k else []
        named = best if faults.without_label else [*best, label]
        values = {i: float("nan") if faults.nan else log_probs[i].item() for i in named}
        field = "rank" if faults.without_logprob else "logprob"
        return {str(i): {field: v, "decoded_token": ""} for i, v in values.items()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_port}", faults, requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
