"""Checks of the values of `TrOPDConfig`, and of their combinations.

Each raises ValueError that begins with the key. Some store the value in the form that is read.
"""

from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ..arguments import check_sampling
from ..objectives import TokenRule
from ..objectives.registry import check_knobs, check_objective, check_required, rewarded
from ..objectives.rule_checks import SCORES
from .best_model import set_mode
from .credentials import check_address
from .effects import check_effects, refuse
from .generation_keys import check_generation_keys
from .prefix import SCHEDULES, shrinking_steps
from .protocols import PROTOCOLS, VLLMHiddenStates, sends_states
from .sampling import settings
from .schedules import check_schedule
from .signals import check_served
from .special_tokens import check_map
from .value_checks import at_least, check_type, sampling_value, within
from .vllm_keys import check_vllm_keys

#: A TrOPDConfig, whose file imports this one.
Config = Any
#: The paper's `prefix_weight`.
PREFIX_WEIGHT = 0.001
#: The fields that select tokens, named as in `TokenRule`.
SELECTION = "select_by", "select_fraction", "select_threshold"


def check_trainer(config: Config) -> None:
    """Refuses settings that TRL's trainer accepts, but ignores or handles wrongly."""
    if config.generation_kwargs is not None:
        _check_generation(config, dict(config.generation_kwargs))  # type: ignore[arg-type]
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: after running out of memory the trainer would go on in the "
            "middle of a generation batch of the old size, and skip rows: set "
            "per_device_train_batch_size, with gradient_accumulation_steps, instead"
        )
    launched = getattr(config, "mixed_precision", "no") == "fp16" and not config.fp16
    if launched and config.device.type == "cpu":
        raise ValueError(
            "ACCELERATE_MIXED_PRECISION: fp16 would have no effect: on a CPU accelerate leaves the "
            "weights' own dtype: unset it, or launch with bf16 (mixed_precision)"
        )
    if config.use_liger_kernel and config.device.type == "cpu":
        raise ValueError(
            "use_liger_kernel: Liger's layers are Triton kernels, which need a GPU, and this run "
            "is on a CPU: leave it out"
        )
    if config.vllm_mode not in ("server", "colocate"):
        raise ValueError(f"vllm_mode: must be server or colocate, got {config.vllm_mode!r}")
    check_effects(config)
    set_mode(config)
    check_schedule(config)
    if config.router_aux_loss_coef is not None:
        within("router_aux_loss_coef", config.router_aux_loss_coef, 0.0, 1e9)


#: Bounds of transformers' own keys, beyond which most do nothing and some fail at the first step.
_GENERATION_BOUNDS: dict[str, tuple[type, float, float]] = {
    "typical_p": (float, 1e-9, 1.0), "top_h": (float, 1e-9, 1.0),
    "epsilon_cutoff": (float, 0.0, 1.0), "eta_cutoff": (float, 0.0, 1.0),
    "encoder_repetition_penalty": (float, 1e-9, 1e9), "length_penalty": (float, -1e9, 1e9),
    "num_beams": (int, 1, 1e9), "no_repeat_ngram_size": (int, 0, 1e9),
    "encoder_no_repeat_ngram_size": (int, 0, 1e9), "min_new_tokens": (int, 0, 1e9),
    "prefill_chunk_size": (int, 1, 1e9), "prompt_lookup_num_tokens": (int, 1, 1e9),
    "max_matching_ngram_size": (int, 1, 1e9), "max_cache_len": (int, 1, 1e9),
    "guidance_scale": (float, -1e9, 1e9),
    **dict.fromkeys(("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits"),
                    (bool, 0, 1)),
}  # fmt: skip


def _check_generation(config: Config, given: dict[str, Any]) -> None:
    check_generation_keys(given, config.use_vllm)
    for name in () if config.use_vllm else given.keys() & _GENERATION_BOUNDS.keys():
        kind, low, high = _GENERATION_BOUNDS[name]
        if given[name] is not None:
            check_type(f"generation_kwargs: {name}", given[name], [kind])
            within(f"generation_kwargs: {name}", given[name], low, high)
    for name in given.keys() & {"suppress_tokens", "begin_suppress_tokens"}:
        if not isinstance(given[name], (Sequence, type(None))) or isinstance(given[name], str):
            raise ValueError(
                f"generation_kwargs: {name}: expected a list of ids, got {given[name]!r:.80}"
            )
    hints = get_type_hints(type(config))
    if given.get("top_k", 0) is None or (config.use_vllm and given.get("top_k") == -1):
        given["top_k"] = 0  # of None transformers makes its default, 50
    for name in given.keys() & {"temperature", "repetition_penalty", "top_k", "top_p", "min_p"}:
        key = f"generation_kwargs: {name}"
        check_type(key, given[name], [*(get_args(hints[name]) or [hints[name]]), type(None)])
        given[name] = sampling_value(name, key, given[name])
    if config.use_vllm:
        check_vllm_keys(given, config.vllm_mode)
    config.generation_kwargs = given


