"""Which of two checkpoints is the better one by a metric of this package or of TRL.

transformers takes the greater value of any metric for the better one, unless its name ends in
"loss": by `tropd/reverse_kl` it would load the worst checkpoint. And its schedules that follow a
metric wait for a lower one, whichever it is.
"""

import re
from typing import Any

from ..objectives.registry import nearest
from .metrics import PREFIX
from .progress import gives_whole, what_to_watch

#: Of each metric that an evaluation logs (`metrics.py`, `rewarded.py`), whether a greater value is
#: better; None where neither is: it depends on the run.
GREATER_IS_BETTER: dict[str, bool | None] = {
    "tropd/trust_ratio": True, "tropd/outlier_ratio": False,
    "tropd/reward_mean": True, "tropd/reward_min": True,
    "tropd/reverse_kl": False, "tropd/forward_kl": False, "tropd/forward_kl_topk": False,
    "tropd/prefix_nll": False,
    "tropd/teacher_topk_mass": None, "tropd/student_topk_mass": None,
    "tropd/teacher_entropy": None, "tropd/teacher_entropy_topk": None,
    "tropd/sampling_mass": None, "tropd/selected_share": None, "tropd/selected_score_share": None,
    "tropd/select_threshold": None, "tropd/prefix_length": None,
    "tropd/gradient_error": None, "tropd/gradient_share": None,
    "entropy": None, "num_tokens": None,
    "reward": True, "reward_std": None, "frac_reward_zero_std": None,
}  # fmt: skip
#: Behind the name of a data set, where there are several.
_OURS = re.compile(rf"(?:^|_)({PREFIX}\w+|(?:completions|rewards|tools)/.+)$")
_OF_REWARDS = re.compile(r"rewards/.+/mean")
_FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")


def set_direction(config: Any) -> None:
    """Sets `greater_is_better` for a metric of ours, if it was not given.

    Call it before transformers sets it. Raises ValueError for a metric that is not better in one
    direction.
    """
    metric = config.metric_for_best_model
    if metric is None or config.greater_is_better is not None:
        return
    name = _own_name(metric)
    if name is None:
        return
    better = True if _OF_REWARDS.fullmatch(name) else GREATER_IS_BETTER.get(name)
    if better is None:
        unknown = name.startswith(PREFIX) and name not in GREATER_IS_BETTER
        raise ValueError(
            f"metric_for_best_model: whether a greater {metric!r} is better is not known"
            f"{nearest(name, GREATER_IS_BETTER) if unknown else ''}: set greater_is_better, or "
            "choose tropd/reverse_kl, which should fall"
        )
    config.greater_is_better = better


def set_mode(config: Any) -> None:
    """Has a schedule that follows the metric wait for the better value, not for the lower one.

    Raises ValueError where another mode was given.
    """
    schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    if schedule not in _FOLLOW_A_METRIC:
        return
    mode, given = "max" if config.greater_is_better else "min", config.lr_scheduler_kwargs or {}
    if given.get("mode", mode) != mode:
        raise ValueError(
            f"lr_scheduler_kwargs: mode {given['mode']!r}, but greater_is_better is "
            f"{config.greater_is_better} for {config.metric_for_best_model!r}: leave mode out, or "
            "set greater_is_better"
        )
    if mode == "max":
        config.lr_scheduler_kwargs = {**given, "mode": mode}


def surrogate_warning(config: Any) -> str | None:
    """For a policy gradient whose loss chooses the checkpoint, or the learning rate."""
    metric = (config.metric_for_best_model or "").removeprefix("eval_")
    rules = [rule for rule in config.rules() if rule.policy_gradient]
    if not rules or metric == "aux_loss" or not re.fullmatch(r"(.+_)?loss", metric):
        return None
    return (
        f"metric_for_best_model: {config.metric_for_best_model!r} says nothing about progress, "
        "for the loss of a policy gradient is a surrogate: choose "
        f"{what_to_watch(gives_whole(config))}"
    )


def _own_name(metric: str) -> str | None:
    """The name under which a metric of ours is logged, without an evaluation's or a data set's."""
    name = metric.removeprefix("eval_")
    if (found := _OURS.search(name)) is not None:
        return found[1]
    return next((own for own in GREATER_IS_BETTER if f"_{name}".endswith(f"_{own}")), None)
