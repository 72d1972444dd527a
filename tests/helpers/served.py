"""A small real HTTP server of a tiny model that answers as vLLM 0.32 does, also to batches.

It refuses what vLLM refuses, with the same status and message (less the parameter that vLLM appends
to it), and shortens what vLLM shortens
(`entrypoints/openai/completion/protocol.py`, `entrypoints/scale_out/token_in_token_out/`,
`entrypoints/serve/utils/api_utils.py`, `renderers/params.py`, `sampling_params.py`,
`v1/engine/input_processor.py` and `v1/core/sched/utils.py` of its package):

    max_tokens beyond the context       400
    a prompt as long as the context     400, as there is no token left to write
    prompt + max_tokens beyond it       max_tokens is capped, silently
    prompt_logprobs > max_logprobs      400; 20 unless the server is started with more
    another model's name                404
    an id that the model does not have  400
    a parameter that is not sent        the model's own generation_config
    one prompt of several refused       all of them

The ids-in, ids-out endpoint, where it is on, takes one prompt, refuses a full context in other
words, cuts texts there, and takes what is not sent from SamplingParams. `Faults` says what the
server does wrong, and when.
"""

from __future__ import annotations

import contextlib
import math
import threading

import torch
from served_http import OWN, NoSuchPath, Refused, Served, ends_of, listen, sample_text

DEFAULTS = dict(
    temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0,
)  # fmt: skip


@contextlib.contextmanager
def serve(
    model, tokenizer, *, max_model_len=None, max_logprobs=20, name="teacher", api_key=None,
    scale_out=False, completions=True,
):  # fmt: skip
    """Served while the block runs.

    max_model_len, max_logprobs, scale_out: as vLLM's flags. Without `completions` it is a router
    that forwards the other endpoint alone.
    """
    served, lock = Served(), threading.Lock()
    faults = served.faults
    context = max_model_len or model.config.max_position_embeddings
    height = model.get_input_embeddings().weight.shape[0]

    def content(path, body):
        if path == "/v1/models" and body is None:
            return {"object": "list", "data": models()}
        if path == "/tokenize" and body is not None:
            check_model(body)
            special = body.get("add_special_tokens", True)
            ids = tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]
            ids = ids[:-1] if faults.other_tokens else ids
            return {"count": len(ids), "max_model_len": context, "tokens": ids}
        endpoints = {"/v1/completions": complete, "/inference/v1/generate": generate}
        if path not in endpoints or (path == "/v1/completions" and not completions):
            raise NoSuchPath(404)
        if body is None:
            raise NoSuchPath(405)
        if path == "/inference/v1/generate" and not scale_out:
            raise Refused(
                "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to "
                "enable them.", status=403, kind="PermissionDeniedError",
            )  # fmt: skip
        with lock:
            answer = endpoints[path](body)
        return faults.answer(answer) if faults.answer else answer

    def models():
        if faults.models is not OWN:
            return faults.models
        owner = "vllm" if completions else "router"
        return [{"id": name, "object": "model", "owned_by": owner, "root": name, "parent": None,
                 "max_model_len": context}]  # fmt: skip

    def check_model(body):
        if body.get("model") not in (None, name):
            raise Refused(
                f"The model `{body['model']}` does not exist. Valid aliases: {name}.",
                "model", 404, "NotFoundError",
            )  # fmt: skip

    def prompts_of(body):
        """The prompts of a request: a list of ids, or of such lists."""
        sent = body.get("prompt")
        several = isinstance(sent, list) and sent and isinstance(sent[0], list)
        prompts = sent if several else [sent]
        for ids in prompts:
            if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
                raise Refused("1 validation error: body.prompt", "body.prompt", kind="Bad Request")
            if several and not ids:
                raise Refused("The decoder prompt cannot be empty")
        if several and faults.no_batches:
            raise Refused("prompt: expected one list of ids", "prompt", 422, "Bad Request")
        return prompts

    def checked(body, ids):
        """Number of tokens to write, log-probs a position and sampling, in vLLM's order."""
        k = body.get("prompt_logprobs")
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
        own = model.generation_config
        return limit, k, check_sampling(body, limit, k, ids, own)

    def check_sampling(body, limit, k, ids, own):
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
        prompts = prompts_of(body)
        asked = [checked(body, ids) for ids in prompts]  # before any is answered
        choices = [
            choice(body, index, ids, *one) | {"prompt_logprobs": scores(ids, one[1])}
            for index, (ids, one) in enumerate(zip(prompts, asked))
            if ids  # for vLLM [] is a list of no prompts
        ]
        return {"object": "text_completion", "model": name, "choices": choices}

    @torch.no_grad()
    def generate(body):
        ids, params = body.get("token_ids"), body.get("sampling_params")
        whole = isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
        if not whole or not isinstance(params, dict):
            raise Refused("1 validation error: body", "body", kind="Bad Request")
        check_model(body)
        k, limit = params.get("prompt_logprobs"), params.get("max_tokens", context - len(ids))
        sampling = check_sampling(params, limit, k, ids, None)
        if len(ids) >= context:
            more = " plus the number of requested output tokens (at least 1)"
            raise Refused(
                f"The decoder prompt (length {len(ids)}){more * (len(ids) == context)} is longer "
                f"than the maximum model length of {context}. Make sure that `max_model_len` is no "
                "smaller than the number of text tokens."
            )
        limit = min(limit, context - len(ids), faults.max_new_tokens or limit)
        said = choice(params | {"return_token_ids": True}, 0, ids, limit, k, sampling)
        return {"request_id": "1", "model": name, "choices": [said],
                "prompt_logprobs": scores(ids, k), "output_mode": "tokens"}  # fmt: skip

    def scores(ids, k):
        if k is None or faults.no_log_probs:
            return None
        log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows = [row(log_probs[i], ids[i + 1], k) for i in range(len(ids) - 1)]
        if faults.excluded is not None and rows:
            rows[-1][str(ids[-1])]["logprob"] = faults.excluded
        return [None, *rows[: -1 if faults.drop_last else None]]

    def choice(body, index, ids, limit, k, sampling):
        made = {"index": index, "logprobs": None, "token_ids": None}
        written, finish, stop = write(ids, limit, sampling, body.get("seed") or 0)
        made["text"] = tokenizer.decode(written, skip_special_tokens=True)
        made["finish_reason"], made["stop_reason"] = faults.finish or (finish, stop)
        if body.get("return_token_ids") and not faults.no_token_ids:
            made |= {"token_ids": written, "prompt_token_ids": ids}
            served.texts.append(written)
        return made

    def write(ids, limit, sampling, seed):
        """Ids, with the end that was written, finish_reason and stop_reason."""
        ends = ends_of(model, tokenizer)
        written = sample_text(model, ids, limit, sampling, seed, ends)
        if written[-1] in ends:
            return written, "stop", None if written[-1] == ends[0] else written[-1]
        return written, "length", None

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

    with listen(content, served, api_key):
        yield served
