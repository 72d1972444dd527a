"""How a generation batch is written: prompts checked, prefixes continued, sampling pinned.

`PrefixedGeneration` overrides TRL's generation hooks. A subclass may put a teacher's text in front
of the student's (`write_prefixes`) or replace the student's completions (`given_completions`), and
may send the teacher's log-probs along with them (`teacher_tensors`).
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import is_conversational  # type: ignore[attr-defined]

from . import metrics, teacher_prompts
from .chat_templates import PLAIN, as_lists, check_contents, check_template_keys, list_options
from .context import (
    check_context,
    check_generated_width,
    check_lengths,
    context_of,
    scale_warning,
)
from .data_checks import check_prompts, check_row_modalities, check_tokens, warn_of_added_tokens
from .fields import (
    KeptFields,
    extend_token_fields,
    keep_padded_rows,
    kept_fields,
    mark_written,
    read_fields,
)
from .generation_keys import check_prefill
from .hooks import MULTIMODAL_FIELDS
from .metric_logs import MetricLogs
from .patching import evaluation_mode, replaced
from .prefix import have_column, is_complete
from .sampling import pin_sampling_defaults
from .sharding import (
    check_images,
    generates_together,
    holds_on_all,
    is_sharded,
    weights_are_finite,
)
from .shortcuts import check_shortcuts
from .stops import raise_nonfinite_weights
from .vocabulary import check_ids, check_whole, has_words

#: What TRL is given in the place of a processor's fields while tools are called.
_PLACES = "places"
#: Tokens of the longest text that a tokenizer is asked with, which takes seconds.
_LONG = 2**17


class PrefixedGeneration(MetricLogs):
    """TRL's generation, in which a completion may begin with ids that the student did not write."""

    args: Any
    chat_template: Any
    chat_template_kwargs: Any
    generation_config: Any
    model: Any
    pad_to_multiple_of: Any
    processing_class: Any
    tools: Any
    _why_teacher_prompts = ""  # a stream may turn out not to have them, which are needed then
    _evaluated_without: dict | None = None  # a row that had none, before training read any
    _shared_vocab_size: int  # neither side writes or reads an id from here on

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        check_prefill(self.args, self.model.config, self._is_vlm)
        if not self.use_vllm:
            check_shortcuts(self.model, self.generation_config, is_sharded(self.accelerator))
        if self._is_vlm and "suppress_tokens" in (self.args.generation_kwargs or {}):
            # It replaces TRL's own list: a generated image token would have no pixels.
            given = self.generation_config.suppress_tokens or ()
            self.generation_config.suppress_tokens = [*given, self.model.config.image_token_id]
        self._contexts = {"student": self.model.config}
        self._rows: list[dict] | None = None
        self._prefix_lengths: list[int] = []
        self._kept_fields = KeptFields({}, {})
        self._warned_of_scale = self._warned_of_calls = False
        self._teacher_prompts: list[list[int]] | None = None  # where it reads others

    # For a subclass to override.

    def write_prefixes(
        self, rows: list[dict], prompt_ids: list[list[int]], images: Any, multimodal_fields: dict
    ) -> list[list[int]] | None:
        """The ids with which each completion begins, or None where there are no prefixes.

        Args:
            rows: The generation batch, as the data set gives it.
            prompt_ids: Token ids of each prompt.
            images: As TRL passes them to its generation.
            multimodal_fields: Likewise.
        """
        return None

    def given_completions(self, rows: list[dict]) -> list[list[int]] | None:
        """Completions that are given whole, or None where the student generates."""
        return None

    def teacher_tensors(
        self,
        rows: list[dict],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        width: int,
    ) -> dict[str, Tensor]:
        """Tensors (B, width, ...) with the log-probs of a teacher outside this process."""
        return {}

    def models_of_sides(self) -> list[Any]:
        """The models in this process that read the batch, without an engine's wrapper."""
        return [self.model]

    def rows_of_side(self, side: str, rows: int) -> Sequence[int]:
        """The places among the batch's rows that a side reads, by its name in errors."""
        return range(rows)

    def reads_teacher_prompts(self) -> bool:
        """Whether there is a teacher that reads a row's `teacher_prompt`."""
        return False

    def check_contents(self, conversations: list[list[dict]]) -> None:
        """Raises ValueError for messages whose content the chat template does not read."""
        check_contents(
            conversations, self.processing_class, tools=self.tools or None,
            chat_template=self.chat_template, **self.chat_template_kwargs,
        )  # fmt: skip

    def check_tokenizing(self) -> None:
        """Raises ValueError for `chat_template_kwargs` that do nothing, or what they should not,
        where prompts, as text or as messages, would be cut, and for a tokenizer without words."""
        if not has_words(self._tokenizer):
            raise ValueError(
                f"processing_class: a {type(self._tokenizer).__name__} with special tokens alone, "
                "as transformers makes one where a model's folder has no files of a tokenizer: "
                "save the tokenizer in that folder, or pass processing_class"
            )
        check_template_keys(
            self.chat_template_kwargs, self.processing_class, self.chat_template, self.tools
        )
        # Longer ones are refused.
        longest = min(context_of(self.model.config) or _LONG, _LONG)

        def ids(as_messages: bool, text: str) -> list[int]:
            talk = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            return self._tokenize_prompts([talk if as_messages else text])[0][0]

        with replaced(self, chat_template=PLAIN):
            for tokenize in (partial(ids, False), partial(ids, True)):
                check_whole(tokenize, self._tokenizer, longest)

    def check_rows(self, rows: list[dict]) -> None:
        """Raises ValueError for rows of a batch that lack a column, or have one that is not read.

        Of a stream, or a data set that `evaluate` was given, that is not known before.
        """

    def tokenize_texts(self, texts: list[str]) -> list[list[int]]:
        return self.processing_class(text=texts, **list_options(self.processing_class))["input_ids"]

    # TRL's hooks.

    def _tokenize_prompts(self, prompts):
        if isinstance(prompts[0], list):
            self.check_contents(prompts)
        if not is_conversational({"prompt": prompts[0]}):
            return self.tokenize_texts(prompts), None, {}
        options = as_lists(self.processing_class, self.chat_template_kwargs)
        with replaced(self, chat_template_kwargs=options):
            return super()._tokenize_prompts(prompts)

    def _generate_and_score_completions(self, inputs):
        check_prompts(inputs)
        check_row_modalities(inputs, self.processing_class)
        self.check_rows(inputs)
        self._rows, self._prefix_lengths = inputs, [0] * len(inputs)
        self._teacher_prompts = self._tokenize_teacher_prompts(inputs)
        # TRL has a processor pad a prompt's fields, and pads the prompt itself, on the left.
        with replaced(self._tokenizer, padding_side="left"):
            output = super()._generate_and_score_completions(inputs)
        keep_padded_rows(output)
        output |= mark_written(output, self.model.config)
        output |= self._kept_fields.tensors(output, self.model.config)
        parts = ["prompt", "completion"]
        if (own := self._teacher_prompts) is not None:
            output |= teacher_prompts.batch_tensors(
                own, self._tokenizer.pad_token_id, self.pad_to_multiple_of, self.accelerator.device
            )
            parts.append(teacher_prompts.COLUMN)
        for part in parts:  # the teacher may not have the padding's id
            ids, padding = output[f"{part}_ids"], output[f"{part}_mask"] == 0
            beyond = padding & (ids >= self._shared_vocab_size)
            output[f"{part}_ids"] = ids.masked_fill(beyond, 0)
        # A higher id would be read past the end of an embedding, and vLLM suppresses none of them.
        check_ids(output["completion_ids"], self._shared_vocab_size, "completion", self._tokenizer)
        # Shuffled and split with the rest of the generation batch.
        device, first = self.accelerator.device, self.accelerator.process_index * len(inputs)
        if not self.model.training:
            first += self._eval_rows_seen
            self._eval_rows_seen += self.accelerator.num_processes * len(inputs)
        output["sequence_ids"] = torch.arange(first, first + len(inputs), device=device)
        output["prefix_lengths"] = torch.tensor(self._prefix_lengths, device=device)
        prompts, completions = (unpadded(output, part) for part in ("prompt", "completion"))
        self._log_lengths(output, completions)
        for side, read, places in self._read_by(prompts):
            lengths = [len(read[i]) for i in places]
            self._warn_of_scale(side, lengths, [len(completions[i]) for i in places])
        width = output["completion_ids"].shape[1]
        output |= self.teacher_tensors(inputs, self._teacher_prompts or prompts, completions, width)
        return output

    def _tokenize_teacher_prompts(self, rows: list[dict]) -> list[list[int]] | None:
        """The ids of the teacher's own prompts, or None where it reads the student's."""
        if not self.reads_teacher_prompts():
            return None
        if not have_column(rows, teacher_prompts.COLUMN):
            if self._why_teacher_prompts:
                raise teacher_prompts.missing_error(rows[0], self._why_teacher_prompts)
            if not self.model.training:
                self._evaluated_without = rows[0]
            return None
        if self.model.training and not self._why_teacher_prompts:
            self._why_teacher_prompts = teacher_prompts.OTHERS_HAVE_IT
            if self._evaluated_without is not None:
                raise teacher_prompts.missing_error(
                    self._evaluated_without, self._why_teacher_prompts
                )
        check_prompts(rows, teacher_prompts.COLUMN)
        teacher_prompts.refuse_fields(self._is_vlm, {})
        ids, _, fields = self._tokenize_prompts([row[teacher_prompts.COLUMN] for row in rows])
        kept = kept_fields(fields, ids, self.model, ())
        teacher_prompts.refuse_fields(False, kept.types)
        return ids

    def _read_by(
        self, prompt_ids: list[list[int]]
    ) -> Iterator[tuple[str, list[list[int]], Sequence[int]]]:
        """Each side, the batch's prompts as it reads them, and the places of those that it does."""
        for side in self._contexts:
            own = None if side == "student" else self._teacher_prompts
            yield side, prompt_ids if own is None else own, self.rows_of_side(side, len(prompt_ids))

    def _warn_of_scale(self, side: str, prompts: list[int], completions: list[int]) -> None:
        if self._warned_of_scale:
            return
        rows = [prompt + own for prompt, own in zip(prompts, completions)]
        warning = scale_warning(prompts, rows, {side: self._contexts[side]})
        if warning is not None:
            self._warned_of_scale = True
            warnings.warn(warning, stacklevel=3)

    def _log_lengths(self, output: dict[str, Any], completions: list[list[int]]) -> None:
        own = output["completion_mask"] * output.get("tool_mask", 1)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        ended = torch.tensor([ids[-1] in ends for ids in completions], device=own.device)
        counted = torch.ones_like(ended)
        if not self.model.training:
            counted = metrics.first_occurrences(self.accelerator, len(completions))
        lengths = own.sum(1)
        self.log_sums(metrics.completion_totals(self.accelerator, lengths, ended, counted))

    def _generate(self, prompts):
        ids, completions, tool_mask, images, tool_images = super()._generate(prompts)
        if images is not None:  # a processor takes an empty list for a row's images, but not None
            images = [row_images or [] for row_images in images]
        return ids, completions, tool_mask, images, tool_images

    def _tool_call_loop(
        self, prompts, prompt_ids, completion_ids, completions, images, multimodal_fields
    ):
        """With the places of the batch's rows for their fields, of which TRL selects those of the
        rows that go on after a tool's answer.

        It would select from the fields themselves, which need not have an item for each row. A
        process whose rows have all ended takes part in the others' turns where it must.
        """
        self._asked = [list(prompt) for prompt in prompts]  # TRL's grow by the answers
        self._asked_ids = prompt_ids
        places = {_PLACES: list(range(len(prompts)))}
        rows = len(prompts)
        if not self.model.training:  # a repeated row is not counted, and calls nothing
            first = metrics.first_occurrences(self.accelerator, rows).tolist()
            for repeated in (own for own, counts in zip(completions, first) if not counts):
                repeated[0].pop("tool_calls", None)
            rows = sum(first)
        found = super(PrefixedGeneration, self._with_context())._tool_call_loop(
            prompts, prompt_ids, completion_ids, completions, images, places
        )
        if self._writes_together():
            # What is written here is discarded. vLLM's limit is the main process's for all.
            tokens = self.max_completion_length if self.use_vllm else 1
            while not holds_on_all(self.accelerator, True):  # `_go_on` says that one has a turn
                with self._new_token_limit(tokens):
                    self._generate_single_turn(prompt_ids, images, multimodal_fields)
        *_, calls, failures, _ = found
        self.log_sums(metrics.tool_totals(self.accelerator, calls, failures, rows))
        self._warn_of_calls(completions)
        return found

    def _warn_of_calls(self, completions: list[list[dict]]) -> None:
        """Of those that end with a call whose answer TRL has left out, which it does not say."""
        calls = [[bool(message.get("tool_calls")) for message in own] for own in completions]
        left = [own[-1] and sum(own) <= self.max_tool_calling_iterations for own in calls]
        if self._warned_of_calls or not any(left):
            return
        self._warned_of_calls = True
        context = context_of(self._contexts["student"])
        room = f"max_completion_length={self.max_completion_length}"
        if context is not None:
            room += f" or the student's context of {context} tokens"
        warnings.warn(
            f"tools: {sum(left)} of {len(left)} completions end with a call: the tool's answer is "
            f"left out, since it does not fit in {room} (said once): raise the limit, or let the "
            "tools answer in fewer tokens",
            stacklevel=2,
        )

    def _writes_together(self) -> bool:
        """Whether no process may leave a turn out that another one writes."""
        return self._shares_vllm() or generates_together(self.accelerator)

    def _shares_vllm(self) -> bool:
        """Whether one vLLM writes for several processes."""
        shared = self.args.vllm_mode == "server" or self.args.vllm_tensor_parallel_size > 1
        return self.use_vllm and shared and self.accelerator.num_processes > 1

    def _with_context(self) -> "PrefixedGeneration":
        """The trainer as TRL's loop over tools reads it: the config has the student's context, and
        its turns end with the completion.

        The loop drops answers beyond `max_position_embeddings`, which is another length under a
        scaling, and which some configs lack. The model itself generates with the config it has.
        """
        context = context_of(self._contexts["student"])
        config = SimpleNamespace(max_position_embeddings=math.inf if context is None else context)
        config.text_config = config
        view = copy.copy(self)
        vars(view).update(
            model=SimpleNamespace(config=config),
            _generate_single_turn=self._go_on,
        )
        return view

    def _go_on(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        """A turn after tools' answers, of the tokens that are left: TRL cuts a whole completion's,
        for which a table of positions may have no room."""
        if self._writes_together():
            holds_on_all(self.accelerator, False)  # for those that wait in `_tool_call_loop`
        fields, tokens, rows = multimodal_fields, self.max_completion_length, len(prompt_ids)
        if _PLACES in fields:  # not where tools answer with images
            places = fields[_PLACES]
            spent = [len(ids) - len(self._asked_ids[i]) for ids, i in zip(prompt_ids, places)]
            fields = self._fields_after_tools(places, prompt_ids)
            if not self.use_vllm:  # a server writes for all processes at once
                tokens = max(tokens - min(spent), 1)
        if self._shares_vllm():  # TRL gives texts back as if all processes had as many prompts
            more = len(self._asked_ids) - rows
            prompt_ids = [*prompt_ids, *prompt_ids[:1] * more]
            images = images and [*images, *images[:1] * more]
        with self._new_token_limit(tokens):
            return self._generate_single_turn(prompt_ids, images, fields, has_tool_images)[:rows]

    def _fields_after_tools(
        self, places: list[int], prompt_ids: list[list[int]]
    ) -> Mapping[str, Any]:
        """Fields of these rows' prompts, with the types of the tokens that have followed them."""
        asked, _, fields = self._tokenize_prompts([self._asked[place] for place in places])
        added = [len(ids) - len(own) for ids, own in zip(prompt_ids, asked, strict=True)]
        return extend_token_fields(fields, asked, added, self.model.config)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        rows, self._rows = self._rows, None  # None in the turns that follow a tool's answer
        prefixes = None
        if rows is not None:
            self._check_batch(rows, prompt_ids)
            taken = () if images is None else MULTIMODAL_FIELDS
            self._kept_fields = KeptFields({}, {})
            for model in self.models_of_sides():
                self._kept_fields |= kept_fields(multimodal_fields, prompt_ids, model, taken)
            given = self.given_completions(rows)
            if given is not None:
                whole = [prompt + ids for prompt, ids in zip(prompt_ids, given)]
                check_context(whole, 0, self._contexts, self._tokenizer)
                return given
            for side, read, places in self._read_by(prompt_ids):
                check_context(
                    [read[i] for i in places], self.max_completion_length,
                    {side: self._contexts[side]}, self._tokenizer,
                )  # fmt: skip
            self.check_weights()
            prefixes = self.write_prefixes(rows, prompt_ids, images, multimodal_fields)
        if prefixes is None:
            return self._sample_completions(prompt_ids, images, multimodal_fields, has_tool_images)
        return self._continue_prefixes(
            prefixes, prompt_ids, images, multimodal_fields, has_tool_images
        )

    def check_weights(self) -> None:
        """Raises FloatingPointError, on every process, for weights that a step has spoilt."""
        if not holds_on_all(self.accelerator, weights_are_finite(self.model)):
            raise_nonfinite_weights(self.state.global_step, self.args.output_dir)

    def _check_batch(self, rows: list[dict], prompt_ids: list[list[int]]) -> None:
        given = [("prompt", prompt_ids)]
        if self._teacher_prompts is not None:
            given.append((teacher_prompts.COLUMN, self._teacher_prompts))
        for column, ids in given:
            check_tokens(rows, ids, column)
            warn_of_added_tokens(rows, ids, self._tokenizer, column)
        for side, read, _ in self._read_by(prompt_ids):
            all_ids = torch.tensor([token for ids in read for token in ids])
            check_ids(all_ids, self._shared_vocab_size, "prompt", self._tokenizer)
            # All rows, whichever the side reads: those are padded to the whole batch's width.
            check_lengths(read, {side: self._contexts[side]}, self.args.pad_to_multiple_of)

    def _continue_prefixes(
        self, prefixes, prompt_ids, images, multimodal_fields, has_tool_images
    ) -> list[list[int]]:
        """Completions that begin with these prefixes and go on in the student's words."""
        self._prefix_lengths = [len(prefix) for prefix in prefixes]
        limit = self.max_completion_length
        complete = [is_complete(prefix, limit, self.eos_token_ids) for prefix in prefixes]
        if all(complete) and not self._writes_together():
            return prefixes
        # What is generated after a complete prefix is discarded.
        heads = [[] if done else prefix for prefix, done in zip(prefixes, complete)]
        begun = [prompt + head for prompt, head in zip(prompt_ids, heads)]
        fields = extend_token_fields(
            multimodal_fields, prompt_ids, [len(head) for head in heads], self.model.config
        )
        lengths = [len(prefix) for prefix, done in zip(prefixes, complete) if not done]
        tokens = limit - min(lengths, default=limit - 1)
        if self._shares_vllm():  # it takes the main process's limit for all
            ours = torch.tensor([tokens], device=self.accelerator.device)
            tokens = int(self.accelerator.gather(ours).max())
        # All rows get as many new tokens as the row with the shortest prefix needs.
        # A teacher reads no more of them than max_completion_length.
        check_context(
            begun, tokens, {"student": self._contexts["student"]}, self._tokenizer,
            prefixes=[len(head) for head in heads],
        )  # fmt: skip
        with self._new_token_limit(tokens):
            rest = self._sample_completions(begun, images, fields, has_tool_images)
        return [
            prefix if done else (prefix + own)[:limit]
            for prefix, own, done in zip(prefixes, rest, complete)
        ]

    def _sample_completions(
        self, prompt_ids: list[list[int]], images: Any, fields: dict, *rest: Any
    ) -> list[list[int]]:
        """TRL's generation, with no other sampling settings than the trainer's config has."""
        if self._is_vlm and not self.use_vllm:
            check_images(self.accelerator, "pixel_values" in fields)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        fields = read_fields(fields, model)
        if not self.use_vllm:
            tokens = self.generation_config.max_new_tokens
            check_generated_width(prompt_ids, tokens, model.config, self.pad_to_multiple_of)
        with pin_sampling_defaults(model), evaluation_mode(model):
            return super()._generate_single_turn(prompt_ids, images, fields, *rest)

    @contextlib.contextmanager
    def _new_token_limit(self, tokens: int) -> Iterator[None]:
        """Limits generation inside to so many new tokens."""
        with contextlib.ExitStack() as limits:
            limits.enter_context(replaced(self.generation_config, max_new_tokens=tokens))
            if self.use_vllm:
                limits.enter_context(replaced(self.vllm_generation, max_completion_length=tokens))
            yield


def unpadded(batch: dict[str, Any], part: str) -> list[list[int]]:
    """The prompts or completions of a batch without their padding."""
    mask = batch[f"{part}_mask"].bool()
    return [ids[row_mask].tolist() for ids, row_mask in zip(batch[f"{part}_ids"], mask)]
