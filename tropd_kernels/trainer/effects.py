"""Refuses settings that would have no effect, and says what to do instead.

They are settings of transformers and TRL that nothing here reads (`WITHOUT_EFFECT`), settings that
belong to another setting (`BELONGS_TO`), and settings that act only in combination with others
(`CONDITIONS`). A setting at its default is never refused.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import Trainer

from ..backends import has_row_engine
from ..objectives.registry import rewarded
from .data_checks import data_sets, prompts_are_text
from .optimizers import LION, NO_OPTIM_ARGS, NOT_ADAM, WARM_BY_THEMSELVES
from .protocols import sends_states
from .recipes import describe, how_to_unset, sets
from .schedules import arguments_of

_NO_METRICS = "the trainer takes no compute_metrics and keeps no predictions: leave it out"
_CASTS = (
    "training evaluates in its own precision, and evaluate() before it would cast the weights that "
    "are trained: load the model in another dtype, or leave it out"
)
_ONE_SAMPLER = "rows come in TRL's own order: leave it out, or set shuffle_dataset"
#: Settings that nothing here reads.
WITHOUT_EFFECT = {
    "label_smoothing_factor": "the loss is the objective's alone: leave it out, and with objective "
    "'sft' set label_smoothing in objective_kwargs",
    "average_tokens_across_devices": "the loss is always divided by the tokens of all processes: "
    "leave it out",
    "include_num_input_tokens_seen": "num_tokens is logged in any case: leave it out",
    "use_cache": "generation has a cache in any case, and the loss needs none: leave it out",
    "train_sampling_strategy": _ONE_SAMPLER,
    "length_column_name": _ONE_SAMPLER,
    "label_names": "the loss has no labels but the completions: leave it out",
    "include_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_accumulation_steps": _NO_METRICS,
    "bf16_full_eval": _CASTS,
    "fp16_full_eval": _CASTS,
    "logging_nan_inf_filter": "a loss that is NaN or infinite stops the run: leave it out",
}
#: Settings that belong to another one, and the value that it must have.
BELONGS_TO = {
    "liger_kernel_config": ("use_liger_kernel", True),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", True),
    "num_completions_to_print": ("log_completions", True),
    "vllm_mode": ("use_vllm", True),
    "vllm_model_impl": ("vllm_mode", "colocate"),
    "vllm_enable_sleep_mode": ("vllm_mode", "colocate"),
    "vllm_structured_outputs_regex": ("use_vllm", True),
    "vllm_server_base_url": ("vllm_mode", "server"),
    "vllm_server_timeout": ("vllm_mode", "server"),
    "vllm_group_port": ("vllm_mode", "server"),
    "vllm_gpu_memory_utilization": ("vllm_mode", "colocate"),
    "vllm_max_model_length": ("vllm_mode", "colocate"),
    "vllm_tensor_parallel_size": ("vllm_mode", "colocate"),
}
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
             "cache_implementation", "use_vllm", "num_generations")  # fmt: skip
_CREDIT = ("kl_discount_factor", "importance_gamma", "drift_tau")
_SERVED = ("teacher_server_timeout", "teacher_server_retries", "teacher_server_concurrency",
           "teacher_server_protocol")  # fmt: skip
# As transformers creates schedules. DeepSpeed's own have other rules.
_NO_WARMUP = {"constant", "reduce_lr_on_plateau", "greedy"}


@dataclass(frozen=True)
class Condition:
    """Settings that act only if `acts` is true of the config.

    Attributes:
        keys: The settings.
        acts: Predicate of the config.
        reason: Why they do not act; "{}" is replaced by the value of the setting `of`.
        remedy: How to make them act.
        of: The setting that `reason` shows.
    """

    keys: tuple[str, ...]
    acts: Callable[[Any], bool]
    reason: str
    remedy: str = ""
    of: str = ""

    def error(self, key: str, args: Any) -> ValueError:
        other = getattr(args, self.of) if self.of else None
        return no_effect(args, key, self.reason.format(getattr(other, "value", other)), self.remedy)


def no_effect(args: Any, key: str, reason: str, remedy: str = "") -> ValueError:
    """The error for a setting without effect. remedy: how to make it act."""
    remedy = f"{remedy}, or " if remedy else ""
    return ValueError(
        f"{key}: it would have no effect: {reason}: {remedy}{how_to_unset(args, key)}"
    )


def refuse(args: Any, keys: Collection[str], reason: str) -> None:
    """Raises ValueError for one of these settings that is not at its default."""
    for key in _given(args, keys):
        raise no_effect(args, key, reason)


def _deepspeed(args: Any) -> bool:
    """Whether DeepSpeed is used, by its own config or by accelerate's."""
    return bool(args.deepspeed) or getattr(args, "deepspeed_plugin", None) is not None


