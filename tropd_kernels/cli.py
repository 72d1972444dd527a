"""Fused on-policy distillation from the command line.

    tropd train --config run.yaml [--key value ...]   trains a student on a teacher and prompts
    tropd check                                       fused against reference on this machine
    tropd bench [--shape NAME ...]                    time, memory and error, ours and others'
    tropd env                                         versions, devices and backends
    tropd integrations                                trainers that take the losses, and how

`train` needs `pip install 'tropd-kernels[trainer]'`, `bench` the repository; the others need only
torch, which is imported where a command runs: help comes at once. The keys of `train` are
`Run`'s below and every field of `TrOPDConfig`; flags win over the file. Several processes:
`accelerate launch -m tropd_kernels.cli train --config run.yaml`.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from . import __version__
from .once import parse_yaml, repeated_flag

#: Data files by suffix, with the loader that `datasets` has for them.
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class Run:
    """What a run needs besides its `TrOPDConfig`."""

    model: str | None = field(
        default=None,
        metadata={"help": "name or folder of the student."},
    )
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "name or folder of the teacher; it may come from `teacher_model_name_or_path`."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": 'a .json, .jsonl or .parquet file, or a name on the hub; with a "prompt".'
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "as dataset; it needs an eval_strategy."}
    )
    dataset_split: str = field(default="train", metadata={"help": "of data sets from the hub."})
    eval_split: str | None = field(
        default=None, metadata={"help": "of eval_dataset, where it is another one."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "functions of trl.rewards, dotted paths, or models; with a task_weight."},
    )
    peft: dict | str | None = field(
        default=None,
        metadata={
            "help": "true for a LoRA on all linear layers but the head, or the arguments of peft's "
            "LoraConfig; other kinds of adapter are for `TrOPDTrainer`, in Python."
        },
    )


#: Keys of TRL's scripts that are this command's own keys, in place of the trainer's arguments.
KEYS_OF_TRL = {
    "model_name_or_path": "model", "dataset_name": "dataset",
    "dataset_train_split": "dataset_split", "dataset_test_split": "eval_split",
    "use_peft": "peft", "use_dora": "use_dora in the mapping peft",
    "use_rslora": "use_rslora in the mapping peft", "peft_config": "the mapping peft",
    "lora_": "the mapping peft",
    "train_dataset": "dataset",
}  # fmt: skip


class UsageError(Exception):
    """An error of the user's, printed without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a failed check, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="tropd", description=__doc__.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"tropd-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a student", add_help=False)
    commands.add_parser("bench", help="compare with other libraries, in a checkout", add_help=False)
    check = commands.add_parser("check", help="compare fused and reference losses here")
    check.add_argument("--device", default=None, help="default: a GPU if there is one")
    commands.add_parser("env", help="print versions, devices and backends")
    commands.add_parser("integrations", help="print which trainers are here, and their switches")
    options, rest = parser.parse_known_args(arguments)
    if options.command not in ("train", "bench") and rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    # torch's, as it is imported; numpy comes along with all that needs it.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    # transformers' name for what TRL switches on under its old one.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    try:
        if options.command == "train":
            return train(rest)
        if options.command == "bench":
            return bench(rest)
        if options.command == "integrations":
            return print_integrations()
        return run_check(options.device) if options.command == "check" else print_environment()
    except UsageError as error:
        print(f"tropd {options.command}: {error}", file=sys.stderr)
        return 2


# --- train -------------------------------------------------------------------------------------


def train(arguments: Sequence[str]) -> int:
    """`tropd train`: trains, then saves model, tokenizer and model card in `output_dir`."""
    run, config = parse_run(arguments)
    checkpoint = find_checkpoint(config)
    trainer = make_trainer(run, config)
    trainer.dataset_name = run.dataset
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    return 0


