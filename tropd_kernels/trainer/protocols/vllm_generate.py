"""vLLM's endpoint of ids in, ids out.

    POST /inference/v1/generate    token_ids [ids], sampling_params {prompt_logprobs: k, ...}:
                                   choices, and {id: {"logprob": ...}} at each prompt position

One sequence a request. Whether prompt and max_tokens fit the context is not checked: a text is cut
there, as `finish_reason` says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..completions import read_choices
from .base import Body, Sample
from .vllm import MIN_NEW_TOKENS, VLLM


class VLLMGenerate(VLLM):
    name = "vllm_generate"
    path = "/inference/v1/generate"
    batches = False

    def scoring(self, sequences: Sequence[Sample], top_k: int) -> Body:
        ((prompt, completion),) = sequences
        return self._body([*prompt, *completion], prompt_logprobs=top_k, temperature=1.0)

    def writing(
        self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any], seed: int | None
    ) -> Body:
        own = {} if seed is None else {"seed": seed}
        return self._body(prompt, **{"max_tokens": max_tokens, **sampling, **own})

    def asking(self, token: int) -> Body:
        return self._body([token])

    def parts(self, answer: Any, count: int) -> Sequence[Mapping[str, Any]]:
        (choice,) = read_choices(answer, count)
        return [{**choice, "prompt_logprobs": answer.get("prompt_logprobs")}]

    def _body(self, ids: Sequence[int], **sampling: Any) -> Body:
        # What is not sent is the default of vLLM's SamplingParams, not of the model's config.
        sampling = {"max_tokens": MIN_NEW_TOKENS, **sampling}
        return {"model": self.model, "token_ids": list(ids), "sampling_params": sampling}
