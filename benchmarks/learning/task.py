"""Additions whose work is written out column by column, in a good and in a bad notation.

The prompt is `4 7 + 8 5 =`, one token a digit or sign. The completion writes a step for each
column, units first, and then the answer:

    teacher's notation   7 5 0 > 1 2 ;    digit, digit, carry in, >, carry out, digit of the sum
    other notation       5 7 ~ 2 .        digits swapped, ~, digit of the sum; carries forgotten
    answer               # 1 3 2 </s>     copied from the steps

Whether an answer is right depends only on the digits after `#`, not on the notation; but without
carries it is right only where there are none. A step ends in one of four signs, chosen at
random, so that a good model keeps an entropy of log 4 there. The two notations share digits, `#`
and the end of the text, and no other sign.
"""

import random
from collections.abc import Sequence
from functools import cache

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DIGITS = 2
OWN_ENDS = tuple(";,:|")  # of a step in the teacher's notation
OTHER_ENDS = tuple(".!?*")
SPECIAL = ("<pad>", "<s>", "</s>")
TOKENS = (*SPECIAL, *"0123456789", *"+=#>~", *OWN_ENDS, *OTHER_ENDS)
IDS = {token: i for i, token in enumerate(TOKENS)}
PAD, BOS, EOS = 0, 1, 2
#: Tokens of a completion in the teacher's notation, the longer of the two.
LONGEST = 7 * DIGITS + 1 + (DIGITS + 1) + 1
HELD_OUT = 256
_HELD_OUT_SEED = 20_26
#: What the teacher has seen of others' writing: steps in the other notation, and wrong tokens.
FOREIGN_STEPS, WRONG_TOKENS = 0.25, 0.05

Problem = tuple[int, int]


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


def habit(problem: Problem, rng: random.Random, share: float) -> list[str]:
    """What a student is pre-trained on: each step in the teacher's notation with probability
    `share`. A step in the other notation neither takes a carry nor hands one on."""
    carry, written, total = 0, [], []
    for x, y in _columns(problem):
        if rng.random() < share:
            step, carry = _step(x, y, carry, rng)
            digit = step[5]
        else:
            digit, carry = str((x + y) % 10), 0
            step = _foreign_step(x, y, digit, rng)
        written += step
        total = [digit, *total]
    return [*written, "#", str(carry), *total, "</s>"]


def lesson(problem: Problem, rng: random.Random) -> tuple[list[str], list[str | None]]:
    """What the teacher is trained on: a text with mistakes of others in it, and for each position
    the right token (None: not counted). So it knows the right way on from a wrong beginning."""
    text: list[str] = []
    right: list[str | None] = []
    carry = 0
    for x, y in _columns(problem):
        step, after = _step(x, y, carry, rng)
        if rng.random() < FOREIGN_STEPS:
            foreign = _foreign_step(x, y, str((x + y) % 10), rng)
            text += foreign
            right += [step[0], *[None] * (len(foreign) - 1)]
        else:
            text += _with_mistakes(step, rng)
            right += step
        carry = after
    answer = ["#", *_digits(sum(problem), DIGITS + 1), "</s>"]
    return text + _with_mistakes(answer, rng), right + answer


def is_right(problem: Problem, written: Sequence[str]) -> bool:
    """Whether what follows the first `#` is the sum, and nothing else."""
    if "#" not in written:
        return False
    answer = written[list(written).index("#") + 1 :]
    return list(answer) == [*_digits(sum(problem), DIGITS + 1), "</s>"]


def is_own_notation(written: Sequence[str]) -> bool:
    """Whether no sign of the other notation occurs."""
    return not {"~", *OTHER_ENDS} & set(written)


def tokenizer() -> PreTrainedTokenizerFast:
    """One id for each token; tokens are separated by blanks."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )


def _any_problem(rng: random.Random) -> Problem:
    return rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)


def _digits(number: int, width: int) -> list[str]:
    return list(str(number).zfill(width))


def _columns(problem: Problem) -> list[tuple[int, int]]:
    """Digits of both numbers, units first."""
    a, b = (reversed(_digits(number, DIGITS)) for number in problem)
    return [(int(x), int(y)) for x, y in zip(a, b)]


def _step(x: int, y: int, carry: int, rng: random.Random) -> tuple[list[str], int]:
    after, digit = divmod(x + y + carry, 10)
    return [*map(str, (x, y, carry)), ">", str(after), str(digit), rng.choice(OWN_ENDS)], after


def _foreign_step(x: int, y: int, digit: str, rng: random.Random) -> list[str]:
    return [str(y), str(x), "~", digit, rng.choice(OTHER_ENDS)]


def _with_mistakes(tokens: list[str], rng: random.Random) -> list[str]:
    known = TOKENS[len(SPECIAL) :]
    return [rng.choice(known) if rng.random() < WRONG_TOKENS else token for token in tokens]
