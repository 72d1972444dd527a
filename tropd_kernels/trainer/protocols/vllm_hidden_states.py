"""vLLM's hidden states, of which the teacher's own head makes every log-prob on this side.

    POST /pooling    input [[ids], ...], task "token_embed", use_activation False: of each sequence
                     the last hidden states of all its tokens, after the last norm, in base64

The server runs the model without its head (`--runner pooling`), so it writes no texts. A token has
H numbers of `embed_dtype`, 8/3 H bytes of base64 in bfloat16. Without `use_activation` False each
state would be scaled to length 1. The bytes come without a shape.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...heads import Head
from ..completions import HiddenStates
from .base import Body, Protocol, Sample
from .vllm import REMEDIES

_FLAGS = """--runner pooling --pooler-config '{"task": "token_embed"}'"""
_START = "Start the server with " + _FLAGS.replace("{", "{{").replace("}", "}}")
#: The dtypes of heads that vLLM sends; others come in float32.
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_BYTES_OF_A_LOG_PROB = 75  # vLLM's JSON


class VLLMHiddenStates(Protocol):
    """`head`, the teacher's, has to be set before the first request."""

    name = "vllm_hidden_states"
    path = "/pooling"
    batches = True
    scoring_room = 0
    writing_room = 0
    sends_states = True
    remedies: ClassVar = (*REMEDIES, (r"pooling_task|Unsupported task|Pooling API", _START))
    no_path = f"start the server with {_FLAGS}"
    head: Head | None = None

    @property
    def _weight(self) -> torch.Tensor:
        if self.head is None:
            raise ValueError(
                f"protocol: {self.name!r} reads the width of states from the teacher's head: set "
                "protocol.head to it, as read_head gives it"
            )
        return self.head.weight

    @property
    def _dtype(self) -> torch.dtype:
        dtype = self._weight.dtype
        return dtype if dtype in _DTYPES else torch.float32

    @property
    def _width(self) -> int:
        return self._weight.shape[1]

    def size(self, top_k: int) -> int:
        return -(-self._width * self._dtype.itemsize * 4 // (3 * _BYTES_OF_A_LOG_PROB))

    def nothing(self, top_k: int) -> HiddenStates:
        return HiddenStates(torch.zeros(0, self._width, dtype=self._dtype))

    def scoring(self, sequences: Sequence[Sample], top_k: int) -> Body:
        return self._body([[*prompt, *completion] for prompt, completion in sequences])

    def writing(
        self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any], seed: int | None
    ) -> Body:
        raise NotImplementedError(
            "teacher_server_protocol: a server of hidden states has no head, and writes no "
            "prefixes and answers: set prefix_column to a column that holds them, or take a "
            "protocol of log-probs"
        )

    def asking(self, token: int) -> Body:
        return self._body([[token]])

    def parts(self, answer: Any, count: int) -> Sequence[Any]:
        data = answer["data"]
        indices = [one["index"] for one in data]
        if sorted(indices) != list(range(count)):
            raise ValueError(f"data of the indices {indices} came: expected 0 to {count - 1}")
        return sorted(data, key=lambda one: one["index"])

    def read_scores(self, part: Any, sequence: Sample, top_k: int) -> HiddenStates:
        prompt, completion = sequence
        tokens, width = len(prompt) + len(completion), self._width
        try:
            sent = bytearray(base64.b64decode(part["data"], validate=True))
        except (TypeError, binascii.Error) as error:
            raise ValueError(f"{part['data']!r:.40} came: expected base64") from error
        size = self._dtype.itemsize
        if len(sent) != tokens * width * size:
            each, rest = divmod(len(sent), tokens * size)
            came = f"{len(sent)} bytes" if rest else f"states of width {each}"
            raise ValueError(
                f"{came} came for {tokens} tokens, and the head of teacher_model takes states of "
                f"width {width}: give the checkpoint that is served as teacher_model"
            )
        states = torch.frombuffer(sent, dtype=self._dtype).view(tokens, width)
        if not states.isfinite().all():
            raise ValueError("the hidden states hold NaN or infinity")
        return HiddenStates(states[len(prompt) - 1 : -1].clone())

    def read_text(self, part: Any, max_tokens: int) -> list[int]:
        raise NotImplementedError

    def _body(self, sequences: list[list[int]]) -> Body:
        return {
            "model": self.model,
            "input": sequences,
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "base64",
            "embed_dtype": _DTYPES[self._dtype],
            "endianness": "little",
        }
