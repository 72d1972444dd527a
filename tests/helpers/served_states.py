"""A small real HTTP server of a tiny model that answers as vLLM 0.32 does under --runner pooling.

It refuses what vLLM refuses, with the same status and message (less the parameter that vLLM appends
to it), and lets pass what vLLM lets pass (`entrypoints/pooling/`, `renderers/params.py`,
`renderers/base.py` and `utils/serial_utils.py` of its package):

    another task than the server's             400
    a sequence longer than the context         400; one as long fits
    an id that the model does not have         400
    one sequence of several refused            all of them
    use_activation                             true where it is not sent: states of length 1
    encoding_format                            floats where it is not sent
    completions                                404, as there is no head
"""

from __future__ import annotations

import base64
import contextlib
import threading

import torch
from served_http import OWN, NoSuchPath, Refused, Served, listen

ORDERS = ("native", "little", "big")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def serve(
    model, tokenizer, *, max_model_len=None, name="teacher", api_key=None, task="token_embed",
    root=None,
):  # fmt: skip
    """Served while the block runs. task: as in --pooler-config; root: what is served, as --model
    names it."""
    served, lock = Served(), threading.Lock()
    faults = served.faults
    context = max_model_len or model.config.max_position_embeddings
    height = model.get_input_embeddings().weight.shape[0]

    def content(path, body):
        if path == "/v1/models" and body is None:
            if faults.models is not OWN:
                return {"object": "list", "data": faults.models}
            own = {"id": name, "object": "model", "owned_by": "vllm", "root": root or name,
                   "parent": None, "max_model_len": context}  # fmt: skip
            return {"object": "list", "data": [own]}
        if path == "/tokenize" and body is not None:
            special = body.get("add_special_tokens", True)
            ids = tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]
            return {"count": len(ids), "max_model_len": context, "tokens": ids}
        if path != "/pooling":
            raise NoSuchPath(404)
        if body is None:
            raise NoSuchPath(405)
        with lock:
            answer = pool(body)
        return faults.answer(answer) if faults.answer else answer

    def checked(body):
        sent = body.get("input")
        several = isinstance(sent, list) and sent and isinstance(sent[0], list)
        sequences = sent if several else [sent]
        if not sent:
            raise Refused("You must pass at least one prompt")
        for ids in sequences:
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise Refused("1 validation error: body.input", "body.input", kind="Bad Request")
        if "normalize" in body:
            raise Refused("Parameter `normalize` was removed; use `use_activation` instead.")
        kind, dtype = body.get("encoding_format", "float"), body.get("embed_dtype", "float32")
        order = body.get("endianness", "native")
        if kind not in ("float", "base64") or dtype not in DTYPES or order not in ORDERS:
            raise Refused("1 validation error: body", "body", kind="Bad Request")
        if body.get("model") not in (None, name):
            raise Refused(
                f"The model `{body['model']}` does not exist.", "model", 404, "NotFoundError"
            )
        if (asked := body.get("task") or task) != task:
            supported = ["embed", "token_embed"]
            raise Refused(
                f"Try switching the model's pooling_task via --pooler-config.task {asked}."
                if asked in supported
                else f"Unsupported task: {asked!r} Supported tasks: {supported}",
                "task",
            )
        for ids in sequences:
            if not ids:
                raise Refused("The decoder prompt cannot be empty")
            if len(ids) > context:
                least = "at least " if len(ids) == context + 1 else ""
                raise Refused(
                    f"This model's maximum context length is {context} tokens. However, your "
                    f"prompt contains {least}{len(ids)} input tokens, which exceeds this limit "
                    "even without any output tokens. Please reduce the length of the input prompt.",
                    "input_tokens",
                )
            if min(ids) < 0 or max(ids) > max(len(tokenizer), height) - 1:
                bad = min(ids) if min(ids) < 0 else max(ids)
                raise Refused(f"Token id {bad} is out of vocabulary")
        return sequences, kind, DTYPES[dtype]

    @torch.no_grad()
    def pool(body):
        sequences, kind, dtype = checked(body)
        data = []
        for index, ids in enumerate(sequences):
            ids = [i if i < height else 0 for i in ids]
            states = model.base_model(torch.tensor([ids])).last_hidden_state[0].float()
            if body.get("use_activation") is not False:
                states = torch.nn.functional.normalize(states, dim=-1)
            if faults.nan:
                states[-1] = torch.nan
            if faults.drop_last:
                states = states[:-1]
            if kind == "float":
                sent = states.tolist()
            else:
                words = states.to(dtype).view(torch.uint8).numpy().tobytes()
                sent = base64.b64encode(words).decode()
            data.append({"index": index, "object": "pooling", "data": sent})
        count = sum(map(len, sequences))
        return {"id": "pool-1", "object": "list", "model": name, "data": data,
                "usage": {"prompt_tokens": count, "total_tokens": count}}  # fmt: skip

    with listen(content, served, api_key):
        yield served
