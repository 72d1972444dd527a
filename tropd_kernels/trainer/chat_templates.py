"""Which keys `chat_template_kwargs` takes: what the template reads, and its caller's arguments.

A template is given every key, and says nothing of one that it never reads: a typo, or a switch of
another family of models.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, meta  # which torch brings
from transformers import ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.utils import chat_template_utils
from trl.data_utils import prepare_multimodal_messages

from ..objectives.registry import nearest

#: What TRL, or transformers, passes to each template itself, and what to do instead.
_SET_ALREADY = {
    "chat_template": "set the chat_template of processing_class",
    "tools": "give tools to TrOPDTrainer",
    **dict.fromkeys(
        ("conversation", "messages", "add_generation_prompt", "tokenize", "return_dict",
         "return_tensors", "return_assistant_tokens_mask"),
        "leave it out",
    ),
}  # fmt: skip
#: Keys with which a tokenizer cuts or pads, and the values with which it does not.
_LENGTHS = {
    "truncation": (False, None, "do_not_truncate"), "padding": (False, None, "do_not_pad"),
    "max_length": (None,),
}  # fmt: skip
#: A template that writes the text of the first message alone, given in parts.
PLAIN = "{{ messages[0]['content'][0]['text'] }}"
#: Keys of a message with reasoning beside its content, by families of templates.
_REASONING = {"reasoning", "reasoning_content", "thinking"}
#: Where reasoning ends within a content.
_THOUGHT = re.compile(r"</(\w+:)?(think|thinking|reasoning)>|\[/THINK\]")
#: Stands for texts: no template has it of its own, or leaves it out as it may thoughts.
_MARK = "mark7f3a"


def check_template_keys(
    given: Mapping[str, Any] | None, processor: Any, template: str | None, tools: Collection[Any]
) -> None:
    """Raises ValueError for keys of `chat_template_kwargs` that the chat template does not read.

    Nothing is said of a template that cannot be parsed, nor of a processor with code of its own.

    Args:
        given: The `chat_template_kwargs`.
        processor: A tokenizer or a processor.
        template: The template that is used instead of the processor's own.
        tools: As the trainer takes them.
    """
    for key in given or ():
        if key in _SET_ALREADY:
            raise ValueError(
                f"chat_template_kwargs: {key!r} is the trainer's own: {_SET_ALREADY[key]}"
            )
    if given and given.get("continue_final_message"):
        raise ValueError(
            "chat_template_kwargs: 'continue_final_message' continues the last message, but the "
            "trainer begins an answer after it (add_generation_prompt): leave it out"
        )
    for key in _cut_or_padded(given or {}):
        raise ValueError(
            f"chat_template_kwargs: {key!r} would cut or pad prompts, and an answer would begin "
            "there: leave it out; longer prompts are for the data set to shorten"
        )
    for key in given or ():
        if key in _of_images(processor):
            raise ValueError(
                f"chat_template_kwargs: {key!r} would change the images that completions are "
                "written from, and not those that the loss reads: set it on "
                "processing_class.image_processor"
            )
    # transformers_modules, for instance, comes from the hub.
    if not given or not type(processor).apply_chat_template.__module__.startswith("transformers."):
        return
    _check_arguments(given, processor)
    used = list(_templates(template or processor.chat_template, tools))
    try:
        read = set().union(*map(_variables, used))
    except (ImportError, TemplateError):  # of an old jinja2, of no template
        return
    takes = read | _arguments(processor)
    for key in given if used else ():
        if key not in takes:
            own = sorted(read - _SET_ALREADY.keys())
            raise ValueError(
                f"chat_template_kwargs: {key!r} would have no effect: the chat template reads "
                f"{', '.join(own) or 'no variable'} besides messages and tools"
                f"{nearest(key, takes - _SET_ALREADY.keys())}: leave it out"
            )


def as_lists(processor: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs` with which prompts become lists of ids: for a processor these with
    `list_options`, for a tokenizer these."""
    if not isinstance(processor, ProcessorMixin):
        return dict(given)
    parameters = inspect.signature(processor.apply_chat_template).parameters
    if "processor_kwargs" not in parameters:  # transformers before 5.4
        return list_options(processor, given)
    # All of the processor's arguments: transformers 5.17 puts those that stand beside
    # processor_kwargs in its place.
    own = {key: given[key] for key in given if key in _arguments(processor) - {*parameters}}
    options = list_options(processor, {**(given.get("processor_kwargs") or {}), **own})
    return {key: given[key] for key in given if key not in own} | {"processor_kwargs": options}


