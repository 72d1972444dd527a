"""TRL's `DistillationTrainer` with its teacher and its loss replaced.

`DistillationTrainer` generates on-policy, splits the generation batch into micro-batches, reaches
the student's backbone through its DDP wrapper, counts tokens over the accumulation window and logs.
All of that stays TRL's. `DistillationAdapter` joins what other modules replace:

    the teacher     prepared here; its padded vocabulary may differ from the student's
    the loss        `distill(student, teacher, inputs, normalizer)`, on hidden states and heads
    generation      `generation.py`: completions that begin with, or are, a teacher's text
    reuse           `reuse.py`: a generation batch serves `num_iterations` optimizer steps
    logging         `metric_logs.py`: means over tokens

A subclass overrides their methods and sees none of TRL's private ones. `hooks.py` lists those.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import TokenStats
from ..heads import Head
from . import metrics
from .dropout import disable_dropout
from .fields import fields_of_rows, has_rows
from .generation import PrefixedGeneration
from .generation_keys import in_other_ids
from .image_checks import check_sight
from .loaded_teacher import check_dtypes, check_own_weights, load_teacher
from .patching import evaluation_mode, keeping_forward, replaced
from .reuse import BatchReuse
from .router import router_loss
from .row_teachers import (
    INDEX,
    RowTeachers,
    naming,
    refuse_beside_several,
    row_indices,
    rows_of,
)
from .self_teacher import (
    TeacherSync,
    is_self,
    refuse_average,
    refuse_equal_sides,
    refuse_sharded,
)
from .sharding import (
    check_backbone,
    check_images,
    is_sharded,
    prepare_frozen,
    read_head_form,
    refuse_dtensors,
    refuse_fsdp_1,
    reshard,
)
from .shortcuts import check_shortcuts
from .sides import ModelSide, read_side, side_of
from .signals import HIDDEN
from .sources import class_of_student, find_image_processor
from .special_tokens import back, full_table, students_columns, teachers_ids
from .student_checks import (
    adapter_errors,
    check_causal,
    check_saved_modules,
    check_task_type,
    check_z_loss,
)
from .teacher_prompts import teachers_view
from .vocabulary import check_eos, check_padding


def _side(name: str) -> str:
    """What errors call one of several teachers."""
    return f"teacher {name!r}"


class DistillationAdapter(BatchReuse, PrefixedGeneration):
    """`DistillationTrainer` with its teacher, its loss and its prefixes left to a subclass."""

    # Unions of what transformers and TRL allow; which one it is follows from the config.
    accelerator: Any
    args: Any
    generation_config: Any
    model: Any
    teacher_model: Any
    _signature_columns: Any
    _adapters_teach_alone = False  # nothing but the student's adapters need differ from the teacher

    def __init__(self, model: Any, teacher_model: Any, args: Any, *rest: Any, **keywords: Any):
        with class_of_student(model, args), adapter_errors(keywords.get("peft_config")):
            super().__init__(model, None, args, *rest, **keywords)
        check_backbone(self.model)  # which no setting mends
        refuse_fsdp_1(self.accelerator)
        refuse_dtensors("model", self.model)
        if args.disable_dropout:
            disable_dropout(self.model)
        check_z_loss(self.model)
        check_task_type(self.model)
        check_saved_modules(self.model)
        check_causal(self.model, "model", self._is_vlm)
        self._router = router_loss(self.model, args)
        self._router_loss: Tensor | None = None
        self._student_head = read_head_form(self.model, is_sharded(self.accelerator))
        self._shared_vocab_size = own = self._student_head.vocab_size
        check_padding(self._tokenizer, own, "student")
        check_eos(self.eos_token_ids, own, "the student has", self._tokenizer)
        self._teacher_head: Head | None = None
        self._teacher_eos: list[int] = []
        self._row_indices: Tensor | None = None  # of a generation batch, with several teachers
        self._adapters_off = False  # the teacher is the student without them
        self._id_table: dict[int, int] = {}  # of a teacher with other special tokens
        self._teacher_ids: Tensor | None = None  # of each of the student's ids, with such a teacher
        self._teachers: dict[str, dict[str, Any]] = {}  # of several, the attributes of each
        self._teacher_sync: TeacherSync | None = None
        self._several = isinstance(teacher_model, Mapping)
        if self._several:
            self._load_teachers(teacher_model)
        elif teacher_model is not None:
            self._load_teacher(teacher_model)
            assert self._teacher_head is not None
            self.share_vocabulary(self._teacher_head.vocab_size)
        self._stats: TokenStats | None = None
        self._exact_loss: Tensor | None = None

    # For a subclass to override.

    def distill(
        self,
        student: ModelSide,
        teacher: ModelSide | RowTeachers | None,
        inputs: dict[str, Any],
        normalizer: Any,
    ) -> tuple[Tensor, TokenStats]:
        """The loss of a micro-batch.

        Args:
            student: Hidden states and head of the student.
            teacher: Those of the teacher; None where there is no model of it, or no need of one.
            inputs: The micro-batch.
            normalizer: Divisor of the sum over tokens; None for the mean over this micro-batch
                (evaluation).

        Returns:
            The loss (scalar) and its per-token statistics (B, C).
        """
        raise NotImplementedError

    def loss_count(self, stats: TokenStats, inputs: dict[str, Any]) -> Tensor:
        """The divisor (scalar) of the mean over a micro-batch, as `distill` takes it."""
        return inputs["loss_mask"].sum()

    def needs_teacher(self) -> bool:
        """Whether the loss depends on the teacher at all; if not, its forward is skipped."""
        return self.args.uses_teacher

    def after_loss(self, loss: Tensor, stats: TokenStats, inputs: dict[str, Any]) -> None:
        """Called after each loss, where collectives are safe."""

    # The teacher.

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's model is in this process."""
        return self.teacher_model is not None or self._adapters_off or bool(self._teachers)

    def batch_settings(self) -> dict[str, Any]:
        # Of each row a batch holds its teacher's place among them.
        several = {"teacher_models": list(self._teachers)} if self._teachers else {}
        return super().batch_settings() | several

    def _load_teachers(self, teachers: Mapping[str, str | PreTrainedModel]) -> None:
        refuse_beside_several(is_sharded(self.accelerator), self._is_vlm)
        kept = ("teacher_model", "_teacher_head", "_teacher_eos", "_teacher_ids")
        for name, teacher in teachers.items():
            with naming(name):
                self._load_teacher(teacher)
            self._teachers[name] = {attribute: getattr(self, attribute) for attribute in kept}
            self._contexts[_side(name)] = self._contexts.pop("teacher")
        self.teacher_model = None
        sizes = [one["_teacher_head"].vocab_size for one in self._teachers.values()]
        for size in sorted(sizes, reverse=True):
            self.share_vocabulary(size)

    def _load_teacher(self, teacher: str | PreTrainedModel) -> None:
        if is_self(teacher):
            refuse_sharded(is_sharded(self.accelerator))
            if is_peft_model(self.model):
                self._adapters_off = True
                with self._without_adapters():
                    self._teacher_head = read_head_form(self.model, False)
                self._contexts["teacher"] = self.model.config
                return
            teacher = itself = copy.deepcopy(self.model).requires_grad_(False)
            if self.args.teacher_update_rate is not None:
                self._teacher_sync = TeacherSync(itself, self.accelerator)
                self.add_callback(self._teacher_sync)
        given = teacher
        if isinstance(teacher, str):
            teacher = load_teacher(teacher, self.args)
        if self._is_vlm:
            own = find_image_processor(given, self.args)
            check_sight(self.model, teacher, self.processing_class, own)
        check_causal(teacher, "teacher_model", self._is_vlm)
        check_own_weights(self.model, teacher)
        refuse_dtensors("teacher_model", teacher)
        eos = getattr(getattr(teacher, "generation_config", None), "eos_token_id", None)
        self._teacher_eos = [eos] if isinstance(eos, int) else list(eos or ())
        teacher.eval()
        sharded = is_sharded(self.accelerator)
        if not sharded and getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self.accelerator.device)  # a sharded model is moved layer by layer
        # Before accelerate wraps the forward in autocast, whose rounding the check would see.
        self._teacher_head = read_head_form(teacher, sharded)
        self._teacher_ids = full_table(
            self._id_table, self._student_head.vocab_size, self._teacher_head.vocab_size,
            self.accelerator.device,
        )  # fmt: skip
        if self.needs_teacher() and self.accelerator.mixed_precision == "no":
            check_dtypes(self._student_head.weight.dtype, self._teacher_head.weight.dtype)
        self._contexts["teacher"] = teacher.config
        self.teacher_model = prepare_frozen(teacher, self.accelerator)

    def share_vocabulary(self, teacher_size: int) -> None:
        """Restricts both sides to the ids that they share.

        Neither side generates an id that the other's padded vocabulary does not have.

        Args:
            teacher_size: The teacher has the ids below.
        """
        own = self._student_head.vocab_size
        self._shared_vocab_size = shared = min(own, teacher_size)
        both = "student and teacher have in common"
        check_eos(self.eos_token_ids, shared, both, self._tokenizer)
        if own != teacher_size:
            config = self.generation_config
            beyond = range(shared, max(own, teacher_size))
            config.suppress_tokens = [*(config.suppress_tokens or ()), *beyond]

    def generate_with_teacher(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict, tokens: int
    ) -> list[list[int]]:
        """Texts that the loaded teacher generates after these prompts.

        Each has at most `tokens` tokens, and ends at an end of the teacher's or of the student's.
        """
        check_padding(self._tokenizer, self._shared_vocab_size, "teacher")
        if self._teachers:
            return self._generate_by_each(prompt_ids, images, multimodal_fields, tokens)
        if self._teacher_ids is not None:
            return self._generate_in_other_ids(
                self._teacher_ids, prompt_ids, images, multimodal_fields, tokens
            )
        eos = [*self.eos_token_ids, *self._teacher_eos]
        model = self.model_wrapped if self._adapters_off else self.teacher_model
        if not self._adapters_off:
            writer, sharded = self.accelerator.unwrap_model(model), is_sharded(self.accelerator)
            check_shortcuts(writer, self.generation_config, sharded)
        teacher = {"model_wrapped": model, "use_vllm": False, "eos_token_ids": eos}
        assert self._teacher_head is not None
        own = in_other_ids(self.generation_config, range(self._teacher_head.vocab_size))
        try:
            with (
                self._without_adapters(),
                replaced(self, **teacher),
                replaced(self.generation_config, eos_token_id=eos, **own),
                self._new_token_limit(tokens),
            ):
                return self._sample_completions(prompt_ids, images, multimodal_fields)
        finally:
            reshard(self.teacher_model)

    def _generate_in_other_ids(
        self, table: Tensor, prompt_ids: list[list[int]], *arguments: Any
    ) -> list[list[int]]:
        """The teacher writes no id that the student has not, nor those that it is not to write."""
        assert self._teacher_head is not None
        ids = table.tolist()
        own = in_other_ids(self.generation_config, ids)
        unknown = set(range(self._teacher_head.vocab_size)) - set(ids)
        own["suppress_tokens"] = [*(own["suppress_tokens"] or ()), *sorted(unknown)] or None
        with (
            replaced(self, _teacher_ids=None, eos_token_ids=[ids[i] for i in self.eos_token_ids]),
            replaced(self.generation_config, **own),
        ):
            prompts = [[ids[token] for token in prompt] for prompt in prompt_ids]
            return back(self.generate_with_teacher(prompts, *arguments), table)

    def _generate_by_each(
        self, prompt_ids: list[list[int]], images: None, fields: dict, tokens: int
    ) -> list[list[int]]:
        written: list[list[int]] = [[]] * len(prompt_ids)
        for name, rows in self._rows_by_teacher(self._row_indices):
            places = rows.nonzero().flatten().tolist()
            prompts = [prompt_ids[i] for i in places]
            their_fields = fields_of_rows(fields, places, len(prompt_ids))
            with replaced(self, _teachers={}, **self._teachers[name]):
                own = self.generate_with_teacher(prompts, images, their_fields, tokens)
            for place, ids in zip(places, own, strict=True):
                written[place] = ids
        return written

    def models_of_sides(self) -> list[Any]:
        teachers = [self.teacher_model, *(one["teacher_model"] for one in self._teachers.values())]
        teachers = [self.accelerator.unwrap_model(one) for one in teachers if one is not None]
        return [*super().models_of_sides(), *teachers]

    def rows_of_side(self, side: str, rows: int) -> Sequence[int]:
        for place, name in enumerate(self._teachers):
            if side == _side(name):
                assert self._row_indices is not None
                return (self._row_indices == place).nonzero().flatten().tolist()
        return super().rows_of_side(side, rows)

    def _generate_and_score_completions(self, inputs):
        if not self._teachers:
            return super()._generate_and_score_completions(inputs)
        self._row_indices = row_indices(inputs, self._teachers)
        output = super()._generate_and_score_completions(inputs)
        return output | {INDEX: self._row_indices.to(self.accelerator.device)}

    # The loss. `_compute_loss` runs inside the student wrapper's forward, where a collective would
    # hang; `compute_loss` runs after it.

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        inputs = self._with_own_fields(inputs)
        # TRL's redirection replaces the forward that accelerate has put into autocast.
        with self.accelerator.autocast():
            student, router_logits = self._student_side(unwrapped_student, inputs)
            teacher: ModelSide | RowTeachers | None = None
            if HIDDEN in inputs:
                teacher = side_of(inputs[HIDDEN], self._teacher_head)
            elif self.has_teacher and self.needs_teacher():
                read = teachers_view(inputs)
                teacher = self._teacher_side(unwrapped_student, read)
                if self._adapters_teach_alone and self._adapters_off and self.model.training:
                    if read is inputs and isinstance(teacher, ModelSide):
                        refuse_equal_sides(student, teacher)
                    self._adapters_teach_alone = False  # they change from here on
        loss, self._stats = self.distill(student, teacher, inputs, num_items_in_batch)
        if self._router is not None:
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            auxiliary = self._router.loss(router_logits, mask)
            self._router_loss = auxiliary.detach()
            # A mean over a micro-batch, as in TRL's GRPO: micro-batches weigh alike.
            steps = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + (self._router.coefficient / steps) * auxiliary.to(loss.device)
        self._exact_loss = loss.detach()
        mask = inputs["loss_mask"]
        return loss, (self._stats.entropy * mask).sum(), mask.sum()

    @torch.no_grad()
    def _teacher_side(self, student: Any, inputs: dict[str, Any]) -> ModelSide | RowTeachers:
        parts = []
        for name, rows in self._rows_by_teacher(inputs.get(INDEX)):
            with replaced(self, _teachers={}, **self._teachers[name]):
                parts.append((rows, self._teacher_side(student, rows_of(inputs, rows))))
        if parts:
            return RowTeachers(parts)
        read = inputs, self._get_last_hidden_state
        if self._adapters_off:
            with self._without_adapters(), evaluation_mode(student):
                return read_side(student, self._teacher_head, *read)
        unwrapped, ids = self.accelerator.unwrap_model(self.teacher_model), self._teacher_ids
        if ids is not None:
            read = teachers_ids(inputs, ids), self._get_last_hidden_state
        with keeping_forward(unwrapped):
            side = self._forward_redirection(
                self.teacher_model, unwrapped, read_side, unwrapped, self._teacher_head, *read
            )
        return side if ids is None else students_columns(side, ids)

    def _rows_by_teacher(self, indices: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """Of several teachers those that have rows here, with the mask of these."""
        if self._teachers and indices is None:
            raise ValueError(
                f"{INDEX}: the batch lacks it, the place (B,) of each row's teacher among "
                f"{', '.join(map(repr, self._teachers))}: add it to the batch"
            )
        for place, name in enumerate(self._teachers):
            if (rows := indices == place).any():
                yield name, rows

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Inside, the student is its own teacher, if it is one that has adapters."""
        if not self._adapters_off:
            yield
            return
        flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, flag in flags.items():  # PEFT would have all of an adapter trained
                parameter.requires_grad_(flag)

    def _save_checkpoint(self, model, trial):
        self.check_weights()  # or the run would be told to go on from what it has spoilt
        super()._save_checkpoint(model, trial)
        if self._teacher_sync is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            self._teacher_sync.save(folder / f"checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            (refuse_average if self._teacher_sync is None else self._teacher_sync.load)(checkpoint)

    def _student_side(self, model: PreTrainedModel, inputs: dict[str, Any]):
        """The student's side, and its routers' logits if their loss counts."""
        read = model, self._student_head, inputs, self._get_last_hidden_state
        if self._router is None:
            return read_side(*read), None
        with self._router.recording(model) as found:
            side = read_side(*read)
        return side, found[-1]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self._with_own_fields(inputs)
        if self._is_vlm:
            check_images(self.accelerator, has_rows(batch, "pixel_values"))
        try:
            with keeping_forward(self.accelerator.unwrap_model(model)):
                result = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        finally:
            reshard(self.teacher_model)
        result = self._with_exact_loss(result, return_outputs)
        loss, stats = result[0] if return_outputs else result, self._stats
        if self._router_loss is not None:
            auxiliary = self.accelerator.gather(self._router_loss.reshape(1))
            self.log_values({"aux_loss": auxiliary.mean().item()})
        self.after_loss(loss, stats, batch)
        if not self.model.training:
            count = self.loss_count(stats, batch)
            self._eval_loss_sums += torch.stack([loss.detach() * count, count])
        elif self.args.num_iterations > 1:
            # The first step on a batch is taken by the policy that wrote it.
            inputs.setdefault("old_log_probs", stats.log_probs)
        self._stats = None
        return result

    def _with_own_fields(self, inputs):
        """A batch with `loss_mask` and the other fields that a batch in TRL's form lacks."""
        if "loss_mask" in inputs:
            return inputs
        mask = inputs["completion_mask"]
        loss_mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        if not self.model.training:
            counted = metrics.first_occurrences(self.accelerator, len(mask))
            loss_mask = loss_mask * counted[:, None]
        first = self.accelerator.process_index * len(mask)
        return {
            "loss_mask": loss_mask,
            "prefix_lengths": mask.new_zeros(len(mask)),
            "sequence_ids": torch.arange(first, first + len(mask), device=mask.device),
            **inputs,
        }

    def _with_exact_loss(self, result, return_outputs):
        """The loss before FSDP2's cast to low precision, with the cast's gradient.

        FSDP2 casts everything that leaves the student's forward.
        """
        loss = result[0] if return_outputs else result
        exact, self._exact_loss = self._exact_loss, None
        if loss.dtype != exact.dtype:
            loss = loss + (exact - loss.detach())
        return (loss, *result[1:]) if return_outputs else loss
