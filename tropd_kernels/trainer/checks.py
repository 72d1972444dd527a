"""Inputs that are refused, each with what is wrong and what to do.

Data sets without rows or prompts, prompts that do not fit the context, a teacher that reads other
tokens than the student, and a loss that is no number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from .context import context_of, counts_padding, padded_context_of, scale_changes_at
from .sources import PLACE, pick, student_options, teacher_options

#: Text on which two tokenizers of one vocabulary, but different merges or rules, part ways.
_PROBE = "The 2nd test: naïve façade, x = -3.14;\n\n  if (a != b) { 数学 }\tEnd."
#: Of PEFT's LoRA: options with a loss that a training loop has to add, and what weighs it.
_OWN_LOSSES = {
    "kasa_config": ("beta", "gamma"),
    "monteclora_config": ("kl_loss_weight", "use_entropy"),
}


def check_dataset(name: str, dataset: Any, columns: Sequence[str] = ()) -> None:
    """Raises ValueError for a data set that has no rows, no `prompt` or lacks one of `columns`.

    A streaming data set cannot be counted, and says nothing of its columns until it is read.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_dataset(f"{name}[{key!r}]", part, columns)
        return
    if dataset is None:
        return
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name}: the data set is empty; expected rows with a 'prompt'")
    present = getattr(dataset, "column_names", None)
    missing = [] if present is None else [c for c in ("prompt", *columns) if c not in present]
    if missing:
        remedy = "rename_column() gives a column the name looked for"
        if "prompt" in missing and "messages" in present:  # the answer would be part of the prompt
            remedy = "take the messages before the answer for the prompt"
        raise ValueError(
            f"{name}: no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, present))}: {remedy}"
        )


def check_no_splits(dataset: Any) -> None:
    """Raises ValueError where splits stand for the training set: their number would pass for that
    of its rows."""
    if isinstance(dataset, Mapping):
        first = "train" if "train" in dataset else next(iter(dataset), "train")
        raise ValueError(
            f"train_dataset: a {type(dataset).__name__} is no data set: pass dataset[{first!r}]; "
            f"it has splits {', '.join(map(repr, dataset)) or 'none'}"
        )


def no_guide(column: str | None) -> ValueError:
    """For guidance with neither a column of the teacher's text nor a teacher to write it."""
    return ValueError(
        f"teacher_model: the data set has no column of the teacher's text ({column!r}), and there "
        "is no teacher to write it: give one of the two"
    )


def check_rows(dataset: Any, batch: int) -> None:
    """Raises ValueError for a data set that does not fill one generation batch, of which a run
    would take no step at all."""
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) < batch:
        raise ValueError(
            f"train_dataset: {len(dataset)} rows are fewer than one optimiser step takes, {batch} "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes): lower one of "
            "them, or add rows"
        )


def split_error(saved: Sequence[int], wanted: Sequence[int], checkpoint: str) -> ValueError:
    """For a generation batch that a checkpoint holds in other micro-batches than the run's (rows of
    each): by its own counts the run would train on some of them and never on the rest."""
    (was, now) = (f"{len(rows)} and {max(rows, default=0)}" for rows in (saved, wanted))
    return ValueError(
        f"resume_from_checkpoint: {checkpoint} was saved between the steps on a generation batch "
        f"with gradient_accumulation_steps and per_device_train_batch_size {was}; now they are "
        f"{now}, and num_iterations goes on with that batch: set them as they were, or delete "
        "generation_batch_*.pt there to have a new one written"
    )