def list_options(processor: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of a call, `given` among them, that neither pads nor returns tensors.

    By default Gemma 4's processor pads, and DeepSeek-VL's and Pixtral's return tensors, for which
    prompts of different lengths have no shape. TRL drops the mask that would tell padding from
    prompt. A tokenizer does neither, and is given nothing.
    """
    options = dict(given or {})
    if not isinstance(processor, ProcessorMixin):
        return options
    text = options.get("text_kwargs") or {}
    # With 5.3 TRL asks for padding itself, and takes it off again.
    if "padding" not in text and not transformers_version.startswith("5.3."):
        options = {"padding": False} | options
    if type(processor).__call__.__module__.startswith("transformers."):  # not of a hub's own code
        options["text_kwargs"] = {"return_tensors": None} | text
    return options


def _check_arguments(given: Mapping[str, Any], processor: Any) -> None:
    """Raises ValueError for arguments with which prompts are not tokenized, asked one by one."""
    if not _makes_ids(processor, {}):  # of text without an image
        return
    takes = _arguments(processor)
    for key, value in given.items():
        if key not in takes:
            continue
        single = {repr(key): {key: value}}
        if key.endswith("_kwargs") and value is not None:
            if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
                raise ValueError(
                    f"chat_template_kwargs: {key!r}: expected a mapping of arguments by their "
                    f"names, got {value!r:.80}"
                )
            single = {f"{key!r}: {name!r}": {key: {name: value[name]}} for name in value}
        for where, arguments in single.items():
            if not _makes_ids(processor, arguments):
                raise ValueError(
                    f"chat_template_kwargs: {where} with this value is no argument with which "
                    "prompts can be tokenized, or it is given already: leave it out"
                )


def _makes_ids(processor: Any, arguments: Mapping[str, Any]) -> bool:
    talk = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    try:
        ids = processor.apply_chat_template(
            [talk, talk], chat_template=PLAIN, tokenize=True, return_dict=True,
            **as_lists(processor, arguments),
        )["input_ids"]  # fmt: skip
    except (AttributeError, TypeError, ValueError):
        return False
    return len(ids) == 2 and all(isinstance(row, list) for row in ids)


def _cut_or_padded(given: Mapping[str, Any]) -> Iterator[str]:
    """Keys that change the length of prompts, those for a tokenizer in a mapping, too."""
    for key, value in given.items():
        if key in _LENGTHS and value not in _LENGTHS[key]:
            yield key
        elif isinstance(value, Mapping):
            yield from _cut_or_padded(value)


def check_contents(conversations: Iterable[Any], processor: Any, **arguments: Any) -> None:
    """Raises ValueError for messages of text or in parts, if the chat template does not read them.

    Templates for text print a list of parts as Python does, leave it or a part out, or fail; those
    for parts find none in a text. What a template leaves out in either form is its own affair.

    arguments: of `apply_chat_template`.
    """
    remedies = {
        str: "write each message's content as a list of parts, [{'type': 'text', 'text': ...}]",
        list: "write each message's content as text",
    }
    if converts := isinstance(processor, ProcessorMixin):
        remedies[list] = "beside a processor every content is one: give it a template that does"
    for conversation in conversations:
        if converts:  # as TRL does
            conversation = prepare_multimodal_messages(conversation)
        for form, remedy in remedies.items():
            if _is_unread(form, conversation, processor, arguments):
                is_ = "text" if form is str else "a list of parts"
                raise ValueError(
                    f"chat template: it does not read a content that is {is_}, as in "
                    f"{conversation!r:.200}: {remedy}"
                )


def check_reasoning(
    conversation: Sequence[Mapping[str, Any]], column: str | None, processor: Any, **arguments: Any
) -> None:
    """Raises ValueError for reasoning in a teacher's answer, the last message, that the template
    leaves out, in its content or under a key of its own: the answer would be learned without it.

    column: the answer's. arguments: of `apply_chat_template`.
    """
    answer = conversation[-1]
    texts = {key: answer[key] for key in sorted(_REASONING) if isinstance(answer.get(key), str)}
    parts = _parts(answer) if answer.get("content") else []
    content = "".join(part["text"] for part in parts if _has_text(part))
    if _THOUGHT.search(content):
        texts["content"] = content
    if not texts:
        return
    written = processor.apply_chat_template(conversation, tokenize=False, **arguments)
    for key, text in texts.items():
        # Templates put other spaces around it.
        if "".join(text.split()) not in "".join(written.split()):
            others = " or ".join(map(repr, sorted(_REASONING - {key})))
            raise ValueError(
                f"{column}: the chat template does not write the answer's {key!r} whole, "
                f"{text!r:.80}: its reasoning would not be learned: give it as the template reads "
                f"it, under its own key ({others}) or by chat_template_kwargs, take a template "
                "that writes it, or leave it out"
            )


def _is_unread(form: type, conversation: Any, processor: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether contents of this type are written worse than they would be in the other form."""
    own = [isinstance(message.get("content"), form) for message in conversation]
    texts = [part["text"].strip() for message, is_own in zip(conversation, own) if is_own
             for part in _parts(message) if _has_text(part)]  # fmt: skip

    def rendered(messages: Any) -> str:
        try:
            return processor.apply_chat_template(messages, tokenize=False, **arguments)
        except (TemplateError, TypeError):
            return ""

    def written(as_text: bool) -> str:
        return rendered(
            [
                {**message, "content": _marked(message, as_text)} if is_own else message
                for message, is_own in zip(conversation, own)
            ]
        )

    if not texts:
        return False
    found = written(form is str)
    if form is list and f"'text': {_MARK!r}" in found:
        return True
    if found.count(_MARK) >= min(len(texts), written(form is not str).count(_MARK)):
        return False
    # Unless the template looks for words that the mark is not.
    whole = rendered(conversation)
    return not all(whole.count(text) > found.count(text) for text in texts)


def _marked(message: Mapping[str, Any], as_text: bool) -> Any:
    """The content with a mark in the place of each of its texts, as one text or in parts."""
    parts = [{**part, "text": _MARK} if _has_text(part) else part for part in _parts(message)]
    return "\n".join(part["text"] for part in parts if _has_text(part)) if as_text else parts


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _has_text(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("text"), str) and bool(part["text"].strip())


def _templates(own: Any, tools: Collection[Any]) -> Iterator[str]:
    """The template, or those of several by name that transformers may choose."""
    if isinstance(own, str):
        yield own
    elif isinstance(own, Mapping):
        names = ("default", "tool_use") if tools else ("default",)
        yield from (own[name] for name in names if name in own)


def _variables(template: str) -> set[str]:
    """Names that the template reads without setting them first."""
    environment = chat_template_utils._compile_jinja_template(template).environment
    return set(meta.find_undeclared_variables(environment.parse(template)))


def _of_images(processor: Any) -> set[str]:
    """Keys that a processor passes to its image processor."""
    part = getattr(processor, "image_processor", None)
    if part is None:
        return set()
    own = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
    groups = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {})
    of_group = getattr(groups.get("images_kwargs"), "__annotations__", {})
    return {"images_kwargs", "processor_kwargs", *own, *of_group} - {"return_tensors"}


def _arguments(processor: Any) -> set[str]:
    """What `apply_chat_template` takes itself, or passes to a processor's parts."""
    takes = set(inspect.signature(processor.apply_chat_template).parameters)
    takes -= {"kwargs", "documents"}  # documents are read by the template alone
    if isinstance(processor, ProcessorMixin):
        takes |= set(inspect.signature(processor.__call__).parameters)
        groups = [getattr(processor, "valid_processor_kwargs", None)]
        groups += [getattr(part, "valid_kwargs", None) for part in vars(processor).values()]
        for group in groups:
            for name, kind in getattr(group, "__annotations__", {}).items():
                takes |= {name, *getattr(kind, "__annotations__", {})}
    return takes
