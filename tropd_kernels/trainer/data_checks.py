"""Data sets and prompts that are refused, each with what is wrong and what to do."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from os import PathLike
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from . import signals, teacher_prompts
from .recipes import how_to_unset


def data_sets(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any, Sequence[str] | None]]:
    """Each data set, those in mappings too: its name in errors, itself, its columns as
    far as they are known.

    arguments: by their names.
    """
    for name, data in arguments.items():
        if isinstance(data, Mapping):
            yield from data_sets({f"{name}[{key!r}]": part for key, part in data.items()})
        elif data is not None:
            yield name, data, known_columns(data)


class ReadRows(list):
    """The rows of a batch, as a data set of which everything is known."""

    @property
    def column_names(self) -> list[str]:
        """Those that any row has with a value."""
        names = dict.fromkeys(name for row in self for name in row)
        return [name for name in names if any(row.get(name) is not None for row in self)]


def known_columns(data: Any) -> Sequence[str] | None:
    """The columns of a data set's rows. None: a list does not say them, a stream may not know them
    until it is read, nor does a data set with a transform, which makes its rows when they are read.
    Of those each batch is looked at."""
    form = getattr(data, "format", None)
    if isinstance(form, Mapping) and form.get("type") == "custom":
        return None
    return getattr(data, "column_names", None)


def prompts_are_text(data: Any, teacher_reads: bool) -> bool:
    """Whether all prompts are known to be text, with teacher_reads a teacher's own, too."""
    if (columns := known_columns(data)) is None:
        return False
    own = [teacher_prompts.COLUMN] if teacher_reads and teacher_prompts.COLUMN in columns else []
    if isinstance(data, ReadRows):
        return all(isinstance(row.get(column), str) for row in data for column in ["prompt", *own])
    kinds = getattr(data, "features", None) or {}
    types = [getattr(kinds.get(column), "dtype", None) for column in ["prompt", *own]]
    return all(kind in ("string", "large_string") for kind in types)


def has_teacher_prompts(data: Any) -> bool:
    """Whether a data set is known to have that column."""
    return teacher_prompts.COLUMN in (known_columns(data) or ())


def check_datasets(train: Any, evaluate: Any, args: Any, has_teacher: bool) -> None:
    """Raises ValueError for data sets without the columns that the config's settings need.

    has_teacher: whether one is loaded or behind a server.
    """
    columns = signals.columns_of(args.rules()) if args.precomputed_teacher else ()
    named = args.is_guided and args.prefix_column not in (None, "teacher_completion")
    check_no_splits(train)
    _check_dataset("train_dataset", train, [*columns, *([args.prefix_column] if named else [])])
    own = [teacher_prompts.COLUMN] if has_teacher and has_teacher_prompts(train) else []
    _check_dataset("eval_dataset", evaluate, [*columns, *own])
    present = known_columns(train)
    if args.is_guided and not has_teacher and present and args.prefix_column not in present:
        raise missing_guide_error(args.prefix_column)
    if present and args.prefix_column in present:
        check_guides(train, args)


def _check_dataset(argument: str, given: Any, columns: Sequence[str]) -> None:
    """Raises ValueError for a data set without rows, without `prompt`, or without one of `columns`.

    A streaming data set has no length.
    """
    for name, data, present in data_sets({argument: given}):
        if _is_no_data_set(data):
            raise ValueError(
                f"{name}: a {type(data).__name__} is no data set of rows: give one of the package "
                "datasets (load_dataset, Dataset.from_pandas, IterableDataset.from_generator), or "
                "a list of mappings"
            )
        if hasattr(data, "__len__") and len(data) == 0:
            raise ValueError(f"{name}: the data set is empty; expected rows with a 'prompt'")
        if present is None:
            continue
        if missing := [c for c in ("prompt", *columns) if c not in present]:
            remedy = "rename_column() gives a column the name looked for"
            if "prompt" in missing and "messages" in present:  # the answer would be in the prompt
                remedy = "take the messages before the answer for the prompt"
            raise ValueError(
                f"{name}: no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(map(repr, present))}: {remedy}"
            )