def check_prompts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a row of a generation batch without text or messages, and for a batch
    of both, of which TRL takes all rows for what the first one is."""
    firsts: dict[type, Any] = {}
    for row in rows:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) and not _is_conversation(prompt):  # "" may have a token
            raise ValueError(
                f"prompt: expected text or messages, got the row {row!r:.200}: a message has a "
                "'role' and a 'content', text or a list of parts with a 'type'; mend such rows, or "
                "drop them"
            )
        firsts.setdefault(list if isinstance(prompt, list) else str, prompt)
    if len(firsts) > 1:
        raise ValueError(
            f"prompt: text and messages in one batch, {firsts[str]!r:.80} and "
            f"{firsts[list]!r:.200}: write all prompts in one of the two ways"
        )


def refuse_images(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises NotImplementedError for a row with an image, in a column of its own or in a message:
    a served teacher would answer without having seen it."""
    for row in rows:
        messages = row["prompt"] if isinstance(row["prompt"], list) else []
        contents = [message.get("content") for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if row.get("images") or row.get("image") is not None or _holds_image(parts):
            raise NotImplementedError(
                "teacher_model_server_url: images are not sent to a teacher's server: load the "
                "teacher in this process"
            )


def _holds_image(parts: Sequence[Mapping[str, Any]]) -> bool:
    return any(part["type"] == "image" for part in parts)


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 0 and all(map(_is_message, prompt))


def _is_message(message: Any) -> bool:
    """As chat templates and TRL take it: content may be missing beside tool calls alone."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and "type" in part for part in content)
    called = "content" in message and content is None and bool(message.get("tool_calls"))
    return isinstance(content, str) or called


def check_tokens(rows: Sequence[Mapping[str, Any]], prompt_ids: list[list[int]]) -> None:
    """Raises ValueError for a prompt without tokens: its completion would begin at the padding."""
    for row, ids in zip(rows, prompt_ids):
        if len(ids) == 0:
            raise ValueError(
                f"prompt: no token in {row['prompt']!r:.80}, and the tokenizer begins a text with "
                f"none; in the row {row!r:.200}: drop such rows"
            )


def check_context(
    prompt_ids: list[list[int]],
    completion: int,  # tokens
    configs: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raises ValueError where a prompt and a completion of full length exceed a model's context;
    one that is not known (`context_of`) is no bound. completion: 0 where the ids have it."""
    for side, config in configs.items():
        context = context_of(config)
        for ids in prompt_ids if context is not None else ():
            if len(ids) + completion > context:
                start = tokenizer.decode(ids[:16])
                what, remedy = f"a prompt with its completion, {len(ids)} tokens,", ""
                if completion:
                    what = f"a prompt of {len(ids)} tokens and max_completion_length {completion}"
                    remedy = ", or lower max_completion_length"
                raise ValueError(
                    f"{what} exceed the {side}'s context of {context}: drop or cut the prompt that "
                    f"begins with {start!r}{remedy}"
                )


def scale_warning(lengths: Sequence[int], configs: Mapping[str, Any]) -> str | None:
    """What to warn of where rows of these lengths, in tokens, are scaled by the longest of them."""
    for side, config in configs.items():
        change = scale_changes_at(config)
        if change is not None and lengths and min(lengths) <= change < max(lengths):
            return (
                f"the {side} scales the positions of a whole batch by its longest row, beyond "
                f"{change} tokens otherwise than up to them, and this one has rows of "
                f"{min(lengths)} to {max(lengths)}: the shorter ones' losses are not those of the "
                "rows alone. Keep all rows on one side, or set per_device_train_batch_size 1 for "
                "the loss"
            )
    return None


def check_lengths(
    prompt_ids: list[list[int]], configs: Mapping[str, Any], multiple: int | None
) -> None:
    """Raises ValueError for prompts that need padding, beside a model whose positions count it.
    multiple: `pad_to_multiple_of`."""
    lengths = {len(ids) for ids in prompt_ids}
    if len(lengths) == 1 and not any(n % (multiple or 1) for n in lengths):
        return
    for side, config in configs.items():
        if counts_padding(config):
            raise ValueError(
                f"the {side} is a {config.model_type} model, whose positions count the padding in "
                "front of a prompt, so that its hidden states would not be those of the prompt "
                "alone: choose another model, or give prompts of one length, without "
                "pad_to_multiple_of"
            )


def check_width(width: int, config: Any) -> None:
    """Raises ValueError for a micro-batch that its padding makes wider than the model can be."""
    most = padded_context_of(config)
    if most is not None and width > most:
        raise ValueError(
            f"a micro-batch of {width} tokens a row, padding included, exceeds the {most} of a "
            f"{config.model_type} model, which counts padding: set per_device_train_batch_size 1, "
            "or leave pad_to_multiple_of out"
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
    """Raises ValueError for padding that a model cannot look up, hidden as it is by the mask."""
    if (pad := tokenizer.pad_token_id) is not None and pad >= vocab_size:
        raise ValueError(
            f"processing_class: its padding {tokenizer.pad_token!r} has id {pad}, and the {side} "
            f"only the ids below {vocab_size}: set tokenizer.pad_token to a token that it has, "
            "such as eos_token, or resize_token_embeddings() of the model"
        )


def check_ends(
    ends: Sequence[int | None], vocab_size: int, whose: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ValueError where no token ends completions, or one that a model does not have: the
    student, kept from writing it, would not learn to end."""
    for token in ends:
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


def check_own_weights(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Raises ValueError for a teacher that holds parameters of the student: it would learn, or
    wear an adapter, with it, and the two would never differ."""
    ours = {id(parameter) for parameter in student.parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in ours:
            raise ValueError(
                f"teacher_model: its {name} is the student's own tensor, so that the teacher would "
                "change with the student: load the teacher a second time"
            )


def check_trainable(model: torch.nn.Module) -> None:
    """Raises ValueError for a student of which nothing would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: none of its parameters requires a gradient, so that nothing would be trained: "
            "an adapter is loaded for training by PeftModel.from_pretrained(..., "
            "is_trainable=True), other weights by requires_grad_(True)"
        )


def check_adapters(model: torch.nn.Module, callbacks: Sequence[Any]) -> None:
    """Raises ValueError for an active PEFT adapter that wants more of a training step than the
    task's loss: a loss beside it, or a budget that is dealt out anew between steps."""
    known: Mapping[str, Any] = getattr(model, "peft_config", {})
    for name in getattr(model, "active_adapters", ()) if known else ():
        adapter = known[name]
        for key, weights in _OWN_LOSSES.items():
            given = getattr(adapter, key, None)
            if given is not None and any(getattr(given, weight) for weight in weights):
                raise ValueError(
                    f"peft_config: {key} has a loss of its own, which is not added here: switch "
                    f"{' and '.join(weights)} off in it, or leave {key} out"
                )
        dealt = {one.__name__ for callback in callbacks for one in type(callback).__mro__}
        if getattr(adapter, "use_asa", False) and "AdamssAsaCallback" not in dealt:
            raise ValueError(
                "peft_config: use_asa has no effect without PEFT's AdamssAsaCallback, which deals "
                "the subspaces out: add one to callbacks, or leave use_asa out"
            )


def check_sources(model: Any, teacher_model: Any, args: Any) -> None:
    """Raises OSError that begins with the key, "model" or "teacher_model", whose folder is missing
    or holds no model, or whose name the hub does not have. Of the hub no more is fetched than the
    two configs."""
    _check_source("model", model, student_options(args))
    _check_source("teacher_model", teacher_model, teacher_options(args))


def _check_source(key: str, name: Any, options: Mapping[str, Any]) -> None:
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
        # The hub's teacher may have an adapter's config alone.
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError)
        if absent and (key == "teacher_model" or options.get("gguf_file")):
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


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where an id or a text means different things to the two, saying which.

    An id that only one of them has is no conflict: vocabularies padded differently are compared on
    what both have.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differ = [
        f"{token!r} is {i} for the student and {theirs[token]} for the teacher"
        for token, i in ours.items()
        if theirs.get(token, i) != i
    ]
    by_id = {i: token for token, i in theirs.items()}
    differ += [
        f"{i} is {token!r} for the student and {by_id[i]!r} for the teacher"
        for token, i in ours.items()
        if token not in theirs and i in by_id
    ]
    if not differ:
        texts = [t(_PROBE, add_special_tokens=False)["input_ids"] for t in (student, teacher)]
        if texts[0] != texts[1]:
            differ = [f"the text {_PROBE[:24]!r}... has {len(texts[0])} and {len(texts[1])} tokens"]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"teacher_model: its tokenizer is not the student's: {'; '.join(differ[:3])}{more}. "
            "Distillation compares the two token by token: choose models of one family"
        )


def check_dtypes(student: torch.dtype, teacher: torch.dtype) -> None:
    """Raises TypeError where one head alone is float64, which the loss would refuse."""
    if (student == torch.float64) != (teacher == torch.float64):
        raise TypeError(
            f"teacher_model: its head is {teacher}, the student's {student}: float64 on one side "
            "alone; cast one of the models, or train under bf16"
        )


def check_server_tokenizer(
    student: PreTrainedTokenizerBase, tokenize: Callable[[str], list[int] | None]
) -> None:
    """Raises ValueError where a served teacher reads a text as other tokens. `tokenize` gives None
    where the server does not say."""
    ours, theirs = student(_PROBE, add_special_tokens=False)["input_ids"], tokenize(_PROBE)
    if theirs is None or list(ours) == list(theirs):
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs))
    )
    raise ValueError(
        f"teacher_model_server_url: its tokenizer is not the student's: {_PROBE[:24]!r}... is "
        f"{len(ours)} tokens for the student and {len(theirs)} for the teacher, and token {at} is "
        f"{ours[at : at + 1]} and {theirs[at : at + 1]}. Distillation compares the two token by "
        "token: serve a teacher of the student's family"
    )


