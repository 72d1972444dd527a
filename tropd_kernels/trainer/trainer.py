"""`TrOPDTrainer`: one step of on-policy distillation with any objective of this package.

A generation batch is written once per optimizer step (or `num_iterations` of them), by the student
alone or by the student after a teacher's prefix. Each micro-batch then goes through both backbones,
and one call of `linear_distillation_loss` compares hidden states through the two heads. A teacher
behind a server, or in the data set's columns, gives log-probs of a few ids instead (`signals.py`).
Generation, checkpoints, PEFT, logging and evaluation around that are TRL's and transformers'.
"""

import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    TrainerCallback,
)
from trl.trainer.utils import get_config_model_id

from ..draws import bernoulli_uniforms
from ..functional import DistillationOutput, TokenStats, linear_distillation_loss
from ..objectives import SFT, TokenRule
from ..teachers import Teacher
from . import card, metrics, progress, rewards, row_teachers, sampling, signals, teacher_prompts
from .best_model import surrogate_warning
from .config import TrOPDConfig
from .data_checks import (
    check_datasets,
    check_modalities,
    check_rows,
    check_unread,
    has_teacher_prompts,
    known_columns,
)
from .effects import check_inputs, check_optimizers
from .generation_keys import check_generation_ids, check_lookup, check_padding_is_no_end
from .loaded_teacher import check_models
from .patching import base_of
from .prefix import prefix_mask
from .regions import Sample, samples, show, write_page
from .rewarded import RewardedTrainer
from .row_teachers import RowTeachers, check_several, compare_parts
from .self_teacher import check_self, is_self, needs_prompts, teaches_alone
from .served_teacher import ServedTeacher
from .sides import ModelSide
from .sources import check_sources, find_processor, find_tokenizer, teacher_to_load
from .special_tokens import compare_tokenizers, refuse_unused_map, unknown_tokenizer_error
from .stops import checkpoint_named, raise_nonfinite
from .student_checks import check_adapters, check_optimized, check_trainable, meet_student
from .verifier import Verifier
from .verifier_checks import check_reward_funcs
from .vocabulary import ends_warning

_IGNORED = -100


