"""A small real HTTP server of a tiny model that answers as SGLang 0.5.23 does.

It refuses what SGLang refuses, with the same status and (but for bounds of sampling) the same
message, and lets pass what it lets pass
(`srt/managers/io_struct.py`, `tokenizer_manager.py`, `scheduler.py`, `tp_worker.py`, `utils.py`,
`scheduler_components/logprob_result_processor.py` and `srt/sampling/sampling_params.py`):

    a sequence as long as the context              400
    one longer than the context less 7             400, in other words (max_req_input_len)
    it and max_new_tokens beyond the context       400
    max_new_tokens beyond the context less 2       capped, silently
    one sequence of several refused                all of them
    an id that the model does not have             read from beyond the table; only for
                                                   token_ids_logprob 400
    a model's name                                 not looked at; lora_path is
    the vocabulary's last id                       echoed as 0
    -inf and NaN                                   null
    sampling_seed                                  ignored, unless deterministic
"""

from __future__ import annotations

import contextlib
import math
import threading

import torch
from served_http import OWN, NoSuchPath, Refused, Served, ends_of, listen, sample_text

DEFAULTS = dict(
    temperature=1.0, top_p=1.0, top_k=1 << 30, min_p=0.0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0,
)  # fmt: skip
BOUNDS = {
    "temperature": (0, math.inf), "top_p": (1e-9, 1), "min_p": (0, 1),
    "repetition_penalty": (1e-9, 2), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
}  # fmt: skip