def _is_no_data_set(data: Any) -> bool:
    """Whether it is a file's name, a frame of pandas, an iterator or a function that makes one,
    torch's own stream, or a list of other things than rows."""
    if isinstance(data, (str, PathLike, Iterator)) or hasattr(data, "iloc"):
        return True
    if isinstance(data, torch.utils.data.IterableDataset):  # accelerate takes it for one of tensors
        return not isinstance(data, datasets.IterableDataset)
    if not hasattr(data, "__getitem__") and not hasattr(data, "__iter__"):
        return True
    listed = isinstance(data, Sequence) and len(data) > 0
    return listed and not isinstance(data[0], Mapping)


def check_unread(
    datasets: Mapping[str, Any], args: Any, tools: Any = None, rewarded: bool = False
) -> None:
    """Raises ValueError for a column that nothing reads although other trainers read its name.

    Args:
        datasets: The trainer's arguments with data sets.
        args: The `TrOPDConfig`.
        tools: As the trainer takes them: with them all prompts have the same, whatever the column.
        rewarded: Whether reward functions are given, which get the columns and may read `tools`.
    """
    remedies = {"chat_template_kwargs": "give chat_template_kwargs to TrOPDConfig, for all rows"}
    if not (tools or rewarded or args.precomputed_teacher):
        remedies["tools"] = "give tools to TrOPDTrainer, for all rows"
    elif args.precomputed_teacher:
        remedies["tools"] = "write the prompts as text that has the tools in it"
        every = "every token of completion_ids enters the loss"
        remedies |= {"completion_mask": every, "tool_mask": every}
        remedies["old_log_probs"] = "the ratio to the policy that wrote the completions is not used"
    for name, _, present in data_sets(datasets):
        for column in [column for column in remedies if column in (present or ())]:
            raise ValueError(
                f"{name}: the column {column!r} would not be read: {remedies[column]}; and drop "
                f"the column by remove_columns({column!r}), or the key from the rows of a list"
            )


#: TRL's columns of images, and columns of what it reads in no column.
_IMAGES = {"image", "images"}
_OTHERS = {"video", "videos", "audio", "audios", "pixel_values"}
#: What the parts of a message show, by their types; and the keys of images that TRL does not read.
_ELSEWHERE = ("url", "path", "base64")
_SHOWN = {
    "image": "images", "image_url": "images", "video": "videos", "video_url": "videos",
    "audio": "sounds", "audio_url": "sounds", "input_audio": "sounds",
}  # fmt: skip
#: Attributes of processors and of their tokenizers, which differ in Gemma 3's: the placeholders.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token")
_BLIND = (
    "the processing class is a tokenizer, and the model sees no images: give one that does, with "
    "its processor"
)
_OF_TEXT = "the processing class is a tokenizer, of text alone:"


def check_modalities(datasets: Mapping[str, Any], processor: Any) -> None:
    """Raises ValueError for a column that TRL would drop unseen: it reads images alone, in one of
    two columns. Beside a tokenizer, for a column of images, too."""
    sees = isinstance(processor, ProcessorMixin)
    unread = _unread_columns(processor) if sees else _IMAGES | _OTHERS
    for name, _, present in data_sets(datasets):
        for column in sorted(unread & {*(present or ())}):
            if sees:
                why = "a prompt goes with images alone, in the column 'images' or 'image':"
            else:
                why = f"{_BLIND}, or" if column in _IMAGES else _OF_TEXT
            raise ValueError(
                f"{name}: the column {column!r} would not be read: {why} drop it by "
                f"remove_columns({column!r})"
            )
        if {*(present or ())} >= _IMAGES:
            raise ValueError(
                f"{name}: the column 'image' would not be read beside 'images': put all of a "
                "row's images into that one"
            )


