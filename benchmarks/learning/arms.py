"""What is compared: an arm is settings of `TrOPDConfig`; everything else is the same for all.

`TOP_K` is the teacher's top-k of every objective that has one. Whatever is not set here is the
objective's default, the paper's.
"""

from collections.abc import Mapping
from typing import Any

TOP_K = 4
STEPS = 100
#: The same for all arms, chosen by a sweep over OPD and TrOPD (`--sweep`).
LEARNING_RATE = 1e-3
SWEEP_RATES = (3e-4, 1e-3, 3e-3)
SWEEP_SEEDS = (101, 102)  # none of the experiment's
BATCH = 64
PREFIX_LENGTH = 10  # of 19 tokens, falling to 0

_TROPD = {"objective": "tropd", "objective_kwargs": {"top_k": TOP_K}}
_K = {"top_k": TOP_K}

ARMS: dict[str, dict[str, Any]] = {
    "opd": {"objective": "opd"},
    "tropd": _TROPD,
    "tropd_prefix": _TROPD | {"prefix_schedule": "cosine", "prefix_length": PREFIX_LENGTH},
    "tropd_mask": {"objective": "tropd", "objective_kwargs": _K | {"outlier": "mask"}},
    "tropd_clip": {"objective": "tropd", "objective_kwargs": _K | {"outlier": "clip"}},
    "mask_outlier": {"objective": "mask_outlier"},
    "clip_outlier": {"objective": "clip_outlier"},
    "gkd": {"objective": "gkd", "beta": 0.5},
    "eopd": {"objective": "eopd", "objective_kwargs": _K},
    "entropy_opd": {"objective": "entropy_opd"},
    "reopold": {"objective": "reopold"},
    "aopd": {"objective": "aopd", "objective_kwargs": _K},
    "mopd": {"objective": "mopd", "objective_kwargs": _K},
    "topk_jsd": {"objective": "topk_jsd", "objective_kwargs": _K},
    "forward_kl_topk": {"objective": "forward_kl", "objective_kwargs": _K},
    "reverse_kl": {"objective": "reverse_kl"},
}

#: What a selection of tokens costs: two objectives on all tokens, and on those of the highest
#: entropy (`--selection`). Runs of their own, also where an arm above has the same settings.
SELECTIONS: dict[str, dict[str, Any]] = {
    f"{arm}, {share:.0%} of the tokens": ARMS[arm]
    | ({} if share == 1 else {"select_by": "entropy", "select_fraction": share})
    for arm in ("opd", "gkd")
    for share in (1.0, 0.3, 0.1)
}
SELECTION_SEEDS = 8


def settings(arm: Mapping[str, Any], seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
    """Arguments of `TrOPDConfig` for one run."""
    return {
        **arm,
        "seed": seed,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "temperature": 1.0,
        "max_grad_norm": 1.0,  # logged before it is clipped
        "weight_decay": 0.0,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