@contextlib.contextmanager
def serve(
    model, tokenizer, *, context_length=None, name="teacher", api_key=None, deterministic=True,
    truncates=False, adapters=(),
):  # fmt: skip
    """Served while the block runs.

    context_length, deterministic, truncates: as --context-length, --enable-deterministic-inference
    and --allow-auto-truncate.
    """
    served, lock = Served(), threading.Lock()
    faults = served.faults
    context = context_length or model.config.max_position_embeddings
    height = model.config.vocab_size

    def content(path, body):
        if path == "/v1/models" and body is None:
            return {"object": "list", "data": models()}
        if path in ("/tokenize", "/v1/tokenize") and body is not None:
            special = body.get("add_special_tokens", True)
            ids = tokenizer.encode(body["prompt"], add_special_tokens=special)
            return {"tokens": ids, "count": len(ids), "max_model_len": context}
        if path != "/generate":
            raise NoSuchPath(404)
        if body is None:
            raise NoSuchPath(405)
        with lock:
            answer = generate(body)
        return faults.answer(answer) if faults.answer else answer

    def models():
        if faults.models is not OWN:
            return faults.models
        base = {"id": name, "object": "model", "owned_by": "sglang", "root": name,
                "parent": None, "max_model_len": context}  # fmt: skip
        return [base, *(base | {"id": a, "parent": name, "max_model_len": None} for a in adapters)]

    @torch.no_grad()
    def generate(body):
        ids = body.get("input_ids")
        if not isinstance(ids, list) or not ids:
            raise Refused("input_ids cannot be empty.")
        single = type(ids[0]) is int
        sequences = [ids] if single else ids
        for one in sequences:
            if not isinstance(one, list) or not all(type(i) is int for i in one):
                raise Refused("input_ids: must be a list of int64, or of such lists")
        if (adapter := body.get("lora_path")) is not None and adapter not in adapters:
            raise Refused(f"Got LoRA adapter that has never been loaded: {adapter}")

        def of(key, i, default):
            value = body.get(key)
            if value is not None and not single and isinstance(value, list):
                if len(value) <= i:
                    raise Refused("Internal Server Error", status=500)
                value = value[i]
            return default if value is None else value

        sequences = [list(one) for one in sequences]
        asked = [checked(one, of, i) for i, one in enumerate(sequences)]  # before any is answered
        results = [answer(one, *more) for one, more in zip(sequences, asked)]
        return results[0] if single else results

    def checked(ids, of, i):
        sent = of("sampling_params", i, {})
        most = sent.get("max_new_tokens", 128)
        if len(ids) >= context and not truncates:
            raise Refused(
                f"The input ({len(ids)} tokens) is longer than the model's context length "
                f"({context} tokens)."
            )
        if len(ids) + most > context:
            if not truncates:
                raise Refused(
                    "Requested token count exceeds the model's maximum context length of "
                    f"{context} tokens. You requested a total of {len(ids) + most} tokens: "
                    f"{len(ids)} tokens from the input messages and {most} tokens for the "
                    "completion. Please reduce the number of tokens in the input messages or the "
                    "completion to fit within the limit."
                )
            most = max(0, context - len(ids))
        for token in of("token_ids_logprob", i, []):
            if not 0 <= token < height:
                raise Refused(
                    f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range "
                    f"is [0, {height})."
                )
        sampling = {key: sent.get(key, neutral) for key, neutral in DEFAULTS.items()}
        for key, (low, high) in BOUNDS.items():
            if not low <= sampling[key] <= high:
                raise Refused(f"{key} must be in [{low}, {high}], got {sampling[key]}.")
        if sampling["top_k"] < 1 and sampling["top_k"] != -1:
            raise Refused(f"top_k must be -1 (disable) or at least 1, got {sampling['top_k']}.")
        if sampling["top_k"] > height:
            sampling["top_k"] = -1
        if most < 0:
            raise Refused(f"max_new_tokens must be at least 0, got {most}.")
        if len(ids) >= context - 6:
            if not truncates:
                raise Refused(
                    f"Input length ({len(ids)} tokens) exceeds the maximum allowed length "
                    f"({context - 6} tokens). Use a shorter input or enable --allow-auto-truncate."
                )
            del ids[context - 6 :]
        seed = sent.get("sampling_seed") if deterministic else None
        start = of("logprob_start_len", i, -1) if of("return_logprob", i, False) else -1
        if start > len(ids):
            raise Refused(f"{start=} is higher than the number of input tokens {len(ids)}.")
        most = max(0, min(most, context - 2 - len(ids), faults.max_new_tokens or most))
        return most, sampling, seed, start, of("top_logprobs_num", i, 0)

    def answer(ids, most, sampling, seed, start, k):
        info, written = {"id": "1", "prompt_tokens": len(ids)}, []
        if start >= 0 and not faults.no_log_probs:
            logits = model(torch.tensor([[i if i < height else 0 for i in ids]])).logits[0]
            log_probs = logits.float().log_softmax(-1)
            label = [log_probs[i, token].item() for i, token in enumerate(ids[1:]) if i >= start]
            named = [token if token < height - 1 else 0 for token in ids[start:]]
            best = [log_probs[i].topk(k) for i in range(start, len(ids) - 1)]
            rows = list(zip([None, *map(number, label)], named, [None] * len(named)))
            info["input_token_logprobs"] = rows[: -1 if faults.drop_last else None]
            if k:
                info["input_top_logprobs"] = [None] + [
                    [[number(v), i, None] for v, i in zip(b.values.tolist(), b.indices.tolist())]
                    [: faults.most] for b in best
                ]  # fmt: skip
        finish = {"type": "length", "length": most}
        if most:
            seed = len(served.requests) if seed is None else seed
            ends = ends_of(model, tokenizer)
            written = sample_text(model, ids, most, sampling, seed, ends)
            if written[-1] in ends:
                finish = {"type": "stop", "matched": written[-1]}
            served.texts.append(written)
        info |= {"finish_reason": finish, "completion_tokens": len(written)}
        return {"text": tokenizer.decode(written, skip_special_tokens=True),
                "output_ids": written, "meta_info": info}  # fmt: skip

    def number(value):
        return None if faults.nan or not math.isfinite(value) else value

    with listen(content, served, api_key):
        yield served
