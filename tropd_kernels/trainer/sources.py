"""Where the files of a model given by name are: weights, config, tokenizer.

`from_pretrained` finds a model by its name and some of its options (revision, subfolder, ...). The
tokenizer comparison, the choice of the model's class and the check that a model exists must look in
the same place, so all of them take their options from here.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    StrictDataclassError,
)
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from .effects import OF_LOADED_TEACHER, refuse
from .patching import replaced
from .protocols import VLLMHiddenStates, sends_states
from .self_teacher import is_self
from .vocabulary import has_words

#: Options of `from_pretrained` that say where files are ...
PLACE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
#: ... and whether and which code is loaded with them.
CODE = ("code_revision", "trust_remote_code")
#: What transformers raises for missing files, or files of neither a tokenizer nor a config.
_NOT_FOUND = (OSError, ValueError, KeyError)
#: Errors of transformers that say what is wrong, but not with which model.
_CLEAR = (
    ImportError, KeyError, ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError
)  # fmt: skip


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
    """The options of these names that are given."""
    return {name: options[name] for name in names if options.get(name) is not None}


def check_one_teacher(teacher: Any, args: Any) -> None:
    """Raises ValueError for a teacher (model or name) besides `teacher_model_name_or_path`."""
    named = args.teacher_model_name_or_path
    if teacher is None or named is None or args.teacher_model_server_url:  # there a served name
        return
    config = getattr(teacher, "config", None)
    name = teacher if isinstance(teacher, str) else getattr(config, "_name_or_path", "")
    if name != named:
        given = repr(name) if isinstance(teacher, str) else f"a {type(teacher).__name__}"
        raise ValueError(
            f"teacher_model_name_or_path: {named!r}, and teacher_model is {given}: give one of "
            "the two"
        )


def teacher_to_load(teacher_model: Any, args: Any) -> Any:
    """The teacher to load into this process, or None where its log-probs come otherwise.

    args: a `TrOPDConfig`. Raises ValueError for settings without effect, and a missing teacher.
    """
    if sends_states(args.teacher_server_protocol):
        _check_served_head(teacher_model, args)
        return None
    if not args.loads_teacher:
        if teacher_model is None:
            return None
        raise ValueError(
            "teacher_model: teacher_model_server_url and precomputed_teacher stand for the "
            "teacher: give one of the three, or the served checkpoint with teacher_server_protocol "
            f"{VLLMHiddenStates.name!r}"
        )
    check_one_teacher(teacher_model, args)
    loaded = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    if loaded is None and args.uses_teacher:
        own = any(rule.uses_teacher for rule in args.rules_of_all())
        by = "" if own else f" with select_by {args.select_by!r}"
        raise ValueError(
            f"teacher_model: objective {args.objective!r}{by} needs a teacher: give a model, "
            "teacher_model_server_url, or precomputed_teacher"
        )
    if loaded is None:
        refuse(args, OF_LOADED_TEACHER, "there is no teacher_model")
    return loaded


def _check_served_head(teacher_model: Any, args: Any) -> None:
    """Raises ValueError for what is no checkpoint's name, and for options that no head has."""
    if not isinstance(teacher_model, str) or is_self(teacher_model):
        got = f"a {type(teacher_model).__name__}"
        if teacher_model is None or is_self(teacher_model):
            got = "none" if teacher_model is None else repr(teacher_model)
        raise ValueError(
            "teacher_model: by a teacher_server_protocol of hidden states it is the name or folder "
            f"of the checkpoint that is served, of which the head is loaded: got {got}"
        )
    for key in args.teacher_model_init_kwargs or ():
        if key not in (*PLACE, *CODE):
            raise ValueError(
                f"teacher_model_init_kwargs: {key!r} would have no effect: of a teacher that sends "
                "hidden states the head is loaded, as it is in the checkpoint: leave it out; "
                f"{', '.join((*PLACE, *CODE))} are read"
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
    """The teacher's tokenizer, or None where it cannot be found.

    It is looked up by the teacher's name, with the options that load the model. An adapter without
    a tokenizer has that of its base. For a model that is loaded already only this machine is
    searched, at `args.teacher_model_revision`.
    """
    found = _of_teacher(AutoTokenizer, teacher, args)
    return None if found is None or not has_words(found) else found


def find_image_processor(teacher: Any, args: Any) -> Any:
    """The teacher's image processor, looked up like its tokenizer."""
    try:
        return _of_teacher(AutoImageProcessor, teacher, args)
    except ImportError:
        warnings.warn(
            "teacher_model: its image processor was not compared with the student's, for it needs "
            "a package that is not here, as a rule torchvision: install it, or see that both make "
            "the same pixels",
            stacklevel=2,
        )
        return None


def _of_teacher(kind: Any, teacher: Any, args: Any) -> Any:
    options = pick(teacher_options(args), (*PLACE, *CODE))
    name = teacher if isinstance(teacher, str) else getattr(teacher.config, "_name_or_path", "")
    if not isinstance(teacher, str):
        options["local_files_only"] = True
    if not name:
        return None
    with contextlib.suppress(*_NOT_FOUND):
        return kind.from_pretrained(name, **options)
    with contextlib.suppress(*_NOT_FOUND):
        if (base := adapter_base(name, options)) is not None:
            return kind.from_pretrained(base, **options)
    return None


def find_processor(student: Any, args: Any) -> Any:
    """The student's tokenizer or processor, looked up with the options that load the model.

    None for a model, and where TRL's own look-up, by name and revision, finds the same.
    """
    options = pick(student_options(args), (*PLACE, *CODE))
    theirs = {"revision": options.get("revision"), "trust_remote_code": args.trust_remote_code}
    if not isinstance(student, str) or options.items() <= theirs.items():
        return None
    return AutoProcessor.from_pretrained(
        student, truncation_side="left", padding_side="left", **options
    )


def model_class(name: str, options: Mapping[str, Any]) -> Any:
    """The class whose `from_pretrained` loads this model with these options.

    TRL's loader would choose it by the config at the default revision, cache and folder.

    Raises:
        ImportError: The name is an adapter's, and PEFT is not installed.
        OSError, ValueError: As transformers raises them for a model that it cannot find.
    """
    options = pick(options, (*PLACE, *CODE, "gguf_file"))
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except _NOT_FOUND:
        if (base := adapter_base(name, options)) is None:
            raise
        if not is_peft_available():
            raise ImportError(f"{name} is an adapter: pip install peft") from None
        # The base's class loads the adapter into it. The revision is of the adapter's repository.
        elsewhere = ("revision", "subfolder", "code_revision")
        return model_class(base, {k: v for k, v in options.items() if k not in elsewhere})
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    own_code = getattr(config, "auto_map", None) or {}
    images = AutoModelForImageTextToText.__name__ in own_code
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def adapter_base(name: str, options: Mapping[str, Any]) -> str | None:
    """The name of the base model if this is a PEFT adapter's name, else None."""
    with contextlib.suppress(*_NOT_FOUND):
        if (found := find_adapter_config_file(name, **pick(options, PLACE))) is not None:
            return json.loads(Path(found).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return None


@contextlib.contextmanager
def named_errors(what: str, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Raises what transformers raises inside, with `what` cannot be loaded in front.

    options: Arguments of `from_pretrained`.
    """
    try:
        yield
    except StrictDataclassError as error:  # a value of another type than the config's
        raise ValueError(f"{what} cannot be loaded: {' '.join(str(error).split())}") from error
    except _CLEAR as error:
        if type(error) not in _CLEAR:  # a subclass may take other arguments than a message
            raise
        hint = _rope_hint(options or {}) if isinstance(error, KeyError | TypeError) else ""
        raise type(error)(f"{what} cannot be loaded: {error}{hint}") from error


def _rope_hint(options: Mapping[str, Any]) -> str:
    """Which keys rotary parameters lack. A model's card leaves out the base, which its config has;
    transformers' error then is a KeyError or of an operand None."""
    for key in ("rope_parameters", "rope_scaling"):
        given = options.get(key)
        if isinstance(given, Mapping):
            lacking = [name for name in ("rope_type", "rope_theta") if given.get(name) is None]
            if lacking:
                return f": {key} replaces the config's own: give {' and '.join(lacking)} in it, too"
    return ""


@dataclass
class Loader:
    """A model's class as TRL's loader uses it, which takes two more options than transformers: a
    mapping as generation_config, and an eos_token_id where there is no generation_config.json."""

    architecture: Any

    def from_pretrained(self, name: str, **options: Any) -> Any:
        if isinstance(given := options.get("generation_config"), Mapping):
            options["generation_config"] = GenerationConfig(**given)
        model = self.architecture.from_pretrained(name, **options)
        if "eos_token_id" in options and hasattr(model, "generation_config"):
            model.generation_config.eos_token_id = options["eos_token_id"]
        return model


@dataclass
class _WithNamedErrors:
    """The same of a student, where errors say with which options it cannot be loaded."""

    loader: Loader

    def from_pretrained(self, name: str, **options: Any) -> Any:
        with named_errors(f"model: {name} with these model_init_kwargs", options):
            return self.loader.from_pretrained(name, **options)


@contextlib.contextmanager
def class_of_student(student: Any, args: Any) -> Iterator[None]:
    """Inside, `args.model_init_kwargs` hold the student's class, if there are any.

    TRL's loader would look for the config without these options, and not name them in an error.
    """
    given = args.model_init_kwargs or {}
    if not isinstance(student, str) or not given:
        yield
        return
    elsewhere = pick(given, (*PLACE, "code_revision", "gguf_file"))
    own = None if elsewhere else given.get("architecture")
    loader = Loader(own or model_class(student, student_options(args)))
    with replaced(args, model_init_kwargs=given | {"architecture": _WithNamedErrors(loader)}):
        yield


def check_sources(model: Any, teacher_model: Any, args: Any) -> None:
    """Raises OSError for a missing model: its text begins with "model" or "teacher_model".

    The folder is missing or holds no model, or the hub does not have the name. From the hub only
    the two configs are fetched.
    """
    check_source("model", model, student_options(args))
    several = teacher_model if isinstance(teacher_model, Mapping) else {}
    for name, one in several.items():
        check_source(f"teacher_models[{name!r}]", one, teacher_options(args))
    if not is_self(teacher_model):
        check_source("teacher_model", teacher_model, teacher_options(args))


def check_source(key: str, name: Any, options: Mapping[str, Any]) -> None:
    """The same of one model; `key` begins the error."""
    if not isinstance(name, str):
        return
    if Path(name).is_dir():
        _check_folder(key, Path(name, options.get("subfolder") or ""), options)
        return
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise OSError(f"{key}: there is no folder {name}")
    try:
        hf_hub_download(name, "config.json", **pick(options, PLACE))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        # A teacher on the hub may be an adapter, which has no config.json.
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError)
        if absent and (key.startswith("teacher_model") or options.get("gguf_file")):
            return
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{key}: there is no folder {name}, and the hub's model of that name cannot be read: "
            f"{reason}"
        ) from error


def _check_folder(key: str, folder: Path, options: Mapping[str, Any]) -> None:
    if (folder / "config.json").is_file() or options.get("gguf_file"):
        return
    if not (folder / "adapter_config.json").is_file():
        raise OSError(f"{key}: there is no model in the folder {folder}: it has no config.json")
    if key == "model":
        raise OSError(
            f"model: {folder} is an adapter: load it by PeftModel.from_pretrained(base, folder, "
            "is_trainable=True) and give that model, or give the base and train a new adapter"
        )
    if options.get("subfolder"):
        raise OSError(f"{key}: {folder} is an adapter: give that folder, without a subfolder")
