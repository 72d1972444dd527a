"""Models that are given by name: where their files are, for weights, config and tokenizer alike.

`from_pretrained` finds a model by its name and some of its options (revision, subfolder, ...). The
tokenizer that is compared, the config that chooses the model's class and the check that a model
exists have to look in the same place, so all of them take their options from here.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

#: Options of `from_pretrained` that say where files are, ...
PLACE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
#: ... and whether and which code comes with them.
_CODE = ("code_revision", "trust_remote_code")
#: What transformers raises where files are missing or are none of a tokenizer or a config.
_NOT_FOUND = (OSError, ValueError, KeyError)


def student_options(args: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a student by name. args: a `TrOPDConfig`."""
    options = dict(args.model_init_kwargs or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return options


def teacher_options(args: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a teacher by name. args: a `TrOPDConfig`."""
    options = dict(args.teacher_model_init_kwargs or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        options["revision"] = args.teacher_model_revision  # another one there is refused
    return options


def pick(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the options that are given."""
    return {name: options[name] for name in names if options.get(name) is not None}


def check_one_teacher(teacher: Any, args: Any) -> None:
    """Raises ValueError for a teacher beside `args.teacher_model_name_or_path`, of which one would
    be dropped. teacher: a model, its name, or None."""
    named = args.teacher_model_name_or_path
    if teacher is None or named is None:
        return
    config = getattr(teacher, "config", None)
    name = teacher if isinstance(teacher, str) else getattr(config, "_name_or_path", "")
    if name != named:
        given = repr(name) if isinstance(teacher, str) else f"a {type(teacher).__name__}"
        raise ValueError(
            f"teacher_model_name_or_path: {named!r}, and teacher_model is {given}: give one of "
            "the two"
        )


def check_revisions(args: Any) -> None:
    """Raises ValueError where two keys ask for two revisions of the teacher."""
    inner = (args.teacher_model_init_kwargs or {}).get("revision")
    outer = args.teacher_model_revision
    if None not in (inner, outer) and inner != outer:
        raise ValueError(
            f"teacher_model_revision: {outer!r}, and teacher_model_init_kwargs has the revision "
            f"{inner!r}: give one of the two"
        )


def find_tokenizer(teacher: Any, args: Any) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer by the teacher's name, or None where there is none to be had.

    Looked up with the options by which the model is loaded. An adapter without a tokenizer has its
    base's. The name of a model that is loaded already is looked up on this machine alone, at
    `args.teacher_model_revision`.
    """
    options = pick(teacher_options(args), (*PLACE, *_CODE))
    name = teacher if isinstance(teacher, str) else getattr(teacher.config, "_name_or_path", "")
    if not isinstance(teacher, str):
        options["local_files_only"] = True
    if not name:
        return None
    with contextlib.suppress(*_NOT_FOUND):
        return AutoTokenizer.from_pretrained(name, **options)
    with contextlib.suppress(*_NOT_FOUND):
        if (base := adapter_base(name, options)) is not None:
            return AutoTokenizer.from_pretrained(base, **options)
    return None


def find_processor(student: Any, args: Any) -> Any:
    """The student's tokenizer or processor, looked up with the options by which the model is
    loaded; None for a model, and where TRL's own look-up, by name and revision, will do."""
    options = pick(student_options(args), (*PLACE, *_CODE))
    theirs = {"revision": options.get("revision"), "trust_remote_code": args.trust_remote_code}
    if not isinstance(student, str) or options.items() <= theirs.items():
        return None
    return AutoProcessor.from_pretrained(
        student, truncation_side="left", padding_side="left", **options
    )


def model_class(name: str, options: Mapping[str, Any]) -> Any:
    """The class whose `from_pretrained` loads this model with these options.

    TRL's loader would choose it by the config of the default revision, cache and folder. Raises
    what transformers does, and ImportError for an adapter where PEFT is not installed.
    """
    options = pick(options, (*PLACE, *_CODE, "gguf_file"))
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except _NOT_FOUND:
        if adapter_base(name, options) is None:
            raise
        if not is_peft_available():
            raise ImportError(f"{name} is an adapter: pip install peft") from None
        return AutoModelForCausalLM  # which loads the base, and the adapter into it
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    own_code = getattr(config, "auto_map", None) or {}
    images = AutoModelForImageTextToText.__name__ in own_code
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def adapter_base(name: str, options: Mapping[str, Any]) -> str | None:
    """The base model's name where this name is a PEFT adapter's, else None."""
    with contextlib.suppress(*_NOT_FOUND):
        if (found := find_adapter_config_file(name, **pick(options, PLACE))) is not None:
            return json.loads(Path(found).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return None


@contextlib.contextmanager
def class_of_student(student: Any, args: Any) -> Iterator[None]:
    """Inside, `args.model_init_kwargs` give TRL's loader the student's class where they say in
    which place its config is: by itself it would look for that without them."""
    given = args.model_init_kwargs or {}
    if not isinstance(student, str) or not pick(given, (*PLACE, "code_revision", "gguf_file")):
        yield
        return
    args.model_init_kwargs = given | {"architecture": model_class(student, student_options(args))}
    try:
        yield
    finally:
        args.model_init_kwargs = given