def way_on(folder: str) -> str:
    """What a run that has stopped can do, by the checkpoints in its folder."""
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is not None:
        return f"go on from {last} by resume_from_checkpoint"
    return (
        f"begin anew: no checkpoint is in {folder!r}; save_strategy and save_steps say when one is "
        "saved"
    )


def stop_on(loss: float, inputs: Mapping[str, Any], folder: str, step: int, process: int) -> None:
    """Raises FloatingPointError, in every process; those whose loss it is save the batch first."""
    if math.isfinite(loss):
        raise FloatingPointError(f"the loss of another process is not finite at step {step}")
    path = Path(folder) / f"nonfinite_loss_step_{step}_process_{process}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"loss": loss, "step": step, "inputs": dict(inputs)}, path)
    raise FloatingPointError(
        f"the loss is {loss} at step {step}: the batch is in {path} (torch.load). The weights may "
        f"hold NaN already; lower learning_rate, or take an objective of bounded loss, and "
        f"{way_on(folder)}"
    )


def stop_on_weights(step: int, folder: str) -> None:
    """Raises FloatingPointError; sampling would fail on a probability that is NaN, and say less."""
    raise FloatingPointError(
        f"the student's weights hold NaN or infinity at step {step}, though the losses so far were "
        "finite: lower learning_rate or max_grad_norm, or take an objective of bounded loss, and "
        f"{way_on(folder)}"
    )