def check_objective_keys(config: Config) -> None:
    if not isinstance(config.objective, str):
        _check_own_rule(config)
        return
    check_objective(config.objective)
    arguments: Any = config.objective_kwargs or {}
    for own in ("beta", "prefix_weight"):
        if own in arguments:
            raise ValueError(f"objective_kwargs: {own!r} is a key of its own: set {own} itself")
    check_knobs(config.objective, arguments, "objective_kwargs")
    check_required(config.objective, arguments, "objective_kwargs")
    if config.beta is not None:
        check_knobs(config.objective, ["beta"], "beta")
    if config.prefix_weight != PREFIX_WEIGHT:
        check_knobs(config.objective, ["prefix_weight"], "prefix_weight")
    if config.stage_fraction is not None:
        check_knobs(config.objective, ["stage"], "stage_fraction")
        within("stage_fraction", config.stage_fraction, 0.0, 1.0)
        if "stage" in arguments:
            raise ValueError(
                f"stage_fraction: objective_kwargs holds the run at stage {arguments['stage']}"
                ": give one of the two"
            )
    if config.task_weight is not None and config.objective not in rewarded():
        raise ValueError(
            f"task_weight: it would have no effect: objective {config.objective!r} has no policy "
            f"gradient, which rewards enter: take one of {', '.join(rewarded())}, or leave "
            "task_weight out"
        )
    try:
        config.rule_of_all(progress=0.0)
        config.rule_of_all(progress=1.0)
    except (TypeError, ValueError) as error:
        weighs = config.task_weight is not None and str(error).startswith("task_weight")
        key = "task_weight" if weighs else "objective_kwargs"
        raise ValueError(f"{key}: {config.objective}: {error}") from error
    rules = config.rules_of_all()
    reads_level = any(rule.gate == "threshold" or rule.outlier == "clip" for rule in rules)
    for key in arguments:
        why = None
        if key.startswith("clip_ratio") and config.num_iterations == 1:
            why = "num_iterations 1 every ratio is 1: set num_iterations to 2 or more"
        elif key == "entropy_quantile" and arguments.get("stage") == 1:
            why = "stage 1 nothing is ranked by entropy: set stage to 2, or leave stage out"
        elif key == "threshold" and not (reads_level or config.kl_discount_factor):
            why = (
                f"gate {rules[0].gate!r} and outlier {rules[0].outlier!r} nothing has a level or a "
                "floor: choose gate 'threshold' or outlier 'clip', or set kl_discount_factor"
            )
        if why is not None and arguments[key] is not None:
            raise ValueError(
                f"objective_kwargs: {key}: it would have no effect: with {why}; or leave {key} out"
            )


def _check_own_rule(config: Config) -> None:
    """Refuses knobs of named objectives beside a rule of one's own, which has them as fields."""
    for key, instead in (
        ("objective_kwargs", "the rule has its knobs as fields"),
        ("beta", "the rule has it as divergence_parameter"),
        ("prefix_weight", "the rule has a prefix_weight"),
        ("task_weight", "the rule has a task_weight"),
        ("stage_fraction", "a function of progress, as objective, can change the rule"),
    ):
        refuse(config, (key,), f"the objective is a rule of one's own: {instead}")


def check_rewards(config: Config) -> None:
    """Checks of a verifier's rewards, as far as they are known without the reward functions."""
    if config.scale_rewards not in ("group", "batch", "none"):
        raise ValueError(
            f"scale_rewards: must be one of group, batch, none; got {config.scale_rewards!r}"
        )
    weights = config.reward_weights
    if weights is not None:
        if not isinstance(weights, (list, tuple)):
            raise ValueError(f"reward_weights: expected a list of numbers, got {weights!r:.80}")
        for weight in weights:
            check_type("reward_weights", weight, [float])
            within("reward_weights", weight, -1e9, 1e9)
    rules = [rule for rule in config.rules() if rule.uses_task_advantages]
    if not rules:
        return
    key = "objective" if config.task_weight is None else "task_weight"
    alone = None
    if config.precomputed_teacher:
        alone = "precomputed_teacher nothing is generated"
    elif not config.use_vllm and not (config.generation_kwargs or {}).get("do_sample", True):
        alone = "do_sample False in generation_kwargs these are all the same"
    else:
        for name, one in (("top_k", 1), ("top_p", 0), ("min_p", 1)):
            if settings(config)[name] == one:
                alone = f"{name} {settings(config)[name]} these are all the same"
    if alone is not None:
        raise ValueError(
            f"{key}: a verifier's advantages are relative to the other completions of a prompt, "
            f"and with {alone}: leave one of the two out"
        )
    if config.lmbda == 0 and all(rule.prefix_weight is not None for rule in rules):
        raise ValueError(
            f"{key}: a verifier's rewards would have no effect: with lmbda 0 every token is the "
            "teacher's, whose loss is weighed by prefix_weight and reads none: raise lmbda, or "
            + ("leave task_weight out" if key == "task_weight" else "take another objective")
        )
    if config.num_generations == 1:
        raise ValueError(
            "num_generations: a verifier's advantages are relative to the other completions of a "
            "prompt, and there is only one: set num_generations to 2 or more"
        )


