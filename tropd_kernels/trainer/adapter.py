"""The one file that leans on TRL's private hooks.

`DistillationTrainer` generates on-policy, splits the generation batch into micro-batches, reaches
the student's backbone through its DDP wrapper, counts tokens over the accumulation window and logs.
All of that stays TRL's. `DistillationAdapter` replaces these things:

    the teacher     prepared here, so that its padded vocabulary may differ from the student's
    the loss        `distill(student, teacher, inputs, normalizer)`, on hidden states and heads
    generation      `write_prefixes(...)` may put a teacher's text in front of the student's, and
                    `given_completions(...)` replace it; `teacher_tensors(...)` go with it
    reuse           a generation batch serves `num_iterations` optimiser steps, as in GRPO

A subclass overrides those methods and sees nothing private. `HOOKS` and `ATTRIBUTES` are what
we rely on; a test holds them against the TRL that is installed.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers import __version__ as transformers_version
from trl import DistillationTrainer, is_conversational  # type: ignore[attr-defined]
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import RepeatSampler

from ..functional import TokenStats
from ..heads import Head, current
from . import metrics
from .checks import (
    check_context,
    check_dtypes,
    check_ends,
    check_ids,
    check_lengths,
    check_own_weights,
    check_padding,
    check_prompts,
    check_tokens,
    check_width,
    scale_warning,
    split_error,
    stop_on_weights,
)
from .dropout import disable_dropout
from .fields import (
    KeptFields,
    extend_token_fields,
    has_rows,
    kept_fields,
    mark_written,
    reading,
)
from .loaded_teacher import load_teacher
from .prefix import is_complete
from .router import router_loss
from .sampling import evaluating, plain_defaults
from .sharding import (
    fsdp_version,
    generates_together,
    is_sharded,
    read_form,
    refuse_dtensors,
    refuse_fsdp_1,
    reshard,
    shard_frozen,
    weights_are_finite,
)
from .sources import class_of_student

#: Methods of DistillationTrainer that are overridden or called, with their leading parameters.
HOOKS = (
    ("_compute_loss", "self unwrapped_student inputs num_items_in_batch"),
    ("_generate", "self prompts"),
    ("_generate_and_score_completions", "self inputs"),
    ("_generate_single_turn", "self prompt_ids images multimodal_fields has_tool_images"),
    ("_get_output_dir", "self trial"),
    (
        "_get_last_hidden_state",
        "self unwrapped_model input_ids attention_mask logits_to_keep pixel_values image_grid_thw "
        "pixel_attention_mask spatial_shapes image_sizes token_type_ids mm_token_type_ids "
        "image_position_ids",
    ),
    ("_get_train_sampler", "self dataset"),
    ("_load_optimizer_and_scheduler", "self checkpoint"),
    ("_prepare_inputs", "self generation_batch"),
    ("_save_checkpoint", "self model trial"),
    ("_set_signature_columns_if_needed", "self"),
    ("_tokenize_prompts", "self prompts"),
    ("compute_loss", "self model inputs return_outputs num_items_in_batch"),
    ("training_step", "self model inputs num_items_in_batch"),
)
#: Attributes of an instance.
ATTRIBUTES = (
    "_buffered_inputs", "_forward_redirection", "_is_vlm", "_metrics", "_signature_columns",
    "_step", "_tokenizer", "_train_batch_size", "chat_template", "chat_template_kwargs",
    "eos_token_ids", "generation_config", "model_wrapped", "shuffle_dataset", "teacher_model",
    "use_vllm",
)  # fmt: skip
#: Of a processor's fields those that TRL's loss takes, in a batch with images.
_MULTIMODAL = tuple(dict(HOOKS)["_get_last_hidden_state"].split()[5:])


@dataclass(frozen=True, eq=False)
class Side:
    """One model on one micro-batch: hidden (B, C, H), so placed that hidden[:, i] predicts the
    completion's token i, and its head, both in the dtype in which to multiply."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class EpochSampler(RepeatSampler):
    """TRL's sampler with a permutation that is a function of (seed, epoch), where the seed is the
    config's `data_seed` if that is given.

    TRL's own takes the next permutation from a generator at each epoch, so a run resumed in its
    second epoch would see the first one's order again. The epoch follows from the optimiser step:
    `set_epoch` does not come through the wrappers that accelerate puts around the sampler of a
    resumed run.
    """

    trainer: Any  # whose state is another object once training has begun
    steps_per_epoch: int

    def __iter__(self):
        if self.shuffle:
            epoch = self.trainer.state.global_step // max(self.steps_per_epoch, 1)
            self.generator.manual_seed((self.seed or 0) + epoch)
        return super().__iter__()


