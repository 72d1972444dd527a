"""Where the teacher's words and log-probs come from: a column, a server, or the loaded model.

`GuidedTrainer` answers what `PrefixedGeneration` asks: the prefix of each completion, completions
that are given whole, and the log-probs of a teacher outside this process.
"""

import contextlib
import random
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from trl.data_utils import prepare_multimodal_messages

from . import signals
from .adapter import DistillationAdapter
from .chat_templates import as_lists, check_reasoning
from .data_checks import (
    ReadRows,
    check_answers,
    check_datasets,
    check_placeholders,
    check_unread,
    known_columns,
    missing_guide_error,
    prompts_are_text,
    refuse_images,
)
from .effects import check_unsampled
from .loaded_teacher import check_dtypes
from .prefix import (
    column_ids,
    cut,
    have_column,
    is_complete,
    row_images,
    scheduled_length,
    shrinking_steps,
)
from .served_teacher import ServedTeacher
from .server import TeacherServerError
from .stops import how_to_resume
from .teacher_head import on_device
from .vocabulary import check_server_tokenizer


class GuidedTrainer(DistillationAdapter):
    """`DistillationAdapter` whose teacher may write prefixes, whole answers, or only log-probs."""

    _server: ServedTeacher | None = None

    def _meet_server(self, server: ServedTeacher) -> None:
        """Compares tokenizers, ids and heads. Raises ValueError where they do not fit."""
        check_server_tokenizer(self._tokenizer, server.tokenize)
        if server.is_asked:
            self.share_vocabulary(server.count_ids(self._shared_vocab_size))
        if server.head is None:
            return
        self._teacher_head = on_device(server.head, self.accelerator.device)
        if self.accelerator.mixed_precision == "no":
            check_dtypes(self._student_head.weight.dtype, server.head.weight.dtype)

    def check_rows(self, rows: list[dict]) -> None:
        args, training, reads_own = self.args, self.model.training, self.reads_teacher_prompts()
        rows = ReadRows(rows)
        name = "train_dataset" if training else "eval_dataset"
        check_unread({name: rows}, args, self.tools, args.uses_task_advantages)
        train, evaluation = (rows, None) if training else (None, rows)
        check_datasets(train, evaluation, args, reads_own)
        if training:
            check_unsampled(args, {name: rows, "eval_dataset": self.eval_dataset})
        unknown = training and known_columns(self.train_dataset) is None
        if args.chat_template_kwargs and unknown and prompts_are_text(rows, reads_own):
            warnings.warn(
                "chat_template_kwargs: it has no effect on prompts that are text, to which no "
                "template is applied, as in a batch of this data set: write them as messages",
                stacklevel=2,
            )

    def reads_teacher_prompts(self) -> bool:
        return self._server is not None or self.has_teacher

    def prefix_length(self, answer: int) -> int:
        """Length of the prefix at the current optimizer step, in tokens.

        Args:
            answer: Tokens of the teacher's answer, which count with `prefix_relative`.
        """
        args, step = self.args, self.state.global_step
        steps = shrinking_steps(args, self.state.max_steps)
        initial = answer if args.prefix_relative else args.prefix_length
        return scheduled_length(args.prefix_schedule, initial, step, steps)

    def write_prefixes(
        self, rows: list[dict], prompt_ids: list[list[int]], images: Any, multimodal_fields: dict
    ) -> list[list[int]] | None:
        """The teacher's tokens at the beginning of each completion.

        In an evaluation the student writes everything, unless no step is on-policy and the rows
        have the teacher's text.
        """
        if (own := self._teacher_prompts) is not None:
            read, images, multimodal_fields = own, None, {}
        else:
            read = prompt_ids
        if self._server is not None:
            self._server.check_prompts(read, self._tokenizer)
        column = self.args.prefix_column
        has_text = column is not None and have_column(rows, column)
        if self.model.training:
            whole = self._is_off_policy()
        elif self.args.lmbda == 0 and has_text:
            whole = True
        else:
            return None
        limit = self.max_completion_length
        length = limit if whole else self.prefix_length(limit)
        if length == 0:
            return None
        relative = self.args.prefix_relative and not whole
        length = limit if relative else length
        if has_text:
            for row in rows:
                check_placeholders(row[column], self.processing_class, column)
            written = [
                column_ids(
                    row[column], row["prompt"], ids, partial(self._tokenize, row=row), column
                )
                for row, ids in zip(rows, prompt_ids)
            ]
            if relative:
                check_answers(rows, written, column)
        elif self._server is not None:
            refuse_images(rows)
            written = self._serve_prefixes(self._server, read, length)
        elif self.has_teacher:
            written = self.generate_with_teacher(read, images, multimodal_fields, length)
        else:
            raise missing_guide_error(column)
        prefixes = [cut(ids, length, self.eos_token_ids) for ids in written]
        if relative:
            prefixes = [ids[: self.prefix_length(len(ids))] for ids in prefixes]
        if whole:
            end = [self._tokenizer.eos_token_id]
            prefixes = [
                ids if is_complete(ids, length, self.eos_token_ids) else ids + end
                for ids in prefixes
            ]
        return prefixes

    def _is_off_policy(self) -> bool:
        """Whether the teacher writes this step's completions.

        The draw depends on seed and step, so that all processes and a resumed run agree.
        """
        draw = random.Random(f"{self.args.seed} {self.state.global_step}").random()
        return draw >= self.args.lmbda

    def _serve_prefixes(
        self, server: ServedTeacher, prompt_ids: list[list[int]], tokens: int
    ) -> list[list[int]]:
        step, process = self.state.global_step, self.accelerator.process_index
        with self._resume_hint():
            seed = f"{self.args.seed} {step} {process}"
            return server.write(prompt_ids, tokens, seed, self._tokenizer)

    @contextlib.contextmanager
    def _resume_hint(self) -> Iterator[None]:
        """Appends to the server's errors how the run can be resumed."""
        try:
            yield
        except TeacherServerError as error:
            if not self.is_in_train:
                raise
            way = how_to_resume(self.args.output_dir)
            raise TeacherServerError(f"{error}; then {way}") from error

    def given_completions(self, rows: list[dict]) -> list[list[int]] | None:
        if not self.args.precomputed_teacher:
            return None
        return signals.fixed_completions(rows, self.max_completion_length)

    def teacher_tensors(
        self,
        rows: list[dict],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        width: int,
    ) -> dict[str, Tensor]:
        if not self.needs_teacher():
            return {}
        top_k = max(map(signals.required_top_k, self.args.rules()))
        if self.args.precomputed_teacher:
            scores = signals.column_scores(rows, self.max_completion_length, top_k)
        elif self._server is not None:
            refuse_images(rows)
            with self._resume_hint():
                scores = self._server.score(prompt_ids, completion_ids, top_k)
        else:
            return {}
        return signals.batch_tensors(scores, width, self.accelerator.device)

    def _tokenize(self, text: str | list[dict], row: dict[str, Any]) -> list[int]:
        """Ids of a row's prompt with its answer, tokenized as TRL tokenizes the prompt."""
        if isinstance(text, str):
            return self.tokenize_texts([text])[0]
        images = row_images(row)
        if images or self._is_vlm:
            text = prepare_multimodal_messages(text, images=images)
        self.check_contents([text])
        processor, own = self.processing_class, self.chat_template_kwargs
        same = {"chat_template": self.chat_template, "tools": self.tools or None}
        check_reasoning(text, self.args.prefix_column, processor, **same, **own)
        return processor.apply_chat_template(
            conversation=[text], tokenize=True, return_dict=True, **same, **as_lists(processor, own)
        )["input_ids"][0]
