"""Whether an id means the same to student, teacher and tokenizer: vocabularies, ends, padding."""

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .patching import replaced
from .prefix import first_difference

#: Text on which two tokenizers of one vocabulary, but different merges or rules, differ.
_PROBE = "The 2nd test: naïve façade, x = -3.14;\n\n  if (a != b) { 数学 }\tEnd."

#: transformers' name of a warning.
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"


def differing(ours: Mapping[str, int], theirs: Mapping[str, int]) -> list[str]:
    """Our tokens of which the id, or whose id, is another one for them; in the order of ids."""
    names = {i: token for token, i in theirs.items()}
    differ = [t for t, i in ours.items() if theirs.get(t, i) != i or names.get(i, t) != t]
    return sorted(differ, key=ours.__getitem__)


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where an id or a text means different things to the two, saying which.

    An id that only one of them has is no conflict: vocabularies that are padded to different
    heights are compared on the ids that both have.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    by_id = {i: token for token, i in theirs.items()}
    differ = [
        f"{t!r} is {ours[t]} for the student and {theirs[t]} for the teacher"
        if t in theirs
        else f"{ours[t]} is {t!r} for the student and {by_id[ours[t]]!r} for the teacher"
        for t in differing(ours, theirs)
    ]
    if not differ:
        check_same_texts(student, teacher)
    else:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise _other_tokenizer(f"{'; '.join(differ[:3])}{more}")


def check_same_texts(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the two make different tokens of a text without special ones."""
    ours, theirs = (
        one(_PROBE, add_special_tokens=False)["input_ids"] for one in (student, teacher)
    )
    if ours != theirs:
        raise _other_tokenizer(
            f"the text {_PROBE[:24]!r}... has {len(ours)} and {len(theirs)} tokens"
        )


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has a token besides its end, padding and the like: transformers makes some kinds
    (Qwen's, Gemma's) with those alone where a model's folder has no files of a tokenizer."""
    roles = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    return not set(tokenizer.get_vocab()) <= roles


def ends_warning(
    ends: Sequence[int], theirs: int | None, table: Mapping[int, int],
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:  # fmt: skip
    """The warning, if any, that a teacher's answers end where the student's text goes on.

    theirs: the end that the teacher's tokenizer names, that of an answer; a model's
    generation_config may list others. table: ids of the student to those of a teacher with other
    special tokens.
    """
    end = next((own for own, other in table.items() if other == theirs), theirs)
    if end is None or end in ends or end >= len(tokenizer):
        return None
    return (
        f"teacher_model: its answers end with {tokenizer.decode([end])!r}, which does not end the "
        "student's: what the student writes behind it is trained on as well. Where the student is "
        "to end there, set tokenizer.eos_token to it, or add its id to the student's "
        "generation_config.eos_token_id"
    )


def check_whole(
    tokenize: Callable[[str], Sequence[int]], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> None:
    """Raises ValueError where a text of up to so many tokens is cut, by whatever code or setting.

    A text of tokens that the tokenizer has is doubled until it is that long, and has to have more
    tokens each time. A text that cannot be tokenized says nothing: a processor may want an image
    beside it, or a tokenizer lack the space between the halves.
    """
    ids = sorted(tokenizer.get_vocab().values())[:: len(tokenizer) // 64 + 1]
    words = str(tokenizer.decode(ids, skip_special_tokens=True))
    text = f"{words if words.strip() else tokenizer.decode(ids)} "  # or all tokens are special
    # Or it would warn of a text that its models do not read, and say so but once.
    known = {**tokenizer.deprecation_warnings, _TOO_LONG: True}
    with replaced(tokenizer, deprecation_warnings=known):
        try:
            before, count = 0, len(tokenize(text))
            while before < count < tokens:
                text += text
                before, count = count, len(tokenize(text))
        except Exception:
            return
    if count <= before:
        raise ValueError(
            f"processing_class: a {type(tokenizer).__name__} cuts texts: of one of {len(text)} "
            f"characters, and of its half, it makes {count} tokens, so prompts and answers would "
            "end early without a word: take one that does not, or leave out what makes it do so in "
            "chat_template_kwargs or its own settings; longer prompts are for the data set to "
            "shorten"
        )


def _other_tokenizer(how: str) -> ValueError:
    return ValueError(
        f"teacher_model: its tokenizer is not the student's: {how}. Distillation compares the two "
        "token by token: choose models of one family"
    )


def check_server_tokenizer(
    student: PreTrainedTokenizerBase, tokenize: Callable[[str], list[int] | None]
) -> None:
    """Raises ValueError where a served teacher's tokenizer splits a text into other tokens.

    `tokenize` returns None where the server does not offer tokenization.
    """
    ours, theirs = student(_PROBE, add_special_tokens=False)["input_ids"], tokenize(_PROBE)
    if theirs is None or list(ours) == list(theirs):
        return
    at = first_difference(ours, theirs)
    raise ValueError(
        f"teacher_model_server_url: its tokenizer is not the student's: {_PROBE[:24]!r}... is "
        f"{len(ours)} tokens for the student and {len(theirs)} for the teacher, and token {at} is "
        f"{ours[at : at + 1]} and {theirs[at : at + 1]}. Distillation compares the two token by "
        "token: serve a teacher of the student's family"
    )


def check_ids(
    ids: torch.Tensor, vocab_size: int, what: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ValueError for an id that one of the two models does not have."""
    highest = int(ids.max()) if ids.numel() else 0
    if highest >= vocab_size:
        raise ValueError(
            f"a {what} holds id {highest} ({tokenizer.decode([highest])!r}), but student and "
            f"teacher have only the ids below {vocab_size} in common: choose a teacher that knows "
            "this token, or keep it out of the prompts"
        )


def check_padding(tokenizer: PreTrainedTokenizerBase, vocab_size: int, side: str) -> None:
    """Raises ValueError for a padding id that a model cannot look up, though the mask hides it."""
    if (pad := tokenizer.pad_token_id) is not None and pad >= vocab_size:
        raise ValueError(
            f"processing_class: its padding {tokenizer.pad_token!r} has id {pad}, and the {side} "
            f"only the ids below {vocab_size}: set tokenizer.pad_token to a token that it has, "
            "such as eos_token, or resize_token_embeddings() of the model"
        )


def check_eos(
    eos_token_ids: Sequence[int | None],
    vocab_size: int,
    whose: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raises ValueError where no token ends completions, or a model does not have one that does.

    A student that cannot generate the end would not learn to stop.
    """
    for token in eos_token_ids:
        if token is None:
            raise ValueError(
                "processing_class: the tokenizer has no eos_token, with which completions end: "
                "set tokenizer.eos_token"
            )
        if token >= vocab_size:
            raise ValueError(
                f"processing_class: the token that ends a completion, "
                f"{tokenizer.decode([token])!r} with id {token}, is beyond the {vocab_size} ids "
                f"that {whose}: choose models that know it, or another end (the tokenizer's "
                "eos_token and the student's generation_config.eos_token_id)"
            )
