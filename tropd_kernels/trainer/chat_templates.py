"""Which keys `chat_template_kwargs` takes: what the template reads, and its caller's arguments.

A template is given every key, and says nothing of one that it never reads: a typo, or a switch of
another family of models.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import TemplateError, meta  # which torch brings
from transformers import ProcessorMixin
from transformers.utils import chat_template_utils

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


def _cut_or_padded(given: Mapping[str, Any]) -> Iterator[str]:
    """Keys that change the length of prompts, those for a tokenizer in a mapping, too."""
    for key, value in given.items():
        if key in _LENGTHS and value not in _LENGTHS[key]:
            yield key
        elif isinstance(value, Mapping):
            yield from _cut_or_padded(value)


def check_parts(prompts: Iterable[Any], tokenizer: Any, **arguments: Any) -> None:
    """Raises ValueError for messages in parts of text, if the chat template does not read them.

    Templates for text print such a list as Python does, leave it or a part out, or fail. Of the
    same contents as text a template may leave parts out, too, and raise errors of its own.

    arguments: of `apply_chat_template`.
    """

    def render(messages: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)

    for prompt in prompts:
        listed = [m["content"] for m in prompt if isinstance(m.get("content"), list)]
        texts = [text.strip() for content in listed for text in _texts(content)]
        if not texts:
            continue
        try:
            rendered = render(prompt)
        except (TemplateError, TypeError):
            rendered = ""
        printed = any(repr(content) in rendered for content in listed)
        missing = [text for text in texts if text not in rendered]
        if missing and not printed:
            as_text = render([_as_text(message) for message in prompt])
            missing = [text for text in missing if text in as_text]
        if printed or missing:
            raise ValueError(
                "chat template: it does not read a content that is a list of parts, as in "
                f"{prompt!r:.200}: write each message's content as text"
            )


def _as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(_texts(content))}


def _texts(content: Iterable[Any]) -> list[str]:
    """The texts among the parts of a message."""
    return [part["text"] for part in content if isinstance(part.get("text"), str)]


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