def make_trainer(run: Run, config: Any) -> Any:
    """The `TrOPDTrainer` of a run; raises UsageError for what it refuses."""
    from .trainer import TrOPDTrainer
    from .trainer.lora_key import lora_config
    from .trainer.sources import check_sources
    from .trainer.verifier_checks import find_functions

    teacher = run.teacher_model or config.teacher_model_name_or_path or config.teacher_models
    try:
        check_sources(run.model, teacher if config.loads_teacher else None, config)
        judges = find_functions(run.reward_funcs)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    data = load_data("dataset", run.dataset, run.dataset_split)
    held_out = None
    if run.eval_dataset is not None:
        split = run.eval_split or run.dataset_split
        held_out = load_data("eval_dataset", run.eval_dataset, split)
    peft = lora_config(run.peft)
    try:
        return TrOPDTrainer(run.model, run.teacher_model, config, data, held_out,
                            peft_config=peft, reward_funcs=judges)  # fmt: skip
    except OSError as error:  # transformers does not always say which model it looked for
        if error.filename == config.output_dir:
            raise UsageError(f"output_dir: {error}") from error
        models = f"model {run.model}, teacher_model {run.teacher_model}: "
        named = str(error).startswith("teacher_model: ")
        raise UsageError(f"{'' if named else models}{error}") from error
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(str(error).replace("train_dataset:", "dataset:")) from error


def find_checkpoint(config: Any) -> str | None:
    """The folder that `resume_from_checkpoint` names: for "true" the last one in output_dir, for
    "false", "none" and "" none."""
    from .trainer.progress import is_checkpoint, last_checkpoint

    given = str(config.resume_from_checkpoint or "")
    if given.lower() in ("", "false", "none"):
        return None
    if given.lower() == "true":
        folder = Path(config.output_dir)
        given = last_checkpoint(folder) or ""
        if not given:
            raise UsageError(f"resume_from_checkpoint: there is no checkpoint in {folder}")
    if not is_checkpoint(given):
        raise UsageError(
            f"resume_from_checkpoint: there is no checkpoint {given}; expected a folder, true for "
            "the last of output_dir, or false"
        )
    return given


