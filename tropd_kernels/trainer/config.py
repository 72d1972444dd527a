"""`TrOPDConfig`: TRL's `DistillationConfig` with an objective, guidance prefixes and credit.

Everything that TRL already spells keeps its spelling (`temperature`, `max_completion_length`,
`beta`, `use_vllm`, `log_completions`, ...), and so does everything of transformers' beneath it.
What is wrong raises here, with the key's name, before any model is loaded.
"""

from dataclasses import dataclass
from typing import Any

from trl import DistillationConfig  # type: ignore[attr-defined]

from ..backends import choose_backend
from ..objectives import TokenRule
from .prefix import SCHEDULES
from .registry import OBJECTIVES, build_rule, check_knobs, check_objective, knobs

PREFIX_WEIGHT = 0.001
STAGE_FRACTION = 0.5


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
    beta: of gkd, jsd and topk_jsd: 0 is the forward KL, 1 the reverse KL. None takes 0.5, GKD's.
    stage_fraction: of reopold: share of training after which its second stage begins. None takes
        0.5, this library's choice; the paper does not fix it.
    prefix_schedule: how the teacher's prefix shrinks: "none" (no guidance, the default), "cosine"
        (the paper's), "linear", or "constant" (never).
    prefix_length: l at the first step, in tokens.
    prefix_fraction: share of training over which l falls to 0; the paper's 1. prefix_steps: the
        same in optimiser steps; wins over prefix_fraction.
    prefix_weight: weight of the K1 forward KL on the prefix, the paper's 0.001. Objectives without
        that term treat a prefix like any other token, and refuse another value.
    prefix_column: column with the teacher's answer: text, or messages for a conversational prompt.
        A data set without it has the teacher write the prefix.
    kl_discount_factor: replaces the K1 reward by its discounted sum to the end of the completion;
        0 (default) leaves the immediate reward, 1 is the plain sum.
    importance_gamma: IW-OPD's gamma (the paper's 0.5): early tokens weigh up to 1 + gamma. None
        (default) weighs all alike.
    backend: "triton", "native", "torch" or "reference"; None takes the best one here.
    max_workspace_bytes: bound on the loss's temporaries; see `plan_chunks`.
    log_regions: with each log, shows a few completions with their tokens coloured by region
        (trusted, outlier, prefix) in the terminal and in `output_dir`/regions.

    Raises ValueError that begins with the key.
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
    kl_discount_factor: float = 0.0
    importance_gamma: float | None = None
    backend: str | None = None
    max_workspace_bytes: int | None = None
    log_regions: bool = False

    def __post_init__(self):
        # TRL checks beta as a number. None stays in the field, so that a copy of the config made
        # with another objective does not carry a beta that nobody gave.
        given, self.beta = self.beta, 1.0 if self.beta is None else self.beta
        super().__post_init__()
        self.beta = given
        self._check_objective()
        self._check_prefix()
        self._check_credit()
        if self.temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {self.temperature}")
        try:
            choose_backend(self.backend, self.device)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"backend: {error}") from error

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

    def _check_objective(self) -> None:
        check_objective(self.objective)
        arguments = self.objective_kwargs or {}
        if not isinstance(arguments, dict):
            raise ValueError(f"objective_kwargs: expected a mapping, got {arguments!r}")
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
        if self.prefix_length < 0:
            raise ValueError(f"prefix_length: must be 0 tokens or more, got {self.prefix_length}")
        if (self.prefix_schedule == "none") != (self.prefix_length == 0):
            raise ValueError(
                f"prefix_length: {self.prefix_length} with prefix_schedule "
                f"{self.prefix_schedule!r}: give both, or neither"
            )
        if not self.max_completion_length or self.max_completion_length < 0:
            raise ValueError(
                f"max_completion_length: must be at least 1 token, got {self.max_completion_length}"
            )
        if self.prefix_length > self.max_completion_length:
            raise ValueError(
                f"prefix_length: {self.prefix_length} is more than max_completion_length "
                f"{self.max_completion_length}"
            )
        _within("prefix_fraction", self.prefix_fraction, 0.0, 1.0)
        if self.prefix_steps is not None and self.prefix_steps < 0:
            raise ValueError(f"prefix_steps: must be 0 steps or more, got {self.prefix_steps}")

    def _check_credit(self) -> None:
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
        raise ValueError(f"{key}: must be in [{low:g}, {high:g}], got {value}")