def _zero_3(args: Any) -> bool:
    """Whether parameters are partitioned; true where only DeepSpeed itself reads its config."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return _deepspeed(args) and getattr(plugin, "zero_stage", 3) == 3


def _text(setting: Any) -> str:
    return str(getattr(setting, "value", setting))


#: In the order in which they are checked.
CONDITIONS = (
    Condition(_SAMPLING, lambda a: not a.precomputed_teacher,
              "with precomputed_teacher nothing is generated"),
    Condition(("top_p", "top_k", "min_p", "num_generations"),
              lambda a: a.use_vllm or (a.generation_kwargs or {}).get("do_sample", True),
              "with do_sample False in generation_kwargs nothing is drawn"),
    Condition(("cache_implementation",),
              lambda a: (a.generation_kwargs or {}).get("use_cache") is not False,
              "with use_cache False in generation_kwargs there is no cache"),
    Condition(("cache_implementation",),
              lambda a: not a.use_vllm or (a.is_guided and a.loads_teacher),
              "vLLM has a cache of its own"),
    Condition(("vllm_server_host", "vllm_server_port"),
              lambda a: a.use_vllm and a.vllm_mode == "server", "there is no server of vLLM's",
              "set use_vllm and vllm_mode 'server'"),
    Condition(("vllm_server_host", "vllm_server_port"), lambda a: a.vllm_server_base_url is None,
              "vllm_server_base_url has both, {!r}", of="vllm_server_base_url"),
    Condition(_SERVED, lambda a: a.teacher_model_server_url is not None,
              "there is no teacher_model_server_url"),
    Condition(("teacher_sync_steps",), lambda a: a.teacher_update_rate is not None,
              "the teacher does not move", "set teacher_update_rate"),
    Condition(("prefix_weight", "prefix_column"), lambda a: a.is_guided,
              "no completion begins with the teacher's text",
              "set prefix_schedule and its length, or lmbda below 1"),
    Condition(("prefix_steps", "prefix_fraction"),
              lambda a: a.prefix_schedule not in ("none", "constant"),
              "with prefix_schedule {!r} no prefix shrinks", "choose another schedule",
              of="prefix_schedule"),
    Condition(("prefix_fraction",), lambda a: a.prefix_steps is None,
              "the prefix is gone after prefix_steps, {}", "leave those out", of="prefix_steps"),
    Condition(_CREDIT, lambda a: a.lmbda > 0,
              "with lmbda 0 every completion is the teacher's, and credit is for the student's",
              "raise lmbda"),
    Condition(("reward_weights", "scale_rewards"),
              lambda a: any(rule.policy_gradient for rule in a.rules()),
              "objective {!r} has no policy gradient, which rewards enter",
              f"take one of {', '.join(rewarded())}", of="objective"),
    Condition(("reward_weights", "scale_rewards"), lambda a: a.uses_task_advantages,
              "no term of the objective reads a verifier's rewards", "set task_weight"),
    Condition(("drift_block_size",), lambda a: a.drift_tau is not None,
              "there is no drift_tau", "set that"),
    Condition(("data_seed",), lambda a: a.shuffle_dataset,
              "rows come in the data set's own order", "set shuffle_dataset"),
    Condition(("max_workspace_bytes",), lambda a: has_row_engine(a.backend),
              "the backend 'reference' makes all logits at once", "choose another backend"),
    Condition(("adam_beta1", "adam_beta2"),
              lambda a: _deepspeed(a) or _text(a.optim) not in NOT_ADAM,
              "the optimizer {!r} does not take it", "choose one of Adam's kind", of="optim"),
    Condition(("adam_epsilon",), lambda a: _deepspeed(a) or _text(a.optim) not in NOT_ADAM | LION,
              "the optimizer {!r} does not take it", "choose one of Adam's kind", of="optim"),
    Condition(("fp16",), lambda a: a.device.type != "cpu",
              "on a CPU accelerate leaves the weights' own dtype", "set bf16"),
    Condition(("fsdp_config",),
              # Earlier transformers fill it, and read it with accelerate's own FSDP, too.
              lambda a: bool(a.fsdp) or "xla_fsdp_grad_ckpt" in (a.fsdp_config or ()),
              "there is no FSDP", "set fsdp"),
    Condition(("ds3_gather_for_generation",), _zero_3, "there is no DeepSpeed of ZeRO's stage 3"),
    Condition(("num_train_epochs",), lambda a: a.max_steps <= 0,
              "max_steps, {}, say where training ends", "leave those out", of="max_steps"),
    Condition(("dataloader_in_order", "dataloader_persistent_workers",
               "dataloader_multiprocessing_context"), lambda a: a.dataloader_num_workers > 0,
              "there are no workers", "set dataloader_num_workers"),
    Condition(("logging_steps",),
              # eval_steps are these where they are not given.
              lambda a: "steps" in (a.logging_strategy, a.eval_strategy),
              "logging_strategy is {!r}", "set that to 'steps'", of="logging_strategy"),
    Condition(("eval_steps",),
              # In a copy of a config transformers may have put logging_steps there.
              lambda a: a.eval_strategy == "steps" or a.eval_steps == a.logging_steps,
              "eval_strategy is {!r}", "set that to 'steps'", of="eval_strategy"),
    Condition(("eval_delay",), lambda a: a.eval_strategy != "no",
              "eval_strategy is {!r}", "set that", of="eval_strategy"),
    Condition(("save_steps",), lambda a: a.save_strategy == "steps",
              "save_strategy is {!r}", "set that to 'steps'", of="save_strategy"),
    Condition(("save_total_limit", "save_only_model"),
              lambda a: a.save_strategy != "no" or getattr(a, "enable_jit_checkpoint", False),
              "save_strategy is {!r}", "set that", of="save_strategy"),
    # In this order, for transformers sets the later of them by the earlier.
    Condition(("load_best_model_at_end", "metric_for_best_model"),
              lambda a: a.eval_strategy != "no", "eval_strategy is {!r}", "set that",
              of="eval_strategy"),
    Condition(("greater_is_better",), lambda a: a.metric_for_best_model is not None,
              "no metric_for_best_model compares checkpoints", "set that"),
    Condition(("hub_strategy", "hub_always_push"), lambda a: a.push_to_hub,
              "push_to_hub is False", "set that"),
    Condition(("log_unique_prompts",), lambda a: a.log_completions,
              "log_completions is False", "set that"),
    Condition(("log_unique_prompts",), lambda a: not {"wandb", "trackio"}.isdisjoint(a.report_to),
              "only the tables of wandb and trackio leave repeated prompts out",
              "name one of them in report_to"),
    Condition(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
              lambda a: "trackio" in a.report_to, "report_to does not name trackio", "add it"),
    Condition(("optim_args",), lambda a: _deepspeed(a) or _text(a.optim) not in NO_OPTIM_ARGS,
              "the optimizer {!r} takes none", of="optim"),
    Condition(("optim_target_modules",),
              lambda a: _deepspeed(a) or _text(a.optim).startswith(("galore", "apollo")),
              "the optimizer {!r} works on all parameters", "choose one of GaLore or APOLLO",
              of="optim"),
    Condition(("warmup_steps",),
              lambda a: _deepspeed(a) or _text(a.lr_scheduler_type) not in _NO_WARMUP
              or _text(a.optim) in WARM_BY_THEMSELVES,
              "lr_scheduler_type {!r} has no warm-up", "choose constant_with_warmup or another one",
              of="lr_scheduler_type"),
    Condition(("lr_scheduler_kwargs",),
              lambda a: bool(arguments_of(a.lr_scheduler_type)),
              "lr_scheduler_type {!r} takes none", of="lr_scheduler_type"),
)  # fmt: skip
#: Settings that an optimizer, and a scheduler, given to the trainer has itself. The other ones of
#: optimizers are refused with the default optim already.
_OF_AN_OPTIMIZER = (
    "learning_rate", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
_OF_A_SCHEDULER = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps")
#: transformers' loop asks for these by `optim`, whoever made them.
_STEP_WITH_THE_LOSS = {"lomo", "adalomo"}
#: Settings of a teacher that is loaded into this process.
OF_LOADED_TEACHER = ("teacher_model_init_kwargs", "teacher_model_revision", "special_token_map")
#: Those that also say where the head of a served teacher is.
OF_SERVED_HEAD = {"teacher_model_init_kwargs", "teacher_model_revision"}


def check_effects(args: Any) -> None:
    """Raises ValueError for a setting of a `TrOPDConfig` that would have no effect."""
    for key in _given(args, WITHOUT_EFFECT.keys() | BELONGS_TO.keys()):
        if key in WITHOUT_EFFECT:
            raise ValueError(f"{key}: it would have no effect: {WITHOUT_EFFECT[key]}")
        owner, wanted = BELONGS_TO[key]
        if owner == "vllm_mode" and not args.use_vllm:
            owner, wanted = "use_vllm", True
        if getattr(args, owner) != wanted:
            raise ValueError(
                f"{key}: it has an effect with {owner} {wanted!r} alone, which is "
                f"{getattr(args, owner)!r}: set that, or leave {key} out"
            )
    if not args.loads_teacher:
        source = "precomputed_teacher" if args.precomputed_teacher else "teacher_model_server_url"
        unread = {*OF_LOADED_TEACHER}
        if args.precomputed_teacher:
            unread.add("teacher_model_name_or_path")
        elif sends_states(args.teacher_server_protocol):
            unread -= OF_SERVED_HEAD
        refuse(args, unread, f"with {source} no teacher is loaded")


def check_conditions(args: Any) -> None:
    """Raises ValueError for a setting of a `TrOPDConfig` without effect given the others."""
    for condition in CONDITIONS:
        if condition.acts(args):
            continue
        for key in _given(args, condition.keys):
            raise condition.error(key, args)
    if args.optim_args:
        _check_optim_args(args)
    if not _evaluates(args):  # eval_delay itself acts: too much
        reason = f"the run ends before eval_delay, {args.eval_delay!r}"
        raise no_effect(args, "eval_strategy", reason, "lower that")


def _evaluates(args: Any) -> bool:
    """Whether eval_delay ends within the run; True where the run's length in its unit, steps or
    epochs, is not known yet: `WholeCheckpoints` warns after such a run."""
    if args.eval_strategy == "steps":
        return args.max_steps <= 0 or args.eval_delay <= args.max_steps
    return args.max_steps > 0 or args.eval_delay <= args.num_train_epochs


def _check_optim_args(args: Any) -> None:
    """Raises ValueError for a part of optim_args that the optimizer never sees.

    transformers leaves out what it does not know of torch's optimizers. Those of other packages are
    not looked at: some want the model.
    """
    names = []
    given = args.optim_args if isinstance(args.optim_args, str) else ""
    for part in given.replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if not name or not value:
            raise ValueError(
                f"optim_args: expected name=value, separated by commas, got {args.optim_args!r}"
            )
        names.append(name)
    # Each group of parameters has its own, from the config.
    own = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    for name in own.keys() & names:
        raise no_effect(args, "optim_args", f"{name} is a key of its own", f"set {own[name]}")
    try:
        kind, passed = Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError):
        return
    if kind.__module__.startswith("torch."):
        for name in [name for name in names if name not in passed]:
            reason = f"transformers passes no {name!r} on to {kind.__name__}"
            raise no_effect(args, "optim_args", reason)


def check_inputs(args: Any, tools: Any, datasets: Mapping[str, Any], teacher_prompts: bool) -> None:
    """Raises ValueError for settings of tools, a chat template, a sampler or an evaluation that are
    not used.

    teacher_prompts: whether a teacher reads the column of that name where there is one.
    """
    if args.max_tool_calling_iterations is not None and not tools:
        key = "max_tool_calling_iterations"
        raise no_effect(args, key, "there are no tools", "give tools to TrOPDTrainer")
    if args.eval_on_start and datasets["eval_dataset"] is None:
        reason = "there is no eval_dataset"
        raise no_effect(args, "eval_on_start", reason, "give one to TrOPDTrainer")
    check_unsampled(args, datasets)
    text = [prompts_are_text(data, teacher_prompts) for _, data, _ in data_sets(datasets)]
    if args.chat_template_kwargs and text and all(text):
        reason = "the prompts are text, and no template is applied"
        raise no_effect(args, "chat_template_kwargs", reason, "write them as messages")


def check_unsampled(args: Any, datasets: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of a sampler where every completion is in the data."""
    columns = [present or () for _, _, present in data_sets(datasets)]
    if args.lmbda == 0 and columns and all(args.prefix_column in some for some in columns):
        refuse(args, _SAMPLING, f"with lmbda 0 completions are the texts in {args.prefix_column}")


