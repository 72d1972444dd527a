"""`TrOPDConfig`: TRL's `DistillationConfig` with an objective, guidance prefixes and credit.

Everything that TRL already spells keeps its spelling (`temperature`, `max_completion_length`,
`beta`, `use_vllm`, `log_completions`, ...), and so does everything of transformers' beneath it.
What is wrong raises here, with the key's name, before any model is loaded.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import EnumMeta
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from trl import DistillationConfig  # type: ignore[attr-defined]

from ..arguments import check_selection
from ..backends import choose_backend
from ..objectives import TokenRule
from ..objectives.registry import (
    OBJECTIVES,
    build_rule,
    check_knobs,
    check_objective,
    knobs,
    names_unknown_keys,
)
from ..once import parse_json
from .credentials import check_address, hidden, shown
from .effects import check_conditions, check_effects
from .generation_keys import check_generation_keys
from .loaded_teacher import check_quantization, dtype_option
from .prefix import SCHEDULES
from .signals import check_served
from .sources import check_revisions

PREFIX_WEIGHT = 0.001
STAGE_FRACTION = 0.5
#: How a mapping is given on the command line.
_AS_JSON = {
    "objective_kwargs": '{"top_k": 4}',
    "generation_kwargs": '{"top_p": 0.9}',
    "model_init_kwargs": '{"dtype": "bfloat16"}',
    "teacher_model_init_kwargs": '{"dtype": "bfloat16"}',
}
_JSON = '{"name": value}'
#: What a field of these types takes, and its name in errors.
_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    type(None): (type(None), ""),
}


@names_unknown_keys
@dataclass
class TrOPDConfig(DistillationConfig):
    """Settings of `TrOPDTrainer`. Those of `DistillationConfig` and `TrainingArguments` besides.

    objective: "tropd" (default), "opd", "gkd", "eopd", "entropy_opd", "reopold", "clip_outlier",
        "mask_outlier", "aopd", "mopd", "topk_jsd", "sft", or a divergence: "forward_kl",
        "reverse_kl", "jeffreys", "jsd", "skew_forward", "skew_reverse", "alpha", "chi2",
        "total_variation", "todi", "akl". `tropd_kernels.objectives` says what each is and where
        from. Quantiles and means over "the batch" (entropy_opd, reopold) are over a micro-batch.
    objective_kwargs: knobs of the objective: the arguments of its constructor, with the papers'
        defaults. tropd: gate "bernoulli", outlier "forward_kl", top_k 64, top_k_tail "raw",
        threshold -1.386. opd: kl_penalty_coef 1. eopd: entropy_threshold 0.8 nats, top_k 16,
        clip_ratio 0.2. entropy_opd: top_fraction 0.2. reopold: mixing 0.2, entropy_quantile 0.8.
        clip_outlier, mask_outlier: threshold -1.386. aopd, mopd, topk_jsd: top_k 64. skew_*:
        alpha 0.1. akl: head_mass 0.5. A `top_k` here is the teacher's; the field `top_k` samples.
    teacher_model_revision: of a teacher by name. Of a teacher given as a model, the revision at
        which its tokenizer is looked up on this machine, to be compared with the student's.
    beta: of gkd, jsd and topk_jsd: 0 is the forward KL, 1 the reverse KL. None takes 0.5, GKD's.
    stage_fraction: of reopold: share of training after which its second stage begins. None takes
        0.5, this library's choice; the paper does not fix it.
    prefix_schedule: how the teacher's prefix shrinks: "none" (no guidance, the default), "cosine"
        (the paper's), "linear", or "constant" (never).
    prefix_length: l at the first step, in tokens.
    prefix_fraction: share of training over which l falls to 0; the paper's 1.
    prefix_steps: the same in optimiser steps, in the place of prefix_fraction.
    prefix_weight: weight of the K1 forward KL on the prefix, the paper's 0.001. Objectives without
        that term treat a prefix like any other token, and refuse another value.
    prefix_column: column with the teacher's answer: text, or messages for a conversational prompt.
        A data set without it has the teacher write the prefix.
    lmbda: GKD's share of on-policy steps (default 1: all). In the others the completions are the
        teacher's whole answers, from prefix_column or written on the spot. Objective "sft" trains
        on the teacher's text with lmbda 0. To an objective with a prefix term those answers are one
        long prefix, of prefix_weight. A text that reaches max_completion_length gets no end; one
        that the teacher ended by a token that is no end of the student's gets the student's after
        it. An evaluation is on the student's own completions, but with lmbda 0 on prefix_column,
        where its rows have that.
    teacher_model_server_url: a teacher behind HTTP that speaks vLLM's completions protocol
        (`server.py`), instead of one in this process: for objectives of K1 and the teacher's top-k,
        at temperature 1. `teacher_model_name_or_path` is then the served name, if the server has
        several. Its tokenizer is checked where the server offers /tokenize, its log-probs by a
        first request before a model is loaded, and each prompt against the context that it states:
        it needs room for prompt, max_completion_length and one token. Text that it writes
        (prefixes, lmbda below 1) is sampled by temperature, top_p, top_k, min_p and
        repetition_penalty; generation_kwargs are not sent. eopd's threshold is compared with a
        lower bound of the teacher's entropy, which is what a top-k gives.
    teacher_server_timeout: seconds that one attempt of a request may take, from connecting to the
        last byte of the answer.
    teacher_server_retries: attempts after the first, of a request that fails in transport, in time,
        or by HTTP 408, 429, 500 or 502 to 504: at once, then after 1 s, 2 s, 4 s, ... 120 s. A
        Retry-After is not heeded.
    teacher_server_concurrency: requests at once.
    precomputed_teacher: the data set's columns hold fixed completions, `completion_ids` (C), and
        the teacher's log-probs of them, `teacher_label_log_probs` (C), and for objectives that use
        the top-k `teacher_ids` and `teacher_log_probs` (C, K), at this temperature. No teacher is
        loaded and nothing is generated.
    top_k, top_p, min_p, repetition_penalty, generation_kwargs: TRL's. Other values than the
        defaults sample from another distribution than the student's, so that the K1 term of an
        objective has a biased gradient: the trainer warns, and logs the mass that is kept as
        `tropd/sampling_mass`. Objectives without K1 compare whole distributions all the same.
    num_iterations: optimiser steps on each generation batch, as in GRPO (default 1). From the
        second on the ratio to the policy that sampled takes part: PPO's clip, `drift_tau`. A run
        resumed between them goes on with its batch, and so with the same micro-batches.
    drift_tau: blockwise policy-drift gates: blocks of drift_block_size tokens on which the policy
        has moved by s nats a token since sampling weigh exp(-drift_tau |s|), relative to their mean
        over the micro-batch. None (default): no gates.
    drift_block_size: tokens of such a block.
    kl_discount_factor: replaces the K1 reward by its discounted sum to the end of the completion;
        0 (default) leaves the immediate reward, 1 is the plain sum. A token to which the teacher
        gives probability 0 counts as the rule's `threshold` in it, and stays outside the gate; an
        objective without a gate has an infinite loss there, and the run stops.
    importance_gamma: IW-OPD's gamma (the paper's 0.5): early tokens weigh up to 1 + gamma. None
        (default) weighs all alike.
    router_aux_loss_coef: weight of a mixture-of-experts student's load-balancing loss, over prompts
        and completions, as in TRL's GRPO; logged as aux_loss. None (default) takes the model's own,
        0 trains without.
    backend: "triton", "native", "torch" or "reference"; None takes the best one here.
    max_workspace_bytes: bound on the loss's temporaries; see `plan_chunks`.
    gradient_tolerance, gradient_sampling: make the head's and the hidden states' gradients from a
        sample of the vocabulary's ids, without bias; see `linear_distillation_loss`. 0 and None
        (default): from all.
    disable_dropout: switches dropout off however the student does it, also in its config, with
        which it is saved.
    rich_progress: rich's progress display in place of tqdm's; None (default): at a terminal. Each
        log is a line in either.
    log_regions: with each log, shows a few completions with their tokens coloured by region
        (trusted, outlier, prefix) in the terminal and in `output_dir`/regions.

    Not taken: `auto_find_batch_size`, `torch_compile`, settings without effect here (`effects.py`),
    and in `generation_kwargs` the lengths, numbers and ends of completions. Raises ValueError that
    begins with the key.
    """

    _VALID_DICT_FIELDS = DistillationConfig._VALID_DICT_FIELDS + ["objective_kwargs"]

    objective: str = "tropd"
    objective_kwargs: dict | str | None = None
    beta: float | None = None
    stage_fraction: float | None = None
    prefix_schedule: str = "none"
    prefix_length: int = 0
    prefix_fraction: float = 1.0
    prefix_steps: int | None = None
    prefix_weight: float | None = PREFIX_WEIGHT
    prefix_column: str | None = "teacher_completion"
    lmbda: float = 1.0
    teacher_model_server_url: str | None = None
    teacher_server_timeout: float = 600.0
    teacher_server_retries: int = 9
    teacher_server_concurrency: int = 8
    precomputed_teacher: bool = False
    num_iterations: int = 1
    drift_tau: float | None = None
    drift_block_size: int = 64
    kl_discount_factor: float = 0.0
    importance_gamma: float | None = None
    router_aux_loss_coef: float | None = None
    backend: str | None = None
    max_workspace_bytes: int | None = None
    gradient_tolerance: float = 0.0
    gradient_sampling: float | None = None
    rich_progress: bool | None = None
    log_regions: bool = False

    def __post_init__(self):
        if isinstance(self.teacher_model_name_or_path, os.PathLike):
            self.teacher_model_name_or_path = os.fspath(self.teacher_model_name_or_path)
        self._check_types()
        self._check_numbers()
        self._check_json()
        # TRL checks beta as a number. None stays in the field, so that a copy of the config made
        # with another objective does not carry a beta that nobody gave.
        given, self.beta = self.beta, 1.0 if self.beta is None else self.beta
        super().__post_init__()
        self.beta = given
        self._check_mappings()
        self._check_trainer()
        self._check_objective()
        self._check_prefix()
        self._check_credit()
        self._check_teacher()
        try:
            choose_backend(self.backend, self.device)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"backend: {error}") from error
        self._check_sample()
        check_conditions(self)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which hides the hub's tokens, but not those of a model's arguments."""
        return hidden(super().to_dict())

    def __repr__(self) -> str:
        given = hidden({field.name: getattr(self, field.name) for field in fields(self)})
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    __str__ = __repr__

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__repr__" not in vars(cls):  # a dataclass would be given one that shows secrets
            cls.__repr__ = TrOPDConfig.__repr__  # type: ignore[method-assign]

    def rule(self, progress: float = 0.0) -> TokenRule:
        """The objective at this share of training, 0 to 1; only reopold's depends on it."""
        arguments: dict[str, Any] = dict(self.objective_kwargs or {})  # type: ignore[arg-type]
        takes = knobs(self.objective)
        if self.beta is not None:
            arguments["beta"] = self.beta
        if "prefix_weight" in takes:
            arguments["prefix_weight"] = self.prefix_weight
        if self.objective == "reopold" and "stage" not in arguments:
            switch = STAGE_FRACTION if self.stage_fraction is None else self.stage_fraction
            arguments["stage"] = 1 if progress < switch else 2
        return build_rule(self.objective, arguments)

    @property
    def loads_teacher(self) -> bool:
        """Whether a teacher's model is to be loaded into this process."""
        return not (self.teacher_model_server_url or self.precomputed_teacher)

    def _check_types(self) -> None:
        """What would otherwise fail elsewhere, without its key, or pass for another value."""
        hints, own = get_type_hints(TrOPDConfig), TrOPDConfig.__annotations__
        for key in [field.name for field in fields(TrOPDConfig)]:
            kinds = get_args(hints[key]) or (hints[key],)
            if isinstance(kinds[0], EnumMeta):
                self._check_choice(key, kinds[0])
            # Of text TRL and transformers take more than their annotations say.
            elif set(kinds) <= _TYPES.keys() and (key in own or str not in kinds):
                _check_type(key, getattr(self, key), kinds)

    def _check_choice(self, key: str, choices: Any) -> None:
        if getattr(self, key) is False:  # what YAML reads in a bare no
            setattr(self, key, "no")
        try:
            choices(getattr(self, key))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def _check_numbers(self) -> None:
        """Those of TRL and transformers that would otherwise fail inside them, namelessly."""
        for key in ("gradient_accumulation_steps", "per_device_train_batch_size",
                    "per_device_eval_batch_size"):  # fmt: skip
            _at_least(key, getattr(self, key), 1)
        _within("learning_rate", self.learning_rate, 0.0, 1e9)
        for key in ("temperature", "repetition_penalty", "top_k", "top_p", "min_p"):
            setattr(self, key, _sampling(key, key, getattr(self, key)))
        multiple: Any = self.pad_to_multiple_of  # text, from the command line
        if not (multiple in (None, "auto") or str(multiple).lower() in ("none", "null")):
            if not str(multiple).isdecimal() or int(multiple) < 1:
                raise ValueError(
                    "pad_to_multiple_of: must be a whole number of at least 1, 'auto' or None, got "
                    f"{multiple!r}"
                )
        limit = self.max_completion_length
        if limit is None or limit < 1:
            raise ValueError(f"max_completion_length: must be at least 1 token, got {limit!r}")

    def _check_json(self) -> None:
        """transformers parses mappings given as text, and names no key."""
        for key in self._VALID_DICT_FIELDS:
            value = getattr(self, key)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    parse_json(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{key}: {shown(value)} is no JSON: {error}") from error
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from error

    def _check_mappings(self) -> None:
        """Once transformers has parsed them: text that is left is no mapping."""
        for key in [field.name for field in fields(TrOPDConfig)]:
            value = getattr(self, key)
            if key.endswith("_kwargs") and not isinstance(value, (dict, type(None))):
                raise ValueError(
                    f"{key}: expected a mapping, got {shown(value)}: as a flag it is JSON, such as "
                    f"--{key} '{_AS_JSON.get(key, _JSON)}'"
                )
        for key in ("model_init_kwargs", "teacher_model_init_kwargs"):
            if (options := getattr(self, key)) is not None:
                check_quantization(
                    f"{key}: quantization_config", options.get("quantization_config")
                )
                setattr(self, key, dtype_option(key, options))
        check_revisions(self)

    def _check_trainer(self) -> None:
        """What TRL's trainer takes and then does without, or does wrong."""
        if self.generation_kwargs is not None:
            self._check_generation(dict(self.generation_kwargs))  # type: ignore[arg-type]
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size: after running out of memory the trainer would go on in the "
                "middle of a generation batch of the old size, and skip rows: set "
                "per_device_train_batch_size, with gradient_accumulation_steps, instead"
            )
        if self.torch_compile:
            raise ValueError(
                "torch_compile: it would compile nothing: the loss reaches the models below the "
                "wrapper that compiles: leave out the keys that begin with torch_compile"
            )

        if self.vllm_mode not in ("server", "colocate"):
            raise ValueError(f"vllm_mode: must be server or colocate, got {self.vllm_mode!r}")
        check_effects(self)
        if self.router_aux_loss_coef is not None:
            _within("router_aux_loss_coef", self.router_aux_loss_coef, 0.0, 1e9)

    def _check_generation(self, given: dict[str, Any]) -> None:
        check_generation_keys(given, self.use_vllm)
        hints = get_type_hints(TrOPDConfig)
        if given.get("top_k", 0) is None or (self.use_vllm and given.get("top_k") == -1):
            given["top_k"] = 0  # of None transformers makes its default, 50
        for name in given.keys() & {"temperature", "repetition_penalty", "top_k", "top_p", "min_p"}:
            key = f"generation_kwargs: {name}"
            _check_type(key, given[name], [*(get_args(hints[name]) or [hints[name]]), type(None)])
            given[name] = _sampling(name, key, given[name])
        self.generation_kwargs = given

    def _check_objective(self) -> None:
        check_objective(self.objective)
        arguments: Any = self.objective_kwargs or {}
        for own in ("beta", "prefix_weight"):
            if own in arguments:
                raise ValueError(f"objective_kwargs: {own!r} is a key of its own: set {own} itself")
        check_knobs(self.objective, arguments, "objective_kwargs")
        if self.beta is not None:
            check_knobs(self.objective, ["beta"], "beta")
        if self.prefix_weight != PREFIX_WEIGHT:
            check_knobs(self.objective, ["prefix_weight"], "prefix_weight")
        if self.stage_fraction is not None:
            check_knobs(self.objective, ["stage"], "stage_fraction")
            _within("stage_fraction", self.stage_fraction, 0.0, 1.0)
            if "stage" in arguments:
                raise ValueError(
                    f"stage_fraction: objective_kwargs holds the run at stage {arguments['stage']}"
                    ": give one of the two"
                )
        try:
            self.rule(progress=0.0)
            self.rule(progress=1.0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"objective_kwargs: {self.objective}: {error}") from error

    def _check_prefix(self) -> None:
        if self.prefix_schedule not in SCHEDULES:
            raise ValueError(
                f"prefix_schedule: must be one of {', '.join(SCHEDULES)}; got "
                f"{self.prefix_schedule!r}"
            )
        _at_least("prefix_length", self.prefix_length, 0)
        if (self.prefix_schedule == "none") != (self.prefix_length == 0):
            raise ValueError(
                f"prefix_length: {self.prefix_length} with prefix_schedule "
                f"{self.prefix_schedule!r}: give both, or neither"
            )
        if self.prefix_length > self.max_completion_length:
            raise ValueError(
                f"prefix_length: {self.prefix_length} is more than max_completion_length "
                f"{self.max_completion_length}"
            )
        _within("prefix_fraction", self.prefix_fraction, 0.0, 1.0)
        if self.prefix_steps is not None:
            _at_least("prefix_steps", self.prefix_steps, 0)
        if self.max_workspace_bytes is not None:
            _at_least("max_workspace_bytes", self.max_workspace_bytes, 1)

    def _check_sample(self) -> None:
        try:
            check_selection(
                self.gradient_tolerance, self.gradient_sampling, "mean", self.backend, self.seed
            )
        except (NotImplementedError, ValueError) as error:
            named = str(error).startswith("gradient_tolerance")
            one = self.gradient_sampling is None
            key = "gradient_tolerance" if named or one else "gradient_sampling"
            raise ValueError(f"{key}: {str(error).removeprefix(f'{key} ')}") from error

    def _check_teacher(self) -> None:
        source = "teacher_model_server_url" if self.teacher_model_server_url else None
        if self.precomputed_teacher:
            if source:
                raise ValueError(f"precomputed_teacher: goes without {source}: give one of them")
            source = "precomputed_teacher"
            if self.prefix_length or self.lmbda != 1:
                key = "prefix_length" if self.prefix_length else "lmbda"
                raise ValueError(
                    f"{key}: with precomputed_teacher the completions are those of the data set; "
                    f"leave {key} out"
                )
        if source:
            try:
                check_served(self.rule(0.0))
                check_served(self.rule(1.0))
            except ValueError as error:
                raise ValueError(
                    f"{source}: objective {self.objective!r}: {error}. A HiddenTeacher is a "
                    "teacher_model that is loaded in this process"
                ) from error
        url = self.teacher_model_server_url
        if url is not None:
            check_address("teacher_model_server_url", url)
        if url and self.temperature != 1:
            raise ValueError(
                f"temperature: a server gives log-probs at temperature 1, not {self.temperature}: "
                "set temperature 1, or load the teacher in this process"
            )
        _at_least("teacher_server_retries", self.teacher_server_retries, 0)
        _at_least("teacher_server_concurrency", self.teacher_server_concurrency, 1)
        _within("teacher_server_timeout", self.teacher_server_timeout, 1e-3, 1e9)

    def _check_credit(self) -> None:
        _within("lmbda", self.lmbda, 0.0, 1.0)
        _at_least("num_iterations", self.num_iterations, 1)
        _at_least("drift_block_size", self.drift_block_size, 1)
        if self.drift_tau is not None:
            _within("drift_tau", self.drift_tau, 1e-6, 1e6)
            if self.num_iterations == 1:
                raise ValueError(
                    "drift_tau: with num_iterations 1 the policy that learns is the one that "
                    "sampled, so every gate is 1: set num_iterations to 2 or more"
                )
        _within("kl_discount_factor", self.kl_discount_factor, 0.0, 1.0)
        rule = self.rule()
        if self.kl_discount_factor and rule.policy_gradient == 0:
            rewarded = [name for name in OBJECTIVES if build_rule(name, {}).policy_gradient]
            raise ValueError(
                f"kl_discount_factor: objective {self.objective!r} has no K1 reward to discount; "
                f"{', '.join(rewarded)} have"
            )
        if self.importance_gamma is not None:
            _within("importance_gamma", self.importance_gamma, 0.0, 1e6)
            if not rule.uses_teacher:
                raise ValueError(
                    f"importance_gamma: objective {self.objective!r} asks no teacher, so there is "
                    "no discrepancy to weigh tokens by"
                )


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # written so that NaN fails
        raise ValueError(f"{key}: must be in [{low:g}, {high:g}], got {value!r}")


def _at_least(key: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{key}: must be a whole number of at least {low}, got {value!r}")


def _sampling(name: str, key: str, value: Any) -> Any:
    """The value of this setting of a sampler, as samplers take it. key: its name in errors."""
    if value is None:
        return None
    if name == "top_k":
        _at_least(key, value, 0)
        return value
    _within(key, value, 0.0, 1e9 if name in ("temperature", "repetition_penalty") else 1.0)
    if name in ("temperature", "repetition_penalty") and value == 0:
        raise ValueError(f"{key}: must be positive, got 0")
    return float(value)  # they refuse an int


def _check_type(key: str, value: Any, kinds: Sequence[type]) -> None:
    """Raises ValueError for a value of none of these `_TYPES`."""
    if isinstance(value, bool):  # which Python counts among the numbers
        fits = bool in kinds
    else:
        fits = isinstance(value, tuple(_TYPES[kind][0] for kind in kinds))
    if not fits:
        words = " or ".join(_TYPES[kind][1] for kind in kinds if kind is not type(None))
        raise ValueError(
            f"{key}: expected {words}, got {value!r:.80}: give that, or leave the key out"
        )