def parse_run(arguments: Sequence[str]) -> tuple[Run, Any]:
    """(Run, TrOPDConfig) of file and flags; raises UsageError before any model is loaded."""
    try:
        from .trainer import TrOPDConfig
        from .trainer.lora_key import lora_config
        from .trainer.sources import check_one_teacher
    except ImportError as error:
        raise UsageError(str(error)) from error
    from trl import DistillationConfig, TrlParser  # type: ignore[attr-defined]

    outer = argparse.ArgumentParser(prog="tropd train", add_help=False, allow_abbrev=False)
    outer.add_argument("--config", help="YAML file of keys; flags win over it")
    options, flags = outer.parse_known_args(arguments)
    classes: Any = [Run, TrOPDConfig]
    usage = "tropd train --config FILE [--key value ...]"  # not all of its 200 keys in each error
    parser = TrlParser(
        classes, prog="tropd train", usage=usage, parents=[outer], allow_abbrev=False
    )
    accept_none(parser, [Run, TrOPDConfig])
    group_keys(parser, {"of the run": Run, "of TrOPD": TrOPDConfig, "of TRL": DistillationConfig})
    twice = repeated_flag(arguments, parser._option_string_actions)
    if twice is not None:
        raise UsageError(f"{twice[1][2:]}: {' and '.join(twice)}: a key is given once")
    keys = read_config(options.config)
    named = [flag[2:].split("=")[0] for flag in flags if flag.startswith("--")]
    unknown = parser.set_defaults_with_config(**keys)
    parsed, rest = parser.parse_known_args(flags)
    refuse_script_keys(named, parsed)
    unknown += rest
    if unknown and unknown[0].endswith((".yaml", ".yml")):
        raise UsageError(f"a file of keys is given by --config {unknown[0]}")
    if unknown:
        known_keys = [*Run.__dataclass_fields__, *TrOPDConfig.__dataclass_fields__]
        named = [flag[2:].split("=")[0] for flag in unknown if flag.startswith("--")] or unknown
        raise UsageError(
            "; ".join(f"unknown key {key!r}{advice(key, known_keys)}" for key in named)
        )
    # Before the config looks at the machine.
    check_names(parsed, [key for key in ("model", "dataset") if getattr(parsed, key) is None])
    # Only what is given: a recipe sets the rest.
    untouched = object()
    start = argparse.Namespace(**dict.fromkeys(vars(parsed), untouched))
    of_flags = vars(parser.parse_known_args(flags, start)[0])
    given = {key for key, value in of_flags.items() if value is not untouched} | keys.keys()
    values = {key: value for key, value in vars(parsed).items() if key in given}
    try:
        run, config = (
            cls(**{key: values[key] for key in values.keys() & cls.__dataclass_fields__.keys()})
            for cls in classes
        )
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    try:
        check_one_teacher(run.teacher_model, config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    teacher = run.teacher_model or config.teacher_model_name_or_path or config.teacher_models
    if teacher is None and config.loads_teacher and config.uses_teacher:
        check_names(run, ["teacher_model"])
    check_data_keys(run, config)
    try:
        lora_config(run.peft)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return run, config


def accept_none(parser: argparse.ArgumentParser, classes: Sequence[type]) -> None:
    """Makes "none" and "null" mean None for keys of text or None, as TrlParser does for those of
    numbers. (A report_to of "none" is a value of its own.)"""
    hints = {key: hint for cls in classes for key, hint in get_type_hints(cls).items()}

    def text(given: str) -> str | None:
        return None if given.lower() in ("none", "null") else given

    for action in parser._actions:
        takes = get_args(hints.get(action.dest))
        if action.type is str and {str, type(None)} <= {*takes} and action.dest != "report_to":
            action.type = text


def refuse_script_keys(flags: Sequence[str], parsed: argparse.Namespace) -> None:
    """Raises UsageError for a key that transformers only defines for users' own scripts, unless it
    states what the command does anyway, or comes from a saved config. flags: names of those given.
    """
    named = {name.replace("-", "_").removeprefix("no_") for name in flags}
    evaluates = str(getattr(parsed.eval_strategy, "value", parsed.eval_strategy)) != "no"
    for key, wrong, instead in (
        ("do_train", "do_train" in named and not parsed.do_train,
         "the command trains: leave it out"),
        ("do_eval", parsed.do_eval and not (evaluates or parsed.eval_on_start),
         "eval_strategy says when to evaluate on eval_dataset: set that"),
        ("do_predict", parsed.do_predict, "the command predicts nothing: leave it out"),
    ):  # fmt: skip
        if wrong:
            raise UsageError(f"{key}: it has no effect here: {instead}")


def advice(key: str, known: Sequence[str]) -> str:
    """What to give instead of an unknown key: our name for a key of TRL's scripts and other
    trainers, or the key that is spelled most alike."""
    from .trainer import other_keys

    name = key.replace("-", "_")
    own = KEYS_OF_TRL.get("lora_" if name.startswith("lora_") else name)
    return f" (give {own})" if own else other_keys.advice(name, known)


def check_data_keys(run: Run, config: Any) -> None:
    """Raises UsageError for an eval_dataset that would never be evaluated on, and for a split of a
    file, which has none."""
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if run.eval_dataset is not None and not evaluates:
        raise UsageError(
            "eval_dataset: nothing would evaluate on it: set eval_strategy to epoch or steps, or "
            "leave eval_dataset out"
        )
    if run.eval_split is not None and is_file(run.eval_dataset):
        raise UsageError(f"eval_split: {run.eval_dataset} is a file, which has no splits")
    of_eval = run.eval_split is None and run.eval_dataset is not None
    sources = [run.dataset, *([run.eval_dataset] if of_eval else [])]
    if run.dataset_split != Run.dataset_split and all(map(is_file, sources)):
        raise UsageError(f"dataset_split: {' and '.join(sources)}: a file has no splits")
    check_file("dataset", run.dataset)
    if run.eval_dataset is not None:
        check_file("eval_dataset", run.eval_dataset)


def check_file(key: str, source: Any) -> None:
    """Raises UsageError for a path without a data file, before `datasets` looks on the hub."""
    path = Path(source)
    name_of_a_path = source.startswith(("/", ".", "~")) or source.count("/") > 1
    if not path.exists() and (is_file(source) or name_of_a_path):
        raise UsageError(f"{key}: there is no file {source}")
    if path.is_file() and not is_file(source):
        raise UsageError(
            f"{key}: {source} is a file of another kind: expected the suffix "
            f"{', '.join(LOADERS)}, or a name on the hub"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise UsageError(f"{key}: the file {source} is empty")


def is_file(source: str) -> bool:
    """Whether this names a data file, by its suffix; else it is a name on the hub."""
    return Path(source).suffix.lower() in LOADERS


def group_keys(parser: argparse.ArgumentParser, owners: dict[str, type]) -> None:
    """Groups the keys in --help by the class that defines them, the rest last."""
    groups = {title: parser.add_argument_group(f"keys {title}") for title in owners}
    rest = parser.add_argument_group("keys of transformers' TrainingArguments")
    for action in parser._actions:
        name = action.dest
        owner = next((t for t, cls in owners.items() if name in vars(cls)["__annotations__"]), None)
        if owner or action.dest not in ("help", "config"):
            (groups[owner] if owner else rest)._group_actions.append(action)
    for title, cls in owners.items():  # in the order in which the class has them
        order = list(vars(cls)["__annotations__"])
        groups[title]._group_actions.sort(key=lambda action: order.index(action.dest))
    shown = [*groups.values(), rest]
    others = [group for group in parser._action_groups if group not in shown]
    for group in others:
        group._group_actions = [a for a in group._group_actions if a.dest in ("help", "config")]
    parser._action_groups = [*others, *shown]


def check_names(run: Any, missing: Sequence[str]) -> None:
    """Raises UsageError for missing keys, and for models or data sets not named by text."""
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}; give them in --config or as flags")
    for key in ("model", "teacher_model", "dataset", "eval_dataset"):
        name = getattr(run, key)
        if name is not None and (not isinstance(name, str) or not name):
            raise UsageError(f"{key}: expected a name or a path, got {name!r}")
    if run.eval_split is not None and run.eval_dataset is None:
        raise UsageError("eval_split: there is no eval_dataset: give one, or leave eval_split out")
    for key in ("model", "teacher_model"):
        name = getattr(run, key) or ""
        if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
            raise UsageError(f"{key}: there is no folder {name}")


def read_config(path: str | None) -> dict[str, Any]:
    """The keys of a YAML file; an empty mapping without a file."""
    import yaml  # comes with transformers

    from .trainer.credentials import seems_secret, shown

    if path is None:
        return {}
    try:
        keys = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason, mark = str(error), getattr(error, "problem_mark", None)
        if mark is not None and seems_secret(reason):  # it quotes the line
            reason = f"line {mark.line + 1}: {error.problem}"  # type: ignore[union-attr]
        raise UsageError(f"--config {path}: {reason}") from error
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise UsageError(f"--config {path}: expected lines of 'key: value', got {shown(keys)}")
    # As flags arrive, so that argparse checks a number's type and names its key.
    numbers = {key: str(value) for key, value in keys.items() if type(value) in (int, float)}
    return keys | numbers


def load_data(key: str, source: str, split: str) -> Any:
    """The `datasets.Dataset` of a file or of a name on the hub. key: its name in errors."""
    from datasets import load_dataset

    check_file(key, source)
    loader = LOADERS.get(Path(source).suffix.lower())
    try:
        if loader:
            return load_dataset(loader, data_files=source, split="train")
        return load_dataset(source, split=split)
    except Exception as error:  # of many kinds, and several deep
        reason = error.__cause__ or error
        raise UsageError(
            f"{key}: {source} cannot be read: {reason}. Expected a .json, .jsonl or .parquet file, "
            "or a name on the hub"
        ) from error


# --- check ---------------------------------------------------------------------------------------


def run_check(device: str | None) -> int:
    """`tropd check`: 1 if a gradient is wrong."""
    from .check import check

    try:
        return 0 if check(device) else 1
    except ValueError as error:
        raise UsageError(str(error)) from error


# --- bench -------------------------------------------------------------------------------------


def bench(arguments: Sequence[str]) -> int:
    """`tropd bench`, from any folder: this process becomes `python -m benchmarks.bench` of the
    checkout that the package is in. A wheel has no benchmarks. (On Python 3.10 a `benchmarks` in
    the working directory comes first.)"""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "bench" / "command.py").is_file():
        raise UsageError(
            "the benchmarks come with the source, not with the wheel: clone the repository and "
            "run `pip install -e '.[bench]'` there"
        )
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # Not from the working directory, which may have a `benchmarks` of its own.
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *safe, "-m", "benchmarks.bench", *arguments]
    os.execve(sys.executable, command, environment)


# --- env, integrations --------------------------------------------------------------------------


def print_environment() -> int:
    """`tropd env`: what a bug report should begin with."""
    from .environment import environment

    for name, value in environment().items():
        print(f"{name:<18} {value}")
    return 0


def print_integrations() -> int:
    """`tropd integrations`: what stands in docs/integrations.md, with the versions found here."""
    from .integrations.frameworks import overview

    print(overview())
    return 0


if __name__ == "__main__":
    sys.exit(main())