def check_selection(config: Config) -> None:
    given = {name: getattr(config, name) for name in SELECTION}
    rules = config.rules_of_all()
    selects = any(r.select_by is not None or r.entropy_top_fraction is not None for r in rules)
    for key in [name for name in SELECTION if given[name] is not None] if selects else ():
        raise ValueError(
            f"{key}: objective {config.objective!r} selects tokens itself: "
            f"leave {', '.join(SELECTION)} out, or take another objective"
        )
    if config.select_by == "scores":
        raise ValueError(
            "select_by: 'scores' reads scores= in every call, which no config holds: choose one of "
            f"{', '.join(repr(score) for score in SCORES if score != 'scores')}, or call "
            "linear_distillation_loss in a training loop of your own"
        )
    try:
        TokenRule(**given)
    except ValueError as error:
        named = SELECTION if config.select_by else [n for n in SELECTION if given[n] is not None]
        key = next((name for name in named if str(error).startswith(name)), named[0])
        raise ValueError(f"{key}: {error}") from error
    if config.select_by is None:
        return
    if config.lmbda == 0 and all(rule.prefix_weight is not None for rule in rules):
        raise ValueError(
            "select_by: it would have no effect: with lmbda 0 every token is the teacher's, and "
            "prefix_weight keeps those from the ranks: raise lmbda, or leave "
            f"{', '.join(SELECTION)} out"
        )


def check_prefix(config: Config) -> None:
    if config.prefix_schedule not in SCHEDULES:
        raise ValueError(
            f"prefix_schedule: must be one of {', '.join(SCHEDULES)}; got "
            f"{config.prefix_schedule!r}"
        )
    at_least("prefix_length", config.prefix_length, 0)
    if config.prefix_relative and (config.prefix_length or config.prefix_schedule == "none"):
        raise ValueError(
            f"prefix_relative: the prefix is the whole answer at first, and the schedule's share "
            f"of it later, but prefix_schedule is {config.prefix_schedule!r} and prefix_length "
            f"{config.prefix_length}: choose a schedule, and leave prefix_length out"
        )
    given = config.prefix_relative or config.prefix_length > 0
    if (config.prefix_schedule != "none") != given:
        raise ValueError(
            f"prefix_length: {config.prefix_length} with prefix_schedule "
            f"{config.prefix_schedule!r}: give both, or neither; or prefix_relative with a schedule"
        )
    if given and config.lmbda == 0:
        key = "prefix_relative" if config.prefix_relative else "prefix_length"
        raise ValueError(
            f"{key}: it would have no effect: with lmbda 0 every completion is a whole answer: "
            f"raise lmbda, or leave {key} and prefix_schedule out"
        )
    if config.prefix_length > config.max_completion_length:
        raise ValueError(
            f"prefix_length: {config.prefix_length} is more than max_completion_length "
            f"{config.max_completion_length}"
        )
    within("prefix_fraction", config.prefix_fraction, 0.0, 1.0)
    if config.prefix_steps is not None:
        at_least("prefix_steps", config.prefix_steps, 1)
    if config.max_steps > 0 or config.prefix_fraction == 0:
        shrinking_steps(config, config.max_steps)
    if config.max_workspace_bytes is not None:
        at_least("max_workspace_bytes", config.max_workspace_bytes, 1)