def check_row_modalities(rows: Sequence[Mapping[str, Any]], processor: Any) -> None:
    """`check_modalities` for a batch: a stream may not have known its columns.

    TRL decides by the first row which of the two columns of images it reads. Beside a tokenizer
    such a column would have every message written as a list of parts, even without an image.
    """
    sees = isinstance(processor, ProcessorMixin)
    if sees:
        read = {name for name in ("images", "image") if name in rows[0]}
        read -= {"image"} if "images" in read else set()
        unread = (_unread_columns(processor) | _IMAGES) - read
        why = "a prompt goes with images alone, in the column 'images' or 'image', the same in all "
        why += "rows;"
    else:
        unread, why = _OTHERS, f"{_OF_TEXT} drop it;"
    for row in rows:
        if not sees and (shown := (["images"] if _IMAGES & row.keys() else _shown(row))):
            why = _BLIND if shown[0] == "images" else f"{_OF_TEXT} drop such rows"
            raise ValueError(f"prompt: its {shown[0]} would not be read: {why}; in {row!r:.200}")
        for part in _parts(row) if sees else ():
            kind, elsewhere = part["type"], any(part.get(key) for key in _ELSEWHERE)
            if kind in _SHOWN and (kind != "image" or (elsewhere and not part.get("image"))):
                raise ValueError(
                    f"prompt: a part of type {kind!r} would not be read: a prompt goes with images "
                    "alone, in its column or as {'type': 'image', 'image': image}; in the row "
                    f"{row!r:.200}"
                )
        if sees and isinstance(row["prompt"], list):  # text has its placeholders itself
            check_placeholders(row["prompt"], processor)
        for column in sorted(unread & row.keys()):
            value = row[column]
            if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
                raise ValueError(f"{column}: it would not be read: {why} in the row {row!r:.200}")


def check_placeholders(
    said: str | Sequence[Mapping[str, Any]], processor: Any, column: str = "prompt"
) -> None:
    """Raises ValueError for text that contains the placeholder of an image, a video or a sound.

    The processor or the model would look for the image itself, and fail without naming the row.

    said: text, or messages; what is neither is refused elsewhere.
    """
    if not isinstance(processor, ProcessorMixin) or not isinstance(said, str | list):
        return
    of = (processor, processor.tokenizer)
    found = [getattr(one, name, None) for one in of for name in _PLACEHOLDERS]
    tokens = [str(token) for token in found if token]
    messages = [{"content": said}] if isinstance(said, str) else said
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    for content in contents:
        parts = content if isinstance(content, list) else [{"text": content}]
        for text in [part.get("text") or "" for part in parts if isinstance(part, Mapping)]:
            if (token := next((token for token in tokens if token in text), None)) is not None:
                raise ValueError(
                    f"{column}: {token!r} in {text!r:.80} is a placeholder of the processor, and "
                    "no image would go with it: take it out, and give a prompt's images in their "
                    "column, or in the message as {'type': 'image', 'image': image}"
                )


def _unread_columns(processor: Any) -> set[str]:
    """Columns of other modalities than images, and what a processor makes of them."""
    made = set(getattr(processor, "model_input_names", ()))
    return _OTHERS | {column for column in made if not column.endswith(("_ids", "_mask"))}


def check_no_splits(dataset: Any) -> None:
    """Raises ValueError for a mapping of splits: their number would pass for that of the rows."""
    if isinstance(dataset, Mapping):
        first = "train" if "train" in dataset else next(iter(dataset), "train")
        raise ValueError(
            f"train_dataset: a {type(dataset).__name__} is no data set: pass dataset[{first!r}]; "
            f"it has splits {', '.join(map(repr, dataset)) or 'none'}"
        )


def missing_guide_error(column: str | None) -> ValueError:
    """For guidance with neither a column of the teacher's text nor a teacher to write it."""
    return ValueError(
        f"teacher_model: the data set has no column of the teacher's text ({column!r}), and there "
        "is no teacher to write it: give one of the two"
    )


def check_answers(
    rows: Sequence[Mapping[str, Any]], answers: Iterable[Sized | None], column: str
) -> None:
    """Raises ValueError for a teacher's answer without text or tokens: a share of it is nothing."""
    for place, answer in enumerate(answers):
        if not answer:
            raise ValueError(
                f"{column}: prefix_relative takes a share of each answer, and the one to the "
                f"prompt {rows[place]['prompt']!r:.80} is empty: drop such rows, or give a "
                "prefix_length instead"
            )


def check_guides(dataset: Any, args: Any) -> None:
    """Raises ValueError for a column of the teacher's text that does not go with the config."""
    column = args.prefix_column
    if args.prefix_relative and hasattr(dataset, "__len__"):
        read = isinstance(dataset, ReadRows)
        answers = [row.get(column) for row in dataset] if read else dataset[column]
        check_answers(dataset, answers, column)
    if args.lmbda == 0 and args.num_generations > 1:
        raise ValueError(
            f"num_generations: with lmbda 0 all {args.num_generations} completions of a prompt "
            f"would be its text in {column}: raise lmbda, or "
            + how_to_unset(args, "num_generations")
        )