class TrOPDTrainer(RewardedTrainer):
    """Trains a student on its own completions to match a teacher's next-token distribution.

    The constructor, the data sets (`prompt`, as text or as messages) and the metrics are those of
    TRL's `DistillationTrainer`.

    Args:
        model: Student: a model, its name or its folder. By name it is loaded in float32, unless
            `model_init_kwargs` give a `dtype`.
        teacher_model: Likewise, also an adapter's folder; None takes
            `args.teacher_model_name_or_path`. Objective "sft", a served and a precomputed teacher
            need none; a server of hidden states needs the name of its checkpoint, for the head. By
            name it is loaded in its checkpoint's dtype, unless
            `teacher_model_init_kwargs` give a `dtype`. "self" is the student itself, frozen as it
            is given (with adapters: without them) or averaged (`teacher_update_rate`): a run that
            is resumed has to be given the same one. The vocabularies may be padded to different
            heights; the ids that both have are compared.
        args: A `TrOPDConfig`; None takes its defaults: TrOPD as in the paper, without guidance.
        train_dataset: As in TRL; so are `eval_dataset`, `processing_class`, `callbacks`,
            `optimizers`, `quantization_config`, `peft_config` and `tools`. A column
            `teacher_prompt` (text or messages) is what the teacher reads, or writes after, in place
            of `prompt`; both sides then read the same completion.
        reward_funcs: As in TRL's `GRPOTrainer`: a function, a reward model or its name, or a list
            of those. They judge the `num_generations` completions of a prompt, and their advantages
            enter the loss by `task_weight`. Not with `tools`.
        reward_processing_classes: Likewise: tokenizers of reward models.
        teacher_models: Several teachers, by the ids in a column `teacher_id`: a model, or its name.
            None takes `args.teacher_models`. Instead of teacher_model.

    Attributes:
        dataset_name: What the model card calls the data: a name on the hub, or a file. None at
            first.

    Raises:
        ValueError, TypeError: Before training: a head that cannot be read (an adapter on it,
            quantized, logits that no scale and cap express), a teacher with another tokenizer or
            with the student's own tensors, an optimizer of other parameters, an end of completions
            or padding that a model does not have, a student with nothing to train, an empty data
            set, a served teacher whose context is shorter than a completion. While training: a
            prompt that is empty or exceeds the context, a prefix that does not continue its prompt,
            columns that are no log-probs, or a resume that cannot go on with its generation batch.
        TeacherServerError: A served teacher does not answer, gives less than the objective needs,
            or cuts its text.
        NotImplementedError: FSDP's first version (FSDP2 and ZeRO-3 are supported), and models of
            tensor parallelism.
        FloatingPointError: While training: a loss that is NaN or infinite, after its batch is saved
            under `output_dir`, and such weights, before they generate or are saved, and at the end.

    Errors while training say from which checkpoint the run can be resumed, if one was saved.
    """

    _tag_names = ["trl", "tropd-kernels", "distillation"]  # noqa: RUF012

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        teacher_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        args: TrOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        teacher_models: Mapping[str, str | PreTrainedModel] | None = None,
    ):
        model, teacher_model = (
            os.fspath(given) if isinstance(given, os.PathLike) else given
            for given in (model, teacher_model)
        )
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TrOPDConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-TrOPD")
        if not isinstance(args, TrOPDConfig):
            raise TypeError(f"args must be a TrOPDConfig, got a {type(args).__name__}")
        check_models(model, teacher_model, args, quantization_config, peft_config)
        self.dataset_name: str | None = None
        self._samples: list[Sample] = []
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        loaded = args.teacher_models if teacher_models is None else teacher_models
        if loaded is None:
            loaded = teacher_to_load(teacher_model, args)
        else:
            check_several(loaded, teacher_model, args, datasets)
        rewarded = args.uses_task_advantages  # which `check_reward_funcs` holds against these
        check_self(model, loaded, peft_config, args, train_dataset, rewarded, processing_class)
        check_sources(model, loaded, args)
        if args.precomputed_teacher and tools:
            raise ValueError("tools: precomputed_teacher fixes the completions: leave tools out")
        reads_own = bool(args.teacher_model_server_url) or loaded is not None
        check_inputs(args, tools, datasets, reads_own)
        if needs_prompts(model, loaded, args, rewarded):
            self._why_teacher_prompts = teacher_prompts.NOTHING_ELSE
        elif reads_own and has_teacher_prompts(train_dataset):
            self._why_teacher_prompts = teacher_prompts.OTHERS_HAVE_IT
        self._adapters_teach_alone = teaches_alone(loaded, args, rewarded)
        judges = check_reward_funcs(reward_funcs, reward_processing_classes, args, tools, datasets)
        unused = check_optimizers(args, optimizers)
        check_lookup(args, evaluates=eval_dataset is not None)
        check_datasets(train_dataset, eval_dataset, args, reads_own)
        check_unread(datasets, args, tools, rewarded)
        if args.teacher_model_server_url:
            present = known_columns(train_dataset)  # others are checked when they are read
            has_text = present is None or args.prefix_column in present
            self._server = ServedTeacher(args, args.is_guided and not has_text, teacher_model)
        served = self._server.model if self._server else None
        self._card_subject = card.subject(model, loaded, served, args, unused)
        if isinstance(args.objective, str):
            self._tag_names = [*self._tag_names, args.objective]
        if processing_class is None:
            processing_class = find_processor(model, args)
        if isinstance(processing_class, ProcessorMixin):
            if reads_own and has_teacher_prompts(train_dataset):
                teacher_prompts.refuse_fields(True, {})
        check_modalities(datasets, processing_class)
        super().__init__(
            model, loaded, args, train_dataset, eval_dataset, processing_class, callbacks,
            optimizers, quantization_config, peft_config=peft_config, tools=tools,
        )  # fmt: skip
        self.check_tokenizing()
        check_optimized(self.model, self.optimizer)
        if self._server is not None:
            self._meet_server(self._server)
        each = args.per_device_train_batch_size * args.gradient_accumulation_steps
        check_rows(train_dataset, each * self.accelerator.num_processes, args.num_generations)
        if not self.use_vllm:
            device = self.accelerator.device
            sampling.check_cache(base_of(self.model), self.generation_config, device)
            check_padding_is_no_end(args, self._tokenizer.pad_token_id, self.eos_token_ids)
            if args.generation_kwargs:
                sampling.check_processors(base_of(self.model), self.generation_config)
                check_generation_ids(
                    args.generation_kwargs,  # type: ignore[arg-type]
                    self.eos_token_ids, self._student_head.vocab_size,
                )  # fmt: skip
        if judges:
            self._verifier = Verifier(self, judges, reward_processing_classes)
        self._warpers = sampling.truncating_warpers(args)
        self._kept_mass: Tensor | None = None  # of a micro-batch: sum and count
        finders = sampling.sampling_warning, sampling.temperature_warning, surrogate_warning
        for warning in [*meet_student(self.model, args), *(find(args) for find in finders)]:
            if warning is not None and self.accelerator.is_main_process:
                warnings.warn(warning, stacklevel=2)
        at_terminal = sys.stdout.isatty() and not args.disable_tqdm
        if at_terminal if args.rich_progress is None else args.rich_progress:
            for shown in (ProgressCallback, PrinterCallback):  # one of them, which prints the logs
                self.remove_callback(shown)
            self.add_callback(progress.Progress)

    def _load_teacher(self, teacher: str | PreTrainedModel) -> None:
        tokenizer = None if is_self(teacher) else find_tokenizer(teacher, self.args)
        given = self.args.special_token_map
        if tokenizer is not None:
            self._id_table = compare_tokenizers(
                self._tokenizer, tokenizer, given, several=self._several
            )
            warning = ends_warning(
                self.eos_token_ids, tokenizer.eos_token_id, self._id_table, self._tokenizer
            )
            if warning is not None and self.accelerator.is_main_process:
                warnings.warn(warning, stacklevel=2)
        elif given is not None:
            raise unknown_tokenizer_error()
        super()._load_teacher(teacher)

    def _load_teachers(self, teachers: Mapping[str, str | PreTrainedModel]) -> None:
        super()._load_teachers(teachers)
        if self.args.special_token_map is not None:
            refuse_unused_map(teacher["_teacher_ids"] for teacher in self._teachers.values())

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [teacher_prompts.COLUMN, row_teachers.COLUMN]
        columns += [self.args.prefix_column] if self.args.prefix_column else []
        if self.args.precomputed_teacher:
            columns += signals.columns_of(self.args.rules())
        self._signature_columns += [c for c in columns if c not in self._signature_columns]

    def get_train_dataloader(self):
        if self.train_dataset is None:
            raise ValueError("train_dataset: none was given, so that this trainer only evaluates")
        check_trainable(self.model)
        check_adapters(self.model, self.callback_handler.callbacks)
        return super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **keywords: Any):
        """Trains as transformers' `train` does.

        However training ends, the log so far is in `trainer_state.json` in output_dir, and the
        model is as it was but for its weights.

        Raises:
            ValueError: `resume_from_checkpoint` is an output_dir, not one of its checkpoints, or
                True where there is none.
        """
        given = progress.checkpoint_to_resume(resume_from_checkpoint, self.args)
        callbacks = self.callback_handler.callbacks
        if self.is_world_process_zero() and progress.prints_logs(callbacks):
            whole = progress.gives_whole(self.args)
            if (advice := progress.watch(self._rule(), whole)) is not None:
                print(advice, flush=True)
        try:
            with checkpoint_named(self.args.output_dir):
                output = super().train(given, *rest, **keywords)
                self.check_weights()  # nothing was generated after the last step
                return output
        finally:
            progress.close(self.callback_handler.callbacks)
            if self.is_in_train:  # transformers does this only at a regular end
                self.is_in_train = False
                if (hook := getattr(self, "neftune_hook_handle", None)) is not None:
                    hook.remove()
            if self.args.should_save and self.state.log_history:
                self.save_state()

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes README.md in output_dir: TRL's metadata and the text of `card.py`.

        Args:
            model_name: None takes the last part of the hub's name or of output_dir.
            dataset_name: Name on the hub, or a file; None takes the trainer's `dataset_name`.
            tags: As in TRL.
        """
        if not self.is_world_process_zero():
            return
        output = Path(self.args.output_dir)
        name = model_name or (self.hub_model_id or output.resolve().name).split("/")[-1]
        data = dataset_name or self.dataset_name
        on_hub = card.named(data).hub if data else None
        super().create_model_card(name, on_hub, tags)
        made = ModelCard.load(output / "README.md")
        peft = is_peft_model(self.model)
        made.data.base_model = self._card_subject.student.hub
        made.data.library_name = "peft" if peft else made.data.library_name
        made.data.pop("licence", None)  # a placeholder
        badges = [line.strip() for line in made.text.splitlines() if line.lstrip()[:5] == "[<img"]
        made.text = "\n" + card.write(
            self._card_subject, self.args, name, hub_model_id=self.hub_model_id, dataset=data,
            chat=bool(self.processing_class.chat_template), badges=badges, peft=peft,
            images=self._is_vlm,
            judges=self._verifier.reward_func_names if self._verifier else (),
        )  # fmt: skip
        made.save(output / "README.md")

    # The loss.

    def distill(
        self,
        student: ModelSide,
        teacher: ModelSide | RowTeachers | None,
        inputs: dict[str, Any],
        normalizer: Any,
    ) -> tuple[Tensor, TokenStats]:
        """Loss and statistics of a micro-batch, as `DistillationAdapter.distill` specifies them."""
        rule = self._rule()
        if teacher is not None:
            # Also where this micro-batch's teacher has more ids than another, or no teacher is read
            # (`_log_probs`): all log-probs are over the ids that can be sampled.
            student = student.of_ids(self._shared_vocab_size)
        prefix = prefix_mask(inputs)
        counted = inputs["loss_mask"] != 0
        labels, own = inputs["completion_ids"].masked_fill(~counted, _IGNORED), counted & ~prefix
        if rule.normalize == "kept" and normalizer is not None:
            # Its mean is over the tokens that the gate kept, which only the loss can count, so
            # micro-batches weigh alike.
            normalizer = None
            share = 1 / self.current_gradient_accumulation_steps
        else:
            share = 1.0
        signal = signals.teacher_of(inputs) if teacher is None else teacher.as_teacher()
        old = inputs.get("old_log_probs")
        if self._warpers and old is None and rule.policy_gradient:  # of the policy that sampled
            self._kept_mass = sampling.kept_mass(
                student, own, self._shared_vocab_size, self.temperature, self._warpers
            )
        credit: dict[str, Tensor] = {}
        log_probs: Tensor | None = None
        if rewards.needs_rewards(self.args, old):
            credit, log_probs = self._credit(student, signal, labels, rule, own, old)
        if not all(tensor.isfinite().all() for tensor in credit.values()):
            # The loss would refuse them on this process only; `after_loss` stops all processes.
            credit, share = {}, math.nan
        if rule.uses_task_advantages:
            credit["task_advantages"] = inputs["task_advantages"][:, None].expand(labels.shape)
        out = self._compare(
            student, signal, labels, rule,
            teacher_prefix=prefix, uniforms=self._uniforms(inputs), normalizer=normalizer,
            old_log_probs=old, **self._gradient_sampling(inputs), **credit,
        )  # fmt: skip
        if out.gradient_error is not None:
            sampled = torch.stack([out.gradient_error, out.gradient_share])
            self.log_values(metrics.sample_means(self.accelerator, sampled))
        stats = out.stats
        selects = rule.score is not None and self._keeps_log_probs(old)
        if selects and (unknown := stats.log_probs.isnan())[counted].any():
            # Known of the selected tokens alone, and later steps may select others.
            if log_probs is None:
                log_probs = self._log_probs(student, labels)
            stats = replace(stats, log_probs=torch.where(unknown, log_probs, stats.log_probs))
        return out.loss * share, stats

    def _keeps_log_probs(self, old: Tensor | None) -> bool:
        """Whether the log-probs of this step are the sampling policy's of those that follow."""
        return old is None and self.model.training and self.args.num_iterations > 1

    @torch.no_grad()
    def _log_probs(self, student: ModelSide, labels: Tensor) -> Tensor:
        return self._compare(student, None, labels, SFT(), reduction="sum").stats.log_probs

    def _rule(self) -> TokenRule:
        rule = self.args.rule(self.state.global_step / max(self.state.max_steps, 1))
        # An evaluation's advantages are 0, which no filter passes.
        return rule if self.model.training else replace(rule, reward_filter=None)

    def _compare(
        self,
        student: ModelSide,
        teacher: Teacher | RowTeachers | None,
        labels: Tensor,
        rule: TokenRule,
        **options: Any,
    ) -> DistillationOutput:
        if isinstance(teacher, RowTeachers):
            return compare_parts(self._compare, student, teacher, labels, rule, **options)
        return linear_distillation_loss(
            student.hidden, student.weight, labels, teacher, rule, bias=student.bias,
            logit_scale=student.logit_scale, softcap=student.softcap, temperature=self.temperature,
            backend=self.args.backend, max_workspace_bytes=self.args.max_workspace_bytes, **options,
        )  # fmt: skip

    def _uniforms(self, inputs: dict[str, Any]) -> Tensor:
        """The gate's draws (B, C), a function of seed, step, completion and position.

        Padding, the split into micro-batches and a resume do not change them.
        """
        ids, step = inputs["completion_ids"], self.state.global_step
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        sequences = inputs["sequence_ids"][:, None].to(ids.device)
        return bernoulli_uniforms(self.args.seed, step, sequences, positions)

    def _gradient_sampling(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Options of the loss for gradients from a sample of ids, if the config asks for them.

        The sample depends on seed, step and the micro-batch's first completion.
        """
        args = self.args
        if not (args.gradient_tolerance or args.gradient_sampling) or not torch.is_grad_enabled():
            return {}
        key = f"{args.seed} {self.state.global_step} {int(inputs['sequence_ids'][0])}"
        return {
            "gradient_tolerance": args.gradient_tolerance,
            "gradient_sampling": args.gradient_sampling,
            "seed": random.Random(key).getrandbits(63),
        }

    @torch.no_grad()
    def _credit(
        self,
        student: ModelSide,
        teacher: Teacher | RowTeachers | None,
        labels: Tensor,
        rule: TokenRule,
        own: Tensor,
        old_log_probs: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`advantages` and `token_weight` (B, C); the rewards take one more pass over the heads,
        whose log-probs (B, C) of the student are the second value."""
        k1 = rewards.reward_rule(rule) if teacher is not None else SFT()
        stats = self._compare(
            student, teacher, labels, k1, reduction="sum", old_log_probs=old_log_probs
        ).stats
        credit = rewards.token_credit(self.args, rule, stats, own, old_log_probs)
        return credit, stats.log_probs

    def loss_count(self, stats: TokenStats, inputs: dict[str, Any]) -> Tensor:
        kept = self._rule().normalize == "kept"
        return stats.kept.sum() if kept else super().loss_count(stats, inputs)

    # What is logged.

    def after_loss(self, loss: Tensor, stats: TokenStats, inputs: dict[str, Any]) -> None:
        """Logs, and stops the run where the loss of any process is not finite."""
        counted = inputs["loss_mask"].bool()
        guided, old = prefix_mask(inputs) & counted, inputs.get("old_log_probs")
        sums, lowest = metrics.token_sums(stats, counted, guided, self._rule(), old)
        self.log_sums(metrics.totals(self.accelerator, sums))
        if self._kept_mass is not None:
            mass, count = self.accelerator.reduce(self._kept_mass, reduction="sum").tolist()
            self.log_sums({metrics.PREFIX + "sampling_mass": (mass, count)})
            self._kept_mass = None
        lowest = self.accelerator.gather(lowest).min().item()
        if lowest != math.inf:
            self.log_values({metrics.PREFIX + "reward_min": lowest})
        if self.args.log_regions and self.accelerator.is_main_process:
            self._samples = samples(inputs, stats.trust, counted, self._tokenizer)
        finite = self.accelerator.gather(loss.detach().isfinite().reshape(1))
        if not finite.all():
            raise_nonfinite(
                loss.item(), inputs, self.args.output_dir, self.state.global_step,
                self.accelerator.process_index,
            )  # fmt: skip

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            batch = (self._buffered_inputs or [{}])[0]
            if "num_items_in_batch" in batch:  # a subclass may have made the batch
                tokens, seconds = batch["num_items_in_batch"].item(), self._metrics["train"]
                self.log_sums({"tropd/tokens_per_second": (tokens, seconds["step_time"][-1])})
            memory = metrics.peak_memory_gib(self.accelerator.device)
            self.log_values({"tropd/peak_memory_gib": memory})
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self._samples and self.accelerator.is_main_process:
            show(self._samples)
            folder = Path(self.args.output_dir, "regions")
            write_page(self._samples, folder / f"{self.mode}_{self.state.global_step:05d}.html")
        self._samples = []
