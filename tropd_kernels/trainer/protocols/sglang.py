"""SGLang's own endpoint.

    POST /generate    input_ids [[ids], ...], return_logprob, logprob_start_len, top_logprobs_num=k,
                      sampling_params {max_new_tokens: 0}: meta_info.input_token_logprobs, rows of
                      [log-prob, id, text], and input_top_logprobs, at each position k such rows
                      input_ids [ids], sampling_params: output_ids, with meta_info.finish_reason

Only log-probs of the completion are sent, after a row of the prompt's last id, which has none. -inf
is null (and so is NaN, which JSON does not have). The vocabulary's last id is echoed as 0. An
adapter's name is sent (lora_path), a model's is not; generation_config is not read.

What SGLang does not refuse: an id beyond the vocabulary, for which it reads beyond its table.
`asking` asks for such an id's log-prob instead, which is refused. `sampling_seed` is obeyed only
under `--enable-deterministic-inference`. A prompt may fill the context less 7 tokens, prompt and
text the context less 2, where the text is cut (`max_req_input_len`, `init_req_max_new_tokens`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..completions import TokenScores, check_id, read_log_prob, read_text, scores_at
from .base import Body, Protocol, Sample

_TOO_LONG = (
    "Start the server with a larger --context-length, lower max_completion_length, or drop the "
    "longest prompts"
)


class SGLang(Protocol):
    name = "sglang"
    path = "/generate"
    batches = True
    scoring_room = 7
    writing_room = 2
    remedies: ClassVar = (
        (r"context length|maximum allowed length|KV memory budget", _TOO_LONG),
        (r"vocab", "Serve a teacher that has the student's ids"),
    )

    def __init__(self, model: str, models: Mapping[str, str | None]):
        super().__init__(model, models)
        if model not in models:  # the server would not say so
            raise ValueError(f"it does not list {model!r}")
        self._adapter = {"lora_path": model} if models[model] else {}

    def scoring(self, sequences: Sequence[Sample], top_k: int) -> Body:
        return {
            **self._adapter,
            "input_ids": [[*prompt, *completion] for prompt, completion in sequences],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [_start(prompt) for prompt, _ in sequences],
            "top_logprobs_num": top_k,
        }

    def writing(
        self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any], seed: int | None
    ) -> Body:
        own = {} if seed is None else {"sampling_seed": seed}
        return {
            **self._adapter,
            "input_ids": [list(prompt)],
            "sampling_params": {"max_new_tokens": max_tokens, **sampling, **own},
        }

    def asking(self, token: int) -> Body:
        return {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "token_ids_logprob": [token],
        }

    def parts(self, answer: Any, count: int) -> Sequence[Mapping[str, Any]]:
        if not isinstance(answer, list) or len(answer) != count:
            raise ValueError(f"a list of {count} results was asked, {answer!r:.80} came")
        return answer

    def read_scores(self, part: Any, sequence: Sample, top_k: int) -> TokenScores:
        prompt, completion = sequence
        rows = _rows(part, "input_token_logprobs", sequence)
        likeliest = _rows(part, "input_top_logprobs", sequence) if top_k else [()] * len(rows)
        highest, at = max((*prompt, *completion)), []
        for place, (token, row, others) in enumerate(zip(completion, rows, likeliest, strict=True)):
            value, came, *_ = row
            if came != token and not (came == 0 and token == highest):
                raise ValueError(
                    f"the log-prob of id {came!r:.40} came for token {place}, which is id {token}"
                )
            what = f"an id of the log-probs of token {place}"
            entries = {check_id(i, what): _log_prob(v, place) for v, i, *_ in others or ()}
            at.append(entries | {token: _log_prob(value, place)})
        return scores_at(at, completion, top_k, "lower the objective's top_k")

    def read_text(self, part: Any, max_tokens: int) -> list[int]:
        finish = part["meta_info"]["finish_reason"] or {}
        return read_text(
            {
                "token_ids": part.get("output_ids"),
                "finish_reason": finish.get("type"),
                "stop_reason": finish.get("matched"),
            },
            max_tokens,
        )


def _start(prompt: Sequence[int]) -> int:
    """The position whose row comes first, the prompt's last."""
    return len(prompt) - 1


def _rows(part: Any, name: str, sequence: Sample) -> list[Any]:
    """The rows of a completion's tokens. Raises ValueError for another number of them."""
    expected = 1 + len(sequence[1])
    rows = part["meta_info"].get(name)
    if not isinstance(rows, list) or len(rows) != expected:
        got = len(rows) if isinstance(rows, list) else "none"
        raise ValueError(
            f"{name} for {expected} tokens were asked, {got} came (a server with "
            "--allow-auto-truncate cuts a sequence that is too long)"
        )
    return rows[1:]


def _log_prob(sent: Any, place: int) -> float:
    return -math.inf if sent is None else read_log_prob(sent, place)