def check_rows(dataset: Any, batch: int, generations: int) -> None:
    """Raises ValueError for fewer rows than a generation batch has: a run would take no step."""
    prompts = batch // generations
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) < prompts:
        over = f" / num_generations {generations}" if generations > 1 else ""
        raise ValueError(
            f"train_dataset: {len(dataset)} rows are fewer than one optimiser step takes, {prompts}"
            f" (per_device_train_batch_size x gradient_accumulation_steps x processes{over}): lower"
            " one of them, or add rows"
        )


def check_prompts(rows: Sequence[Mapping[str, Any]], column: str = "prompt") -> None:
    """Raises ValueError for a row whose prompt is neither text nor messages, and for a mixed batch.
    Warns of messages that end with an answer.

    TRL decides by the first row of a batch which of the two all of its rows are.
    """
    firsts: dict[type, Any] = {}
    for row in rows:
        prompt = row.get(column)
        if not isinstance(prompt, str) and not _is_conversation(prompt):  # "" may have a token
            raise ValueError(
                f"{column}: expected text or messages, got the row {row!r:.200}: a message has a "
                "'role' and a 'content', text or a list of parts with a 'type'; mend such rows, or "
                "drop them"
            )
        firsts.setdefault(list if isinstance(prompt, list) else str, prompt)
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            warnings.warn(
                f"{column}: the last message is the assistant's, and the student writes another "
                "after it: if it is the answer, take it out of the prompt",
                stacklevel=5,  # TRL's call of the trainer's hook
            )
    if len(firsts) > 1:
        raise ValueError(
            f"{column}: text and messages in one batch, {firsts[str]!r:.80} and "
            f"{firsts[list]!r:.200}: write all prompts in one of the two ways"
        )


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 0 and all(map(_is_message, prompt))


def _is_message(message: Any) -> bool:
    """By the rules of chat templates and TRL: a message with tool calls needs no content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and "type" in part for part in content)
    called = "content" in message and content is None and bool(message.get("tool_calls"))
    return isinstance(content, str) or called


def warn_of_added_tokens(
    rows: Sequence[Mapping[str, Any]],
    prompt_ids: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    column: str = "prompt",
) -> None:
    """Warns of prompts that start with the tokenizer's first token twice, and of text that ends
    with its last one.

    What a template writes last is the template's own affair.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    problems = []
    if start is not None and any(list(ids[:2]) == [start, start] for ids in prompt_ids):
        problems.append(
            f"starts with {tokenizer.bos_token!r} twice: text that a chat template has rendered "
            "has it already, and the tokenizer adds another: give the messages, or text without it"
        )
    # GPT-2's has one token for both: alone, it begins a text.
    text = [ids for row, ids in zip(rows, prompt_ids) if isinstance(row[column], str)]
    if end is not None and any(len(ids) > 1 and ids[-1] == end for ids in text):
        problems.append(
            f"ends with {tokenizer.eos_token!r}: completions would begin after the end of a text: "
            "set the tokenizer's add_eos_token=False, or take it off the text"
        )
    for problem in problems:
        warnings.warn(f"{column}: {problem}", stacklevel=5)  # TRL's call of the trainer's hook


def check_tokens(
    rows: Sequence[Mapping[str, Any]], prompt_ids: list[list[int]], column: str = "prompt"
) -> None:
    """Raises ValueError for a prompt without tokens: its completion would follow the padding."""
    for row, ids in zip(rows, prompt_ids):
        if len(ids) == 0:
            raise ValueError(
                f"{column}: no token in {row[column]!r:.80}, and the tokenizer begins a text with "
                f"none; in the row {row!r:.200}: drop such rows"
            )


def refuse_images(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises NotImplementedError for a row with an image, in its own column or in a message.

    A served teacher would answer without having seen it.
    """
    for row in rows:
        if row.get("images") or row.get("image") is not None or "images" in _shown(row):
            raise NotImplementedError(
                "teacher_model_server_url: images are not sent to a teacher's server: load the "
                "teacher in this process"
            )


def _shown(row: Mapping[str, Any]) -> list[str]:
    """What the parts of a row's messages are besides text: images, videos, sounds."""
    return [_SHOWN[part["type"]] for part in _parts(row) if part["type"] in _SHOWN]


def _parts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of which a row's messages consist."""
    messages = row["prompt"] if isinstance(row["prompt"], list) else []
    contents = [message.get("content") for message in messages]
    return [part for content in contents if isinstance(content, list) for part in content]
