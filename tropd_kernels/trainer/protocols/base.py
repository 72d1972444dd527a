"""The shape of a protocol: prompts and k to log-probs, a prompt to a text."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..completions import HiddenStates, TokenScores, no_scores

Body = dict[str, Any]
#: Ids of a prompt, and of the completion that is scored after it.
Sample = tuple[Sequence[int], Sequence[int]]


class Protocol(ABC):
    """How one kind of server is asked.

    model: the name that it serves. models: the names that it lists, each with that of its base
    model if it is an adapter. Raises ValueError for a model that it does not have.

    Reading raises ValueError, KeyError, TypeError or AttributeError for a malformed answer.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    batches: ClassVar[bool]
    """Whether a request takes several sequences."""
    scoring_room: ClassVar[int]
    """Tokens that the server's context needs beyond those that it scores."""
    writing_room: ClassVar[int]
    """... beyond a prompt and the tokens that are asked after it."""
    sends_states: ClassVar[bool] = False
    """Whether it sends hidden states in place of log-probs, and no texts."""
    no_path: ClassVar[str] = "set teacher_server_protocol to None, or to what the server speaks"
    """What to do about a server without the path."""
    remedies: ClassVar[tuple[tuple[str, str], ...]]
    """Patterns of refusals, and what to do about each; {k}: log-probs asked, {names}: models."""

    def __init__(self, model: str, models: Mapping[str, str | None]):
        self.model = model

    def size(self, top_k: int) -> int:
        """How much is sent for a token, in log-probs."""
        return top_k + 1

    def nothing(self, top_k: int) -> TokenScores | HiddenStates:
        """What is read of a completion without tokens."""
        return no_scores(top_k)

    @abstractmethod
    def scoring(self, sequences: Sequence[Sample], top_k: int) -> Body:
        """The request for log-probs of completions and of the `top_k` likeliest ids there."""

    @abstractmethod
    def writing(
        self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any], seed: int | None
    ) -> Body:
        """The request for a text. sampling: by vLLM's names."""

    @abstractmethod
    def asking(self, token: int) -> Body:
        """A request that is refused, by a word on the vocabulary, if the teacher has no such id."""

    @abstractmethod
    def parts(self, answer: Any, count: int) -> Sequence[Any]:
        """The parts of an answer that belong to each of `count` sequences, in their order."""

    @abstractmethod
    def read_scores(
        self, part: Any, sequence: Sample, top_k: int
    ) -> TokenScores | HiddenStates: ...

    @abstractmethod
    def read_text(self, part: Any, max_tokens: int) -> list[int]: ...