def check_optimizers(args: Any, optimizers: tuple[Any, Any]) -> list[str]:
    """Raises ValueError for settings of which a given optimizer or scheduler has its own, and for
    a scheduler of another optimizer. Those of the recipe are printed instead, and returned."""
    optimizer, scheduler = optimizers
    scheduled = getattr(scheduler, "optimizer", optimizer)
    if scheduler is not None and (optimizer is None or scheduled is not optimizer):
        other = "none is given" if optimizer is None else "another one is given"
        raise ValueError(
            f"optimizers: the {type(scheduler).__name__} would have no effect: it schedules an "
            f"optimizer of its own, and {other}: give that optimizer with it, or None for both"
        )
    if _deepspeed(args):  # its config takes them from here, and has to agree with them
        return []
    unused = []
    for what, given, keys in (
        ("optimizer", optimizer, _OF_AN_OPTIMIZER), ("scheduler", scheduler, _OF_A_SCHEDULER),
    ):  # fmt: skip
        for key in _given(args, keys) if given is not None else ():
            if key == "optim" and _text(args.optim) in _STEP_WITH_THE_LOSS:
                continue
            if sets(args, key):
                unused.append(key)
                continue
            reason = f"the {what} given to the trainer, a {type(given).__name__}, decides"
            raise no_effect(args, key, reason, "set it there")
    if unused and args.process_index == 0:
        print(describe(args, unused))
    return unused


def _given(args: Any, keys: Collection[str]) -> Iterator[str]:
    """The keys that are not at their default."""
    for field in fields(args):
        value = getattr(args, field.name)
        default = field.default if field.default is not MISSING else None
        # Other forms of the default: a factory's, and those that transformers sets.
        if field.name in keys and value != default and value not in (None, [], {}, "no"):
            yield field.name
