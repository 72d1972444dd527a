"""Additions whose work is written out column by column, in a good and in a bad notation.

The prompt is `4 7 + 8 5 =`, one token a digit or sign. The completion writes a step for each
column, units first, and then the answer:

    teacher's notation   7 5 0 > 1 2 ;    digit, digit, carry in, >, carry out, digit of the sum
    other notation       5 7 ~ 2 .        digits swapped, ~, digit of the sum; carries forgotten
    answer               # 1 3 2 </s>     copied from the steps

Whether an answer is right depends only on the digits after `#`, not on the notation; but without
carries it is right only where there are none. A step ends in signs that are chosen at random, so
that a good model keeps an entropy there. The two notations share digits, `#` and the end of the
text, and no other sign.

    SHORT      one sign of four, each as likely as the others: 26 ids
    LONG_TAIL  three signs of a thousand, the n-th with a probability proportional to 1/n (Zipf):
               2,018 ids, of which the 64 likeliest hold 63 % of the mass where a sign is due
    REMARKS    the same with eight signs, most of a text: a student of the other notation hardly
               writes a token that the teacher would
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DIGITS = 2
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = 0, 1, 2
HELD_OUT = 256
_HELD_OUT_SEED = 20_26
#: What the teacher has seen of others' writing: steps in the other notation, and wrong tokens.
FOREIGN_STEPS, WRONG_TOKENS = 0.25, 0.05

Problem = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """The signs in which steps end. `own` are the teacher's, `other` those of the bad notation,
    `count` of them after each step; `zipf`: the n-th is drawn with a weight of 1/n, not of 1."""

    own: tuple[str, ...]
    other: tuple[str, ...]
    count: int = 1
    zipf: bool = False

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        return (*SPECIAL, *"0123456789", *"+=#>~", *self.own, *self.other)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def longest(self) -> int:
        """Tokens of a completion in the teacher's notation, the longer of the two."""
        return (6 + self.count) * DIGITS + 1 + (DIGITS + 1) + 1

    def habit(self, problem: Problem, rng: random.Random, share: float) -> list[str]:
        """What a student is pre-trained on: each step in the teacher's notation with probability
        `share`. A step in the other notation neither takes a carry nor hands one on."""
        carry, written, total = 0, [], []
        for x, y in _columns(problem):
            if rng.random() < share:
                step, carry = self._step(x, y, carry, rng)
                digit = step[5]
            else:
                digit, carry = str((x + y) % 10), 0
                step = self._foreign_step(x, y, digit, rng)
            written += step
            total = [digit, *total]
        return [*written, "#", str(carry), *total, "</s>"]

    def lesson(self, problem: Problem, rng: random.Random) -> tuple[list[str], list[str | None]]:
        """What the teacher is trained on: a text with mistakes of others in it, and for each
        position the right token (None: not counted). So it knows the right way on from a wrong
        beginning."""
        text: list[str] = []
        right: list[str | None] = []
        carry = 0
        for x, y in _columns(problem):
            step, after = self._step(x, y, carry, rng)
            if rng.random() < FOREIGN_STEPS:
                foreign = self._foreign_step(x, y, str((x + y) % 10), rng)
                text += foreign
                right += [step[0], *[None] * (len(foreign) - 1)]
            else:
                text += self._with_mistakes(step, rng)
                right += step
            carry = after
        answer = ["#", *_digits(sum(problem), DIGITS + 1), "</s>"]
        return text + self._with_mistakes(answer, rng), right + answer

    def is_own_notation(self, written: Sequence[str]) -> bool:
        """Whether no sign of the other notation occurs."""
        return not {"~", *self.other} & set(written)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One id for each token; tokens are separated by blanks."""
        backend = Tokenizer(models.WordLevel(self.ids, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            eos_token="</s>",
            padding_side="left",
        )

    def _step(self, x: int, y: int, carry: int, rng: random.Random) -> tuple[list[str], int]:
        after, digit = divmod(x + y + carry, 10)
        written = [*map(str, (x, y, carry)), ">", str(after), str(digit)]
        return [*written, *self._signs(self.own, rng)], after

    def _foreign_step(self, x: int, y: int, digit: str, rng: random.Random) -> list[str]:
        return [str(y), str(x), "~", digit, *self._signs(self.other, rng)]

    def _signs(self, signs: tuple[str, ...], rng: random.Random) -> list[str]:
        if not self.zipf:
            return [rng.choice(signs) for _ in range(self.count)]
        return rng.choices(signs, cum_weights=_zipf(len(signs)), k=self.count)

    def _with_mistakes(self, tokens: list[str], rng: random.Random) -> list[str]:
        known = self.tokens[len(SPECIAL) :]
        return [rng.choice(known) if rng.random() < WRONG_TOKENS else token for token in tokens]


SHORT = Task(tuple(";,:|"), tuple(".!?*"))
LONG_TAIL = Task(
    tuple(f"a{i}" for i in range(1000)), tuple(f"b{i}" for i in range(1000)), count=3, zipf=True
)
REMARKS = replace(LONG_TAIL, count=8)
TASKS = {"short": SHORT, "long_tail": LONG_TAIL, "remarks": REMARKS}


@cache
def _zipf(n: int) -> tuple[float, ...]:
    """Weights 1/1 to 1/n, added up."""
    return tuple(accumulate(1 / (i + 1) for i in range(n)))


@cache
def held_out() -> tuple[Problem, ...]:
    """The problems on which accuracy is measured. No model trains on them."""
    rng = random.Random(_HELD_OUT_SEED)
    found: dict[Problem, None] = {}
    while len(found) < HELD_OUT:
        found[_any_problem(rng)] = None
    return tuple(found)


@cache
def _held_out_set() -> frozenset[Problem]:
    return frozenset(held_out())


def draw(rng: random.Random) -> Problem:
    """A problem to train on."""
    while True:
        problem = _any_problem(rng)
        if problem not in _held_out_set():
            return problem


def prompt(problem: Problem) -> list[str]:
    a, b = problem
    return [*_digits(a, DIGITS), "+", *_digits(b, DIGITS), "="]


def is_right(problem: Problem, written: Sequence[str]) -> bool:
    """Whether what follows the first `#` is the sum, and nothing else."""
    if "#" not in written:
        return False
    answer = written[list(written).index("#") + 1 :]
    return list(answer) == [*_digits(sum(problem), DIGITS + 1), "</s>"]


def _any_problem(rng: random.Random) -> Problem:
    return rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)


def _digits(number: int, width: int) -> list[str]:
    return list(str(number).zfill(width))


def _columns(problem: Problem) -> list[tuple[int, int]]:
    """Digits of both numbers, units first."""
    a, b = (reversed(_digits(number, DIGITS)) for number in problem)
    return [(int(x), int(y)) for x, y in zip(a, b)]