class DistillationAdapter(DistillationTrainer):
    """`DistillationTrainer` with its teacher, its loss and its prefixes left to a subclass."""

    # Unions of what transformers and TRL allow; which one it is follows from the config.
    accelerator: Any
    args: Any
    chat_template_kwargs: Any
    generation_config: Any
    model: Any
    processing_class: Any
    teacher_model: Any
    _buffered_inputs: Any
    _signature_columns: Any

    def __init__(self, model: Any, teacher_model: Any, args: Any, *rest: Any, **keywords: Any):
        with class_of_student(model, args):
            super().__init__(model, None, args, *rest, **keywords)
        if self._is_vlm and "suppress_tokens" in (args.generation_kwargs or {}):
            # It replaces TRL's own list: a written image token would have no pixels.
            given = self.generation_config.suppress_tokens or ()
            self.generation_config.suppress_tokens = [*given, self.model.config.image_token_id]
        refuse_fsdp_1(self.accelerator)
        refuse_dtensors("model", self.model)
        if args.num_iterations > 1 and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                "num_iterations: TRL's loader does not repeat the rows of a streaming data set "
                "over several steps: load the data set whole, or leave num_iterations at 1"
            )
        if args.disable_dropout:
            disable_dropout(self.model)
        self._router = router_loss(self.model, args)
        self._router_loss: Tensor | None = None
        self._student_head = read_form(self.model, is_sharded(self.accelerator))
        own = self._student_head.vocab_size
        check_padding(self._tokenizer, own, "student")
        check_ends(self.eos_token_ids, own, "the student has", self._tokenizer)
        self._teacher_head: Head | None = None
        self._teacher_ends: list[int] = []
        self._contexts = {"student": self.model.config}
        self._shared = self._student_head.vocab_size  # ids that both sides have
        if teacher_model is not None:
            self._load_teacher(teacher_model)
            assert self._teacher_head is not None
            self.share_vocabulary(self._teacher_head.vocab_size)
        self._stats: TokenStats | None = None
        self._sums: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        self._loss_sums = torch.zeros(2, device=self.accelerator.device)  # of an evaluation
        self._exact_loss: Tensor | None = None
        self._rows: list[dict] | None = None
        self._prefix_lengths: list[int] = []
        self._kept_fields = KeptFields({}, {})
        self._evaluated = 0  # rows so far, of an evaluation
        self._warned_of_scale = False
        self._part = ""  # which of several data sets that evaluation is of

    # What a subclass gives.

    def distill(
        self, student: Side, teacher: Side | None, inputs: dict[str, Any], normalizer: Any
    ) -> tuple[Tensor, TokenStats]:
        """The loss (scalar) of a micro-batch and its per-token statistics (B, C).

        normalizer: what to divide the sum over tokens by; None where the mean over this micro-batch
        is wanted (evaluation).
        """
        raise NotImplementedError

    def write_prefixes(
        self, rows: list[dict], prompt_ids: list[list[int]], images: Any, multimodal_fields: dict
    ) -> list[list[int]] | None:
        """The beginning of each completion that the student is not to write; None: no prefixes.

        rows: the generation batch, as the data set gives it.
        """
        return None

    def loss_count(self, stats: TokenStats, inputs: dict[str, Any]) -> Tensor:
        """What the mean over a micro-batch divides by (scalar), as `distill` takes it."""
        return inputs["loss_mask"].sum()

    def asks_teacher(self) -> bool:
        """Whether the loss looks at the teacher at all; if not, its forward is saved."""
        return True

    def given_completions(self, rows: list[dict]) -> list[list[int]] | None:
        """Whole completions that nobody is to write; None: the student writes."""
        return None

    def teacher_tensors(
        self,
        rows: list[dict],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        width: int,
    ) -> dict[str, Tensor]:
        """What a teacher outside this process says of the completions: tensors (B, width, ...) that
        go along with them."""
        return {}

    # What a subclass may call.

    @property
    def mode(self) -> str:
        """ "train" or "eval": the key of TRL's metrics."""
        return "train" if self.model.training else "eval"

    def log_metrics(self, values: dict[str, float]) -> None:
        """Adds values to those that TRL averages and reports at the next log."""
        for name, value in values.items():
            self._metrics[self.mode][name].append(value)

    def log_sums(self, sums: metrics.Sums) -> None:
        """Adds sums and counts, whose quotients are reported at the next log, in the place of
        TRL's value where TRL has a metric of that name. What is counted 0 times is left out."""
        known = self._sums[self.mode]
        for name, (value, count) in sums.items():
            before = known.get(name, (0.0, 0.0))
            known[name] = before[0] + value, before[1] + count

    def share_vocabulary(self, teacher_size: int) -> None:
        """Takes the first `teacher_size` ids for the teacher's: neither side writes an id that the
        other's padded vocabulary does not have."""
        own = self._student_head.vocab_size
        self._shared = min(own, teacher_size)
        both = "student and teacher have in common"
        check_ends(self.eos_token_ids, self._shared, both, self._tokenizer)
        if own != teacher_size:
            config = self.generation_config
            beyond = range(self._shared, max(own, teacher_size))
            config.suppress_tokens = [*(config.suppress_tokens or ()), *beyond]

    def generate_with_teacher(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict, tokens: int
    ) -> list[list[int]]:
        """What the teacher writes after these prompts, at most so many tokens each, up to an end of
        its own or of the student's."""
        check_padding(self._tokenizer, self._shared, "teacher")
        before = self.model_wrapped, self.use_vllm, self.eos_token_ids
        self.model_wrapped, self.use_vllm = self.teacher_model, False
        self.eos_token_ids = [*self.eos_token_ids, *self._teacher_ends]
        self.generation_config.eos_token_id = self.eos_token_ids
        try:
            with self._limit(tokens):
                return self._write(prompt_ids, images, multimodal_fields)
        finally:
            self.model_wrapped, self.use_vllm, self.eos_token_ids = before
            self.generation_config.eos_token_id = self.eos_token_ids
            reshard(self.teacher_model)

    # The teacher.

    def _load_teacher(self, teacher: str | PreTrainedModel) -> None:
        if isinstance(teacher, str):
            teacher = load_teacher(teacher, self.args)
        check_own_weights(self.model, teacher)
        refuse_dtensors("teacher_model", teacher)
        ends = getattr(getattr(teacher, "generation_config", None), "eos_token_id", None)
        self._teacher_ends = [ends] if isinstance(ends, int) else list(ends or ())
        teacher.eval()
        sharded = is_sharded(self.accelerator)
        if not sharded and getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self.accelerator.device)  # shards are moved one layer at a time
        # Before accelerate wraps the forward in autocast, whose rounding the check would see.
        self._teacher_head = read_form(teacher, sharded)
        if self.asks_teacher() and self.accelerator.mixed_precision == "no":
            check_dtypes(self._student_head.weight.dtype, self._teacher_head.weight.dtype)
        self._contexts["teacher"] = teacher.config
        if self.is_deepspeed_enabled:
            self.teacher_model = prepare_deepspeed(teacher, self.accelerator)
        elif fsdp_version(self.accelerator):
            self.teacher_model = shard_frozen(teacher, self.accelerator)
        else:
            self.teacher_model = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    # The loss. `_compute_loss` runs inside the student wrapper's forward, where a collective would
    # hang; `compute_loss` runs after it.

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        inputs = self._completed(inputs)
        # TRL's redirection replaces the forward that accelerate has put into autocast.
        with self.accelerator.autocast():
            student, router_logits = self._student_side(unwrapped_student, inputs)
            teacher = None
            if self.teacher_model is not None and self.asks_teacher():
                unwrapped = self.accelerator.unwrap_model(self.teacher_model)
                with torch.no_grad():
                    teacher = self._forward_redirection(
                        self.teacher_model, unwrapped, self._side, unwrapped, self._teacher_head,
                        inputs,
                    )  # fmt: skip
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self._completed(inputs)
        result = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        result = self._unrounded(result, return_outputs)
        reshard(self.teacher_model)
        loss, stats = result[0] if return_outputs else result, self._stats
        if self._router_loss is not None:
            auxiliary = self.accelerator.gather(self._router_loss.reshape(1))
            self.log_metrics({"aux_loss": auxiliary.mean().item()})
        self.after_loss(loss, stats, batch)
        if not self.model.training:
            count = self.loss_count(stats, batch)
            self._loss_sums += torch.stack([loss.detach() * count, count])
        elif self.args.num_iterations > 1:
            # The first step on a batch is taken by the policy that wrote it.
            inputs.setdefault("old_log_probs", stats.log_probs)
        self._stats = None
        return result

    def _completed(self, inputs):
        """A batch with `loss_mask`, and with the fields that one in TRL's form does not have."""
        if "loss_mask" in inputs:
            return inputs
        mask = inputs["completion_mask"]
        loss_mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        if not self.model.training:
            loss_mask = loss_mask * metrics.first_time(self.accelerator, len(mask))[:, None]
        first = self.accelerator.process_index * len(mask)
        return {
            "loss_mask": loss_mask,
            "prefix_lengths": mask.new_zeros(len(mask)),
            "sequence_ids": torch.arange(first, first + len(mask), device=mask.device),
            **inputs,
        }

    def _unrounded(self, result, return_outputs):
        """FSDP2 casts what leaves the student's forward, the loss too, to its low precision: the
        value before that, with the gradient's way through the cast."""
        loss = result[0] if return_outputs else result
        exact, self._exact_loss = self._exact_loss, None
        if loss.dtype != exact.dtype:
            loss = loss + (exact - loss.detach())
        return (loss, *result[1:]) if return_outputs else loss

    def after_loss(self, loss: Tensor, stats: TokenStats, inputs: dict[str, Any]) -> None:
        """Called after each loss, where collectives are safe."""

    def _student_side(self, model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Side, Any]:
        """The student's side, and what its routers say if their loss counts."""
        if self._router is None:
            return self._side(model, self._student_head, inputs), None
        with self._router.recording(model) as found:
            side = self._side(model, self._student_head, inputs)
        return side, found[-1]

    def _side(self, model: PreTrainedModel, head: Head, inputs: dict[str, Any]) -> Side:
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        check_width(mask.shape[1], model.config)
        with reading(model, inputs, **_positions_behind_padding(model, mask)):
            hidden = self._get_last_hidden_state(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                mask,
                inputs["completion_ids"].shape[1],
                **{name: inputs[name] for name in _MULTIMODAL if has_rows(inputs, name)},
            )
        head = current(head, model)  # an engine may have put shards in its place
        weight, bias, device = head.weight, head.bias, head.weight.device
        dtype = weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        usable = slice(head.vocab_size)
        return Side(
            hidden.to(device, dtype),
            weight[usable].to(dtype),
            None if bias is None else bias[usable].to(dtype),
            head.logit_scale,
            head.softcap,
        )

    # Generation.

    def _tokenize_prompts(self, prompts):
        """Without the padding that some processors add by default (Gemma 4's): TRL drops the mask
        that would tell it from a prompt."""
        # With 5.3 TRL asks for padding itself, and takes it off again.
        pads_itself = transformers_version.startswith("5.3.")
        if not isinstance(self.processing_class, ProcessorMixin) or pads_itself:
            return super()._tokenize_prompts(prompts)
        if not is_conversational({"prompt": prompts[0]}):
            return self.processing_class(text=prompts, padding=False)["input_ids"], None, {}
        before = self.chat_template_kwargs
        self.chat_template_kwargs = {"padding": False} | before
        try:
            return super()._tokenize_prompts(prompts)
        finally:
            self.chat_template_kwargs = before

    def _generate_and_score_completions(self, inputs):
        check_prompts(inputs)
        self._rows, self._prefix_lengths = inputs, [0] * len(inputs)
        output = super()._generate_and_score_completions(inputs)
        output |= mark_written(output, self.model.config)
        output |= self._kept_fields.tensors(output, self.model.config)
        for part in ("prompt", "completion"):  # the teacher may not have the id of the padding
            ids, padding = output[f"{part}_ids"], output[f"{part}_mask"] == 0
            output[f"{part}_ids"] = ids.masked_fill(padding & (ids >= self._shared), 0)
        # Any more would be read past the end of an embedding. vLLM is not told to suppress them.
        check_ids(output["completion_ids"], self._shared, "completion", self._tokenizer)
        # Shuffled and split with the rest of the generation batch.
        device, first = self.accelerator.device, self.accelerator.process_index * len(inputs)
        if not self.model.training:
            first += self._evaluated
            self._evaluated += self.accelerator.num_processes * len(inputs)
        output["sequence_ids"] = torch.arange(first, first + len(inputs), device=device)
        output["prefix_lengths"] = torch.tensor(self._prefix_lengths, device=device)
        width = output["completion_ids"].shape[1]
        prompts, completions = (_ids(output, part) for part in ("prompt", "completion"))
        self._log_lengths(output, completions)
        words = scale_warning(
            [len(p) + len(c) for p, c in zip(prompts, completions)], self._contexts
        )
        if words is not None and not self._warned_of_scale:
            self._warned_of_scale = True
            warnings.warn(words, stacklevel=2)
        output |= self.teacher_tensors(inputs, prompts, completions, width)
        return output

    def _log_lengths(self, output: dict[str, Any], completions: list[list[int]]) -> None:
        own = output["completion_mask"] * output.get("tool_mask", 1)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        ended = torch.tensor([ids[-1] in ends for ids in completions], device=own.device)
        counted = torch.ones_like(ended)
        if not self.model.training:
            counted = metrics.first_time(self.accelerator, len(completions))
        lengths = own.sum(1)
        self.log_sums(metrics.completion_totals(self.accelerator, lengths, ended, counted))

    def _generate(self, prompts):
        ids, completions, tool_mask, images, tool_images = super()._generate(prompts)
        if images is not None:  # a processor takes an empty list for a row's images, but no None
            images = [of_row or [] for of_row in images]
        return ids, completions, tool_mask, images, tool_images

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        rows, self._rows = self._rows, None  # None again in the turns after a tool's answer
        prefixes = None
        if rows is not None:
            check_tokens(rows, prompt_ids)
            all_ids = torch.tensor([token for ids in prompt_ids for token in ids])
            check_ids(all_ids, self._shared, "prompt", self._tokenizer)
            check_lengths(prompt_ids, self._contexts, self.args.pad_to_multiple_of)
            taken = () if images is None else _MULTIMODAL
            self._kept_fields = kept_fields(multimodal_fields, prompt_ids, self.model, taken)
            given = self.given_completions(rows)
            if given is not None:
                whole = [prompt + ids for prompt, ids in zip(prompt_ids, given)]
                check_context(whole, 0, self._contexts, self._tokenizer)
                return given
            check_context(prompt_ids, self.max_completion_length, self._contexts, self._tokenizer)
            if not self._on_all(weights_are_finite(self.model)):
                stop_on_weights(self.state.global_step, self.args.output_dir)
            prefixes = self.write_prefixes(rows, prompt_ids, images, multimodal_fields)
        if prefixes is None:
            return self._write(prompt_ids, images, multimodal_fields, has_tool_images)
        self._prefix_lengths = [len(prefix) for prefix in prefixes]
        limit, ends = self.max_completion_length, self.eos_token_ids
        open_ = [prefix for prefix in prefixes if not is_complete(prefix, limit, ends)]
        # Nobody leaves early where processes generate together or not at all.
        processes = self.accelerator.num_processes
        together = (self.use_vllm and processes > 1) or generates_together(self.accelerator)
        if not open_ and not together:
            return prefixes
        # What is written after a prefix that is complete is thrown away.
        heads = [[] if is_complete(prefix, limit, ends) else prefix for prefix in prefixes]
        begun = [prompt + head for prompt, head in zip(prompt_ids, heads)]
        fields = extend_token_fields(
            multimodal_fields, prompt_ids, [len(head) for head in heads], self.model.config
        )
        tokens = max([limit - len(prefix) for prefix in open_], default=1)
        # All rows are given as many tokens as the one with the shortest prefix needs.
        check_context(begun, tokens, self._contexts, self._tokenizer)
        with self._limit(tokens):
            rest = self._write(begun, images, fields, has_tool_images)
        return [
            prefix if is_complete(prefix, limit, ends) else (prefix + own)[:limit]
            for prefix, own in zip(prefixes, rest)
        ]

    def _write(self, *arguments: Any) -> list[list[int]]:
        """TRL's generation, of which the trainer's config alone decides how it samples."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with plain_defaults(model), evaluating(model):
            return super()._generate_single_turn(*arguments)

    # Evaluation.

    def evaluation_loop(self, *arguments, **keywords):
        self._evaluated = 0
        self._loss_sums.zero_()
        key = keywords.get("metric_key_prefix", "")
        self._part = key.removeprefix("eval_") if key.startswith("eval_") else ""
        output = super().evaluation_loop(*arguments, **keywords)
        total, count = self.accelerator.reduce(self._loss_sums, reduction="sum").tolist()
        if f"{key}_loss" in output.metrics and count:
            output.metrics[f"{key}_loss"] = total / count  # of tokens; there it was one of batches
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        reported, sums = self._metrics[self.mode], self._sums[self.mode]
        reported |= {name: [total / count] for name, (total, count) in sums.items() if count}
        sums.clear()
        if self.mode == "eval" and self._part:
            # TRL would call them the same for each data set, and evaluate() return the last one's.
            for name in list(reported):
                reported[f"{self._part}_{name}"] = reported.pop(name)
        super().log(logs, start_time)

    def predict(self, *arguments, **keywords):
        found = super().predict(*arguments, **keywords)
        self._sums["eval"].clear()
        self._metrics["eval"].clear()  # or the next evaluation would report the mean of both
        return found

    # A generation batch for several optimiser steps.

    def get_train_dataloader(self):
        # TRL counts micro-batches over all calls of train(), and one may have ended amid a step.
        self._step, self._buffered_inputs = 0, None
        data, shuffles, seed = self.train_dataset, self.shuffle_dataset, self.args.data_seed
        if not (isinstance(data, IterableDataset) and shuffles) or seed is None:
            return super().get_train_dataloader()
        # TRL would shuffle the stream by `seed`.
        self.train_dataset, self.shuffle_dataset = data.shuffle(seed=seed), False
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.shuffle_dataset = data, shuffles

    def _iteration(self) -> int:
        """Which step on the present generation batch comes next, from 0."""
        return self.state.global_step % self.args.num_iterations

    def _prepare_inputs(self, generation_batch):
        if self.model.training and self._iteration() and self._buffered_inputs is not None:
            return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        return super()._prepare_inputs(generation_batch)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self._iteration() and not self.args.save_only_model:
            # A resumed run has to go on with this batch.
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            file = _batch_file(self.accelerator.process_index)
            torch.save(self._buffered_inputs, folder / file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        # Not with the model, which DeepSpeed loads by itself.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._buffered_inputs = None
        if not self._iteration():
            return
        file = Path(checkpoint, _batch_file(self.accelerator.process_index))
        # On more processes than before some have no file, on fewer some files have no process: then
        # all write anew, or none.
        beyond = Path(checkpoint, _batch_file(self.accelerator.num_processes))
        if self._on_all(file.exists() and not beyond.exists()):
            # By type: older torch does not find the "cpu:0" of several processes.
            batch = torch.load(file, map_location=self.accelerator.device.type)
            rows = [len(part["prompt_ids"]) for part in batch]
            wanted = [self._train_batch_size] * self.args.gradient_accumulation_steps
            if not self._on_all(rows == wanted):
                raise split_error(rows, wanted, checkpoint)
            self._buffered_inputs = batch

    def _on_all(self, here: bool) -> bool:
        """Whether this holds on every process: a collective."""
        flag = torch.tensor([here], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).all())

    @contextlib.contextmanager
    def _limit(self, tokens: int) -> Iterator[None]:
        """At most so many new tokens in what is generated inside."""
        owners = [(self.generation_config, "max_new_tokens")]
        if self.use_vllm:
            owners.append((self.vllm_generation, "max_completion_length"))
        before = [getattr(owner, name) for owner, name in owners]
        try:
            for owner, name in owners:
                setattr(owner, name, tokens)
            yield
        finally:
            for (owner, name), value in zip(owners, before):
                setattr(owner, name, value)

    def _get_train_sampler(self, dataset=None):
        theirs = super()._get_train_sampler(dataset)
        names = (
            "data_source",
            "mini_repeat_count",
            "batch_size",
            "repeat_count",
            "shuffle",
            "seed",
        )
        sampler = EpochSampler(**{name: getattr(theirs, name) for name in names})
        sampler.repeat_count *= self.args.num_iterations
        if self.args.data_seed is not None:
            sampler.seed = self.args.data_seed
        batches = sampler.num_samples // sampler.batch_size
        sampler.trainer, sampler.steps_per_epoch = self, batches * self.args.num_iterations
        return sampler


def _positions_behind_padding(model: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """position_ids (B, L) that count from the first token that is no padding, as generation does.

    TRL passes none, and a model would count the padding on the left: wrong where positions are
    learned (GPT-2), where a state is begun anew at position 0 (RecurrentGemma), or where the
    longest position chooses the scale of the others. Models of images have positions of several
    dimensions, which they make themselves: none for them.
    """
    if model.config.get_text_config() is not model.config:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def _batch_file(process: int) -> str:
    return f"generation_batch_{process}.pt"


def _ids(batch: dict[str, Any], part: str) -> list[list[int]]:
    """The prompts or completions of a batch without their padding."""
    mask = batch[f"{part}_mask"].bool()
    return [ids[here].tolist() for ids, here in zip(batch[f"{part}_ids"], mask)]