def check_generations(config: Config) -> None:
    at_least("num_generations", config.num_generations, 1)
    if getattr(config.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "accelerator_config: with dispatch_batches the first process sends its batches to the "
            "others, which takes tensors, and rows are text until they are generated from: leave "
            "it out"
        )
    if getattr(config.accelerator_config, "split_batches", None):
        raise ValueError(
            "accelerator_config: with split_batches the processes would share out what each "
            "already has for itself, and train on some prompts twice and on others never: leave it "
            "out"
        )
    if not getattr(config.accelerator_config, "even_batches", True):
        raise ValueError(
            "accelerator_config: without even_batches processes would have different numbers of "
            "rows at an evaluation's end, and fail, or wait for each other for ever; rows that are "
            "repeated there count once in any case: leave it out"
        )
    if "num_steps" in (
        getattr(config.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    ):
        raise ValueError(
            "accelerator_config: num_steps in gradient_accumulation_kwargs is read only once the "
            "models are loaded: set gradient_accumulation_steps instead"
        )
    each = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch = each * config.world_size
    if batch % config.num_generations:
        raise ValueError(
            f"num_generations: {config.num_generations} completions of a prompt do not divide the "
            f"{batch} of an optimizer step (per_device_train_batch_size "
            f"{config.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} x {config.world_size} processes): set one of "
            f"them so that the product is a multiple of {config.num_generations}"
        )


def check_sample(config: Config) -> None:
    try:
        check_sampling(
            config.gradient_tolerance, config.gradient_sampling, "mean", config.backend, config.seed
        )
    except (NotImplementedError, ValueError) as error:
        named = str(error).startswith("gradient_tolerance")
        one = config.gradient_sampling is None
        key = "gradient_tolerance" if named or one else "gradient_sampling"
        raise ValueError(f"{key}: {str(error).removeprefix(f'{key} ')}") from error


#: With which a served teacher gives whole distributions.
_WHOLE = f"teacher_server_protocol {VLLMHiddenStates.name!r}"


def check_teacher(config: Config) -> None:
    source = "teacher_model_server_url" if config.teacher_model_server_url else None
    if config.precomputed_teacher:
        if source:
            raise ValueError(f"precomputed_teacher: goes without {source}: give one of them")
        source = "precomputed_teacher"
        if config.is_guided:
            length = "prefix_relative" if config.prefix_relative else "prefix_length"
            key = "lmbda" if config.prefix_schedule == "none" else length
            raise ValueError(
                f"{key}: with precomputed_teacher the completions are those of the data set; "
                f"leave {key} out"
            )
    states = sends_states(config.teacher_server_protocol)
    if source and not states:
        try:
            what = f"{source}: objective {config.objective!r}"
            for rule in config.rules_of_all():
                check_served(rule)
            what = f"select_by: with {source}"
            for rule in config.rules():
                check_served(rule)
        except ValueError as error:
            remedy = "" if config.precomputed_teacher else f", or by {_WHOLE} a served one"
            raise ValueError(
                f"{what}: {error}. A HiddenTeacher is a teacher_model that is loaded in this "
                f"process{remedy}"
            ) from error
    url = config.teacher_model_server_url
    if url is not None:
        check_address("teacher_model_server_url", url)
    if url and not states and config.temperature != 1:
        raise ValueError(
            "temperature: a server of log-probs gives those at temperature 1, not "
            f"{config.temperature}: set temperature 1, or {_WHOLE}, or load the teacher in this "
            "process"
        )
    if config.special_token_map is not None:
        check_map(config.special_token_map)
    if config.teacher_update_rate is not None:
        within("teacher_update_rate", config.teacher_update_rate, 1e-9, 1.0)
    at_least("teacher_sync_steps", config.teacher_sync_steps, 1)
    at_least("teacher_server_retries", config.teacher_server_retries, 0)
    at_least("teacher_server_concurrency", config.teacher_server_concurrency, 1)
    within("teacher_server_timeout", config.teacher_server_timeout, 1e-3, 1e9)
    protocol = config.teacher_server_protocol
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(
            f"teacher_server_protocol: must be one of {', '.join(PROTOCOLS)}, or left out; got "
            f"{protocol!r}"
        )


def check_credit(config: Config) -> None:
    within("lmbda", config.lmbda, 0.0, 1.0)
    at_least("num_iterations", config.num_iterations, 1)
    at_least("drift_block_size", config.drift_block_size, 1)
    if config.drift_tau is not None:
        within("drift_tau", config.drift_tau, 1e-6, 1e6)
        if config.num_iterations == 1:
            raise ValueError(
                "drift_tau: with num_iterations 1 the policy that learns is the one that "
                "sampled, so every gate is 1: set num_iterations to 2 or more"
            )
    within("kl_discount_factor", config.kl_discount_factor, 0.0, 1.0)
    rules = config.rules()
    if config.kl_discount_factor and not any(rule.policy_gradient for rule in rules):
        raise ValueError(
            f"kl_discount_factor: objective {config.objective!r} has no K1 reward to discount; "
            f"{', '.join(rewarded())} have"
        )
    if config.importance_gamma is not None:
        within("importance_gamma", config.importance_gamma, 0.0, 1e6)
        if not config.uses_teacher:
            raise ValueError(
                f"importance_gamma: objective {config.objective!r} asks no teacher, so there is "
                "no discrepancy to weigh tokens by"
            )
