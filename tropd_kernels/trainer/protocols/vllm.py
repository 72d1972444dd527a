"""vLLM's OpenAI-compatible completions, with log-probs of the prompt.

    POST /v1/completions    prompt [[ids], ...], prompt_logprobs=k, max_tokens=1: a choice for each
                            prompt, with {id: {"logprob": ...}} at each position
                            prompt [ids], return_token_ids=True: the teacher's own text

About 75 k bytes of JSON for each token of a sequence. Log-probs are those before temperature. For
more than 20 of them vLLM is started with `--max-logprobs`. `return_token_ids` came with 0.10.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..completions import TokenScores, read_choices, read_scores, read_text
from .base import Body, Protocol, Sample

#: Fewest tokens that vLLM generates, even for a request that only asks for a prompt's log-probs.
MIN_NEW_TOKENS = 1
REMEDIES = (
    (r"logprobs.*max(imum)? allowed",
     "Start the server with --max-logprobs {k} or more, or lower the objective's top_k"),
    (r"context length|max_model_len|maximum model length|max_tokens must be at least 1",
     "Start the server with a larger --max-model-len, lower max_completion_length, or drop the "
     "longest prompts"),
    (r"out of vocabulary", "Serve a teacher that has the student's ids"),
    (r"model.*does not exist",
     "Set teacher_model_name_or_path to a name that the server has: {names}"),
    (r"enable-scale-out",
     "Start the server with --enable-scale-out, or set teacher_server_protocol to 'vllm'"),
)  # fmt: skip


class VLLM(Protocol):
    name = "vllm"
    path = "/v1/completions"
    batches = True
    scoring_room = MIN_NEW_TOKENS
    writing_room = 0
    remedies: ClassVar = REMEDIES

    def scoring(self, sequences: Sequence[Sample], top_k: int) -> Body:
        ids = [[*prompt, *completion] for prompt, completion in sequences]
        return {
            "model": self.model,
            "prompt": ids[0] if len(ids) == 1 else ids,  # as other servers know it
            "prompt_logprobs": top_k,
            "max_tokens": MIN_NEW_TOKENS,
            "temperature": 1.0,
        }

    def writing(
        self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any], seed: int | None
    ) -> Body:
        asked = {"prompt": list(prompt), "max_tokens": max_tokens, "return_token_ids": True}
        own = {} if seed is None else {"seed": seed}
        return {"model": self.model, **asked, **sampling, **own}

    def asking(self, token: int) -> Body:
        return {"model": self.model, "prompt": [token], "max_tokens": MIN_NEW_TOKENS}

    def parts(self, answer: Any, count: int) -> Sequence[Mapping[str, Any]]:
        return read_choices(answer, count)

    def read_scores(self, part: Any, sequence: Sample, top_k: int) -> TokenScores:
        return read_scores(part, *sequence, top_k)

    def read_text(self, part: Any, max_tokens: int) -> list[int]:
        return read_text(part, max_tokens)
