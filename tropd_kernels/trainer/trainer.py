"""`TrOPDTrainer`: one step of on-policy distillation with any objective of this package.

A generation batch is written once per optimiser step, by the student alone or by the student after
a teacher's prefix. Each micro-batch then goes through both backbones, and one call of
`linear_distillation_loss` compares hidden states through the two heads. What surrounds that
(generation, checkpoints, PEFT, logging, evaluation) is TRL's and transformers'.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.utils import get_config_model_id

from ..credit import importance_weights, return_to_go
from ..draws import bernoulli_uniforms
from ..functional import DistillationOutput, TokenStats, linear_distillation_loss
from ..objectives import OPD, TokenRule
from ..teachers import HiddenTeacher
from . import metrics
from .adapter import DistillationAdapter, Side
from .checks import check_dataset, check_tokenizers, find_tokenizer, stop_on
from .config import TrOPDConfig
from .prefix import column_ids, cut, prefix_mask, scheduled_length
from .regions import Sample, samples, show, write_page

_IGNORED = -100


class TrOPDTrainer(DistillationAdapter):
    """Trains a student on its own completions to match a teacher's next-token distribution.

    The constructor, the data sets (`prompt`, as text or as messages) and the metrics are those of
    TRL's `DistillationTrainer`.

    model: student, a model or its name. teacher_model: likewise; None takes
        `args.teacher_model_name_or_path`; only objective "sft" does without. The vocabularies may
        be padded to different heights; the ids that both have are compared.
    args: a `TrOPDConfig`; None takes its defaults, that is TrOPD as in the paper without guidance.
    train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config,
    peft_config, tools: as in TRL.

    Raises, before training: ValueError or TypeError for a head that cannot be read (an adapter on
    it, quantised, logits that no scale and cap express), a teacher with another tokenizer, an empty
    data set; NotImplementedError under FSDP and ZeRO-3. While training: ValueError for a prompt
    that exceeds the context or a prefix that does not continue its prompt; FloatingPointError for a
    loss that is NaN or infinite, after saving the batch under `output_dir`.
    """

    _tag_names = ["trl", "tropd"]  # noqa: RUF012
    _name = "TrOPD"
    _paper = {  # noqa: RUF012
        "title": "Trust Region On-Policy Distillation",
        "id": "2606.01249",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: TrOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TrOPDConfig(f"{name.split('/')[-1]}-TrOPD")
        if not isinstance(args, TrOPDConfig):
            raise TypeError(f"args must be a TrOPDConfig, got a {type(args).__name__}")
        self._samples: list[Sample] = []
        teacher_model = teacher_model or args.teacher_model_name_or_path
        if teacher_model is None and (args.rule().uses_teacher or args.prefix_length):
            raise ValueError(f"teacher_model: objective {args.objective!r} needs a teacher")
        guided = args.prefix_schedule != "none"
        named = guided and args.prefix_column not in (None, "teacher_completion")
        check_dataset("train_dataset", train_dataset, [args.prefix_column] if named else [])
        check_dataset("eval_dataset", eval_dataset)
        super().__init__(
            model, teacher_model, args, train_dataset, eval_dataset, processing_class, callbacks,
            optimizers, quantization_config, peft_config, tools,
        )  # fmt: skip

    def _load_teacher(self, teacher: str | PreTrainedModel) -> None:
        tokenizer = find_tokenizer(teacher, self.args.trust_remote_code)
        if tokenizer is not None:
            check_tokenizers(self._tokenizer, tokenizer)
        super()._load_teacher(teacher)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.prefix_column and self.args.prefix_column not in self._signature_columns:
            self._signature_columns += [self.args.prefix_column]

    # The loss.

    def distill(
        self, student: Side, teacher: Side | None, inputs: dict[str, Any], normalizer: Any
    ) -> tuple[Tensor, TokenStats]:
        """Loss and statistics of a micro-batch, as `DistillationAdapter` asks for them."""
        rule = self.args.rule(self.state.global_step / max(self.state.max_steps, 1))
        prefix = prefix_mask(inputs)
        labels = inputs["completion_ids"].masked_fill(inputs["loss_mask"] == 0, _IGNORED)
        if rule.normalize == "kept" and normalizer is not None:
            # Its mean is over the tokens that the gate kept, which only the loss can count, so
            # micro-batches weigh alike.
            normalizer = None
            share = 1 / self.current_gradient_accumulation_steps
        else:
            share = 1.0
        credit = self._credit(student, teacher, labels, prefix)
        out = self._compare(
            student, teacher, labels, rule,
            teacher_prefix=prefix, uniforms=self._uniforms(inputs), normalizer=normalizer,
            **credit,
        )  # fmt: skip
        return out.loss * share, out.stats

    def _compare(
        self, student: Side, teacher: Side | None, labels: Tensor, rule: TokenRule, **options: Any
    ) -> DistillationOutput:
        return linear_distillation_loss(
            student.hidden,
            student.weight,
            labels,
            None if teacher is None else _frozen(teacher),
            rule,
            bias=student.bias,
            logit_scale=student.logit_scale,
            softcap=student.softcap,
            temperature=self.temperature,
            backend=self.args.backend,
            max_workspace_bytes=self.args.max_workspace_bytes,
            **options,
        )

    def _uniforms(self, inputs: dict[str, Any]) -> Tensor:
        """The gate's draws (B, C): a function of seed, step, completion and position, so that
        neither padding, nor the split into micro-batches, nor a resume changes them."""
        positions = torch.arange(
            inputs["completion_ids"].shape[1], device=inputs["completion_ids"].device
        )
        return bernoulli_uniforms(
            self.args.seed,
            self.state.global_step,
            inputs["sequence_ids"][:, None].to(positions.device),
            positions[None],
        )

    @torch.no_grad()
    def _credit(
        self, student: Side, teacher: Side | None, labels: Tensor, prefix: Tensor
    ) -> dict[str, Tensor]:
        """`advantages` and `token_weight` (B, C), where the config asks for them: one more pass
        over the heads, for the rewards. The teacher's tokens take no part and weigh 1."""
        discount, gamma = self.args.kl_discount_factor, self.args.importance_gamma
        if not discount and gamma is None:
            return {}
        rewards = self._compare(student, teacher, labels, OPD(), reduction="sum").stats.reward
        own = (labels != _IGNORED) & ~prefix
        credit = {}
        if discount:
            credit["advantages"] = return_to_go(rewards, own, discount).where(own, rewards)
        if gamma is not None:
            weights = importance_weights(rewards, own, gamma)
            credit["token_weight"] = weights.masked_fill(prefix, 1.0)
        return credit

    def after_loss(self, loss: Tensor, stats: TokenStats, inputs: dict[str, Any]) -> None:
        """Logs, and stops where the loss of any process is not finite."""
        counted = inputs["loss_mask"].bool()
        sums, lowest = metrics.token_sums(stats, counted, prefix_mask(inputs) & counted)
        self.log_metrics(metrics.means(self.accelerator, sums, lowest))
        if self.args.log_regions:
            self._samples = samples(inputs, stats.trust, counted, self._tokenizer)
        finite = self.accelerator.gather(loss.detach().isfinite().reshape(1))
        if not finite.all():
            stop_on(
                loss.item(), inputs, self.args.output_dir, self.state.global_step,
                self.accelerator.process_index,
            )  # fmt: skip

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            tokens = self._buffered_inputs[0]["num_items_in_batch"].item()
            seconds = self._metrics["train"]["step_time"][-1]
            memory = metrics.peak_memory_gib(self.accelerator.device)
            self.log_metrics(
                {"tropd/tokens_per_second": tokens / seconds, "tropd/peak_memory_gib": memory}
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self._samples and self.accelerator.is_main_process:
            show(self._samples)
            folder = Path(self.args.output_dir, "regions")
            write_page(self._samples, folder / f"{self.mode}_{self.state.global_step:05d}.html")
        self._samples = []

    # The prefix.

    def write_prefixes(
        self, rows: list[dict], prompt_ids: list[list[int]], images: Any, multimodal_fields: dict
    ) -> list[list[int]] | None:
        """The teacher's tokens at the head of each completion; none while evaluating."""
        length = self.prefix_length()
        if length == 0 or not self.model.training:
            return None
        column = self.args.prefix_column
        if column is None or column not in rows[0]:
            written = self.generate_with_teacher(prompt_ids, images, multimodal_fields, length)
        else:
            written = [
                column_ids(row[column], row["prompt"], ids, self._tokenize, column)
                for row, ids in zip(rows, prompt_ids)
            ]
        return [cut(ids, length, self.eos_token_ids) for ids in written]

    def prefix_length(self) -> int:
        """l at the current optimiser step, in tokens."""
        args = self.args
        steps = args.prefix_steps
        if steps is None:
            steps = round(args.prefix_fraction * self.state.max_steps)
        return scheduled_length(
            args.prefix_schedule, args.prefix_length, self.state.global_step, steps
        )

    def _tokenize(self, text: str | list[dict]) -> list[int]:
        """Ids of a prompt with its answer, in the way that TRL tokenises the prompt alone."""
        if isinstance(text, str):
            return self.processing_class(text=[text])["input_ids"][0]
        return self.processing_class.apply_chat_template(
            conversation=[text],
            tools=self.tools or None,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )["input_ids"][0]


def _frozen(teacher: Side) -> HiddenTeacher:
    bias = None if teacher.bias is None else teacher.bias.detach()
    return HiddenTeacher(
        teacher.hidden.detach(), teacher.weight.detach(), bias, teacher.logit_scale, teacher.softcap
    )
