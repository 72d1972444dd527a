"""The served teacher of a config, tested before any model is loaded.

A first small request of each kind shows whether the server supports it, and the list of its models
its context. So a run does not stop at its first step, or train on texts that were cut.
"""

import random
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..heads import Head
from . import signals
from .config import TrOPDConfig
from .protocols import VLLMHiddenStates
from .server import TeacherServer
from .teacher_head import load_head

#: Tokens that the first request scores: one value may pass for a log-prob though it is none.
_PROBE_TOKENS = 8


class ServedTeacher(TeacherServer):
    """The server of a config.

    writes: whether the teacher has to generate texts, and not only to score them. checkpoint: name
    or folder of the served model, whose head is loaded for a server of hidden states.

    head: that head; None where the server gives log-probs.

    Raises TeacherServerError if the server does not answer, has no model of that name, or does not
    support what the objective needs; ValueError if its context is too short for
    max_completion_length.
    """

    head: Head | None = None

    def __init__(self, args: TrOPDConfig, writes: bool, checkpoint: Any = None):
        assert args.teacher_model_server_url is not None
        super().__init__(
            args.teacher_model_server_url, args.teacher_model_name_or_path,
            timeout=args.teacher_server_timeout, retries=args.teacher_server_retries,
            concurrency=args.teacher_server_concurrency, protocol=args.teacher_server_protocol,
        )  # fmt: skip
        self._args = args
        if isinstance(self.protocol, VLLMHiddenStates) and args.uses_teacher:
            self.head = self.protocol.head = load_head(checkpoint, args)
            self._compare(checkpoint)
        self.scores, self.is_asked = args.uses_teacher, args.uses_teacher or writes
        if self.is_asked:
            self._check_room(1, args.max_completion_length or 0, "the shortest prompt, of 1 token,")
        if self.scores:
            top_k = max(map(signals.required_top_k, args.rules()))
            self.check_scores(top_k, min(args.max_completion_length or 1, _PROBE_TOKENS))
        if writes:
            self.check_text(**self._sampling())

    def _compare(self, checkpoint: str) -> None:
        """Warns of a head that is not the served model's, by the name of its folder."""
        root = self._models.get(self.model, {}).get("root")
        if isinstance(root, str) and Path(root).name != Path(checkpoint).name:
            warnings.warn(
                f"teacher_model: the head is that of {checkpoint}, and the server has {root!r} as "
                f"{self.model!r}: if that is another checkpoint, the teacher's distributions are "
                "wrong: give the served one",
                stacklevel=4,  # the trainer's caller
            )

    def count_ids(self, most: int) -> int:
        """Number of the ids 0 ... most - 1 that the teacher has, and its head."""
        return super().count_ids(most if self.head is None else min(most, self.head.vocab_size))

    def check_prompts(
        self, prompt_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raises ValueError for a prompt too long to be scored with a completion of full length."""
        if self.scores:
            self._check_all(prompt_ids, self._args.max_completion_length or 0, tokenizer)

    def write(
        self,
        prompt_ids: list[list[int]],
        tokens: int,
        seed: str,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[list[int]]:
        """Texts of at most `tokens` tokens, as `generate` returns them, sampled as the config says.

        `seed` seeds all of them. Raises ValueError for a prompt that is too long.
        """
        self._check_all(prompt_ids, tokens, tokenizer)
        draw = random.Random(seed)
        seeds = [draw.getrandbits(31) for _ in prompt_ids]
        return self.generate(prompt_ids, tokens, seeds=seeds, **self._sampling())

    def _sampling(self) -> dict[str, Any]:
        """All sampling parameters: vLLM takes missing ones from the teacher's generation_config."""
        return {
            "temperature": self._args.temperature,
            "top_p": self._args.top_p,
            "top_k": self._args.top_k or -1,
            "min_p": self._args.min_p or 0.0,
            "repetition_penalty": self._args.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def _check_all(
        self, prompt_ids: list[list[int]], tokens: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        if self.context is None or not prompt_ids:
            return
        longest = max(prompt_ids, key=len)
        what = f"the prompt of {len(longest)} tokens that begins with "
        self._check_room(len(longest), tokens, f"{what}{tokenizer.decode(longest[:16])!r}")

    def _check_room(self, prompt: int, tokens: int, what: str) -> None:
        more = self.protocol.scoring_room if self.scores else self.protocol.writing_room
        if self.context is None or prompt + tokens + more <= self.context:
            return
        also = f", and {more} more that the server needs," if more else ""
        raise ValueError(
            f"teacher_model_server_url: {what} with a completion of {tokens} tokens{also} "
            f"exceeds the context of {self.context} of {self.model!r}: lower "
            "max_completion_length, drop or cut such prompts, or start the server with a larger "
            "context (vLLM: --max-model-len, SGLang: --context-length)"
        )
