"""Settings of transformers and TRL that would change nothing here, each with what to do instead."""

from dataclasses import MISSING, fields
from typing import Any

_NO_METRICS = "the trainer takes no compute_metrics and keeps no predictions: leave it out"
_ONE_SAMPLER = "rows come in TRL's own order: leave it out, or set shuffle_dataset"
#: Settings that nothing here looks at.
WITHOUT_EFFECT = {
    "label_smoothing_factor": "the loss compares distributions and smooths no labels: leave it out",
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
}
#: Settings that belong to another one, and what that has to be.
BELONGS_TO = {
    "liger_kernel_config": ("use_liger_kernel", True),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", True),
    "num_completions_to_print": ("log_completions", True),
    "log_unique_prompts": ("log_completions", True),
    "vllm_mode": ("use_vllm", True),
    "vllm_model_impl": ("use_vllm", True),
    "vllm_enable_sleep_mode": ("use_vllm", True),
    "vllm_structured_outputs_regex": ("use_vllm", True),
    "vllm_server_base_url": ("vllm_mode", "server"),
    "vllm_server_host": ("vllm_mode", "server"),
    "vllm_server_port": ("vllm_mode", "server"),
    "vllm_server_timeout": ("vllm_mode", "server"),
    "vllm_group_port": ("vllm_mode", "server"),
    "vllm_gpu_memory_utilization": ("vllm_mode", "colocate"),
    "vllm_max_model_length": ("vllm_mode", "colocate"),
    "vllm_tensor_parallel_size": ("vllm_mode", "colocate"),
}
#: Settings of a teacher that is loaded into this process.
_OF_LOADED_TEACHER = ("teacher_model_init_kwargs", "teacher_model_revision")


def check_effects(args: Any) -> None:
    """Raises ValueError for a setting that is not at its default and would change nothing.

    args: a `TrOPDConfig`, after transformers has settled its fields.
    """
    for field in fields(args):
        if field.name not in WITHOUT_EFFECT.keys() | BELONGS_TO.keys():
            continue
        key, value = field.name, getattr(args, field.name)
        default = field.default if field.default is not MISSING else None
        # Some forms of the default: a factory's, and what transformers settles on.
        if value == default or value in (None, [], "no"):
            continue
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
        also = ("teacher_model_name_or_path",) if args.precomputed_teacher else ()
        for key in (*_OF_LOADED_TEACHER, *also):
            if getattr(args, key) is not None:
                raise ValueError(
                    f"{key}: with {source} no teacher is loaded, and it would have no effect: "
                    f"leave {key} out"
                )
