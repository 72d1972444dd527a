"""What servers are asked, and how their answers read: one small class for each protocol.

| name          | path                   | servers                                       |
|---------------|------------------------|-----------------------------------------------|
| vllm          | /v1/completions        | vLLM, and others with its `prompt_logprobs`   |
| vllm_generate | /inference/v1/generate | vLLM with --enable-scale-out or --tokens-only |
| sglang        | /generate              | SGLang                                        |
| vllm_hidden_states | /pooling          | vLLM with --runner pooling: no log-probs      |

A protocol sends nothing: `server.py` does, and repeats, batches, and names what failed. Written
from the sources of vLLM 0.32 and SGLang 0.5.23.
"""

from .base import Protocol
from .sglang import SGLang
from .vllm import VLLM
from .vllm_generate import VLLMGenerate
from .vllm_hidden_states import VLLMHiddenStates

PROTOCOLS: dict[str, type[Protocol]] = {
    p.name: p for p in (VLLM, VLLMGenerate, SGLang, VLLMHiddenStates)
}


def sends_states(protocol: str | None) -> bool:
    """Whether servers by this protocol send hidden states in place of log-probs."""
    return protocol in PROTOCOLS and PROTOCOLS[protocol].sends_states


__all__ = ["PROTOCOLS", "Protocol", "VLLMHiddenStates", "sends_states"]
