"""The objectives as verl's distillation losses, for sampled and for top-k teachers.

    export VERL_USE_EXTERNAL_MODULES=tropd_kernels.integrations.verl
    python -m verl.trainer.main_ppo ... distillation.distillation_loss.loss_mode=tropd \\
        actor_rollout_ref.model.use_fused_kernels=true

verl imports the modules of that variable in each of its processes, and importing this one, where
verl is installed, registers the names of `SAMPLED` and `TOP_K`; `register` adds a rule of your own.
`verl_example.yaml` has the settings. Which teacher a name is for is part of its registration, since
verl asks the teacher accordingly:

| teacher | names                                                                            |
|---------|----------------------------------------------------------------------------------|
| sampled | tropd_opd, tropd_clip_outlier, tropd_mask_outlier, tropd_mask, tropd_entropy_opd |
| top-k   | tropd, tropd_aopd, tropd_forward_kl, tropd_mopd, tropd_topk_jsd, tropd_lsm,      |
|         | tropd_eopd                                                                       |

With `use_fused_kernels` hidden states and the head go into `linear_distillation_loss`, in the FSDP
engine's model (`verl_fused`), in VeOmni's or in Megatron's (`verl_megatron`); no logits are formed.
Without it the losses are those of the logits that verl has formed. What is replaced in verl stands
in `verl_replaced`.

What verl gives (verl 0.9.1: verl/trainer/distillation/losses.py,
verl/workers/engine/fsdp/transformer_impl.py, verl/experimental/teacher_loop/teacher_manager.py,
verl/workers/rollout/vllm_rollout/utils.py), n being the tokens of a packed micro-batch:

* A registered loss gets (config, distillation_config, model_output, data) and returns losses
  (B, R), R the longest response, and metrics. verl multiplies by the response mask and divides as
  `actor.loss_agg_mode` says; so this module leaves the mean to it.
* The student arrives as log-probs (n), logits (1, n, V) or hidden states (1, n, H), and is at the
  rollout's temperature; the teacher as data's teacher_logprobs and teacher_ids (n, 1 or k), at
  temperature 1. Row i is about token i + 1. k is `distillation_loss.topk`, whatever the rule's own.
* verl may compute log-probs from the same logits with a backward that overwrites them
  (flash-attn's), so unless it skips those (no task rewards) the logits are copied first.
* Under a top-k loss verl drops the teacher's log-prob of a token outside the k. `verl_teacher`
  keeps it where vLLM or SGLang serves the teacher. Elsewhere such a token counts as one that the
  teacher rules out: log q = -inf, R = -inf. A gate then calls it an outlier. The gate of TrOPD errs
  on at most a share 1 - (teacher's mass on k) of the student's tokens, since the sum over those ids
  of p min(q/p, 1) is at most that. A rule with an unbounded reward and no gate would be infinite
  there: it is registered with teacher="top_k_and_label", which insists on the label's log-prob.
* No step and no sample index arrive. The Bernoulli gate's draws are a function of
  (`actor.data_loader_seed`, a hash of the sequence's token ids, position): the same for a token in
  any micro-batch and on any rank, and again when the same sequence is trained on once more.
* A fraction of the tokens (`select_by`, EntropyOPD) is of those of the micro-batch. verl logs the
  means over micro-batches and ranks of `distillation/select_threshold`, the lowest finite score
  that was selected, and of `distillation/selected_score_share`, the selected tokens' share of the
  sum of the finite scores.

Not served: `use_policy_gradient`, under which verl would take these losses as rewards, and
`log_prob_min_clamp`, which nothing here reads, raise ValueError; rules whose mean is over the kept
tokens (REOPOLD), since the mean is verl's, and what needs the whole distribution are refused by
`register`. `loss_max_clamp` is verl's own and stops the gradient of a loss beyond it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from typing import Any

from torch import Tensor

from ..objectives import (
    AOPD,
    EOPD,
    LSM,
    MOPD,
    OPD,
    ClipOutlier,
    Divergence,
    EntropyOPD,
    MaskOutlier,
    TokenRule,
    TopKJSD,
    TrOPD,
)
from .frameworks import check_parameters, check_version
from .log_probs import sampled_losses
from .verl_batch import NEEDS_LABEL, RULES, padded, rule_of, uniforms_of

#: What importing this module registers, by teacher.
SAMPLED = {
    "tropd_opd": OPD(),
    "tropd_clip_outlier": ClipOutlier(),
    "tropd_mask_outlier": MaskOutlier(),
    "tropd_mask": TrOPD(outlier="mask"),
    "tropd_entropy_opd": EntropyOPD(),
}
TOP_K = {
    "tropd": TrOPD(),
    "tropd_aopd": AOPD(),
    "tropd_forward_kl": Divergence("forward_kl", top_k=64),
    "tropd_lsm": LSM(),
    "tropd_mopd": MOPD(),
    "tropd_topk_jsd": TopKJSD(),
}
TOP_K_AND_LABEL = {"tropd_eopd": EOPD()}
#: The forms of teacher that a rule can be registered for.
TEACHERS = {"sampled": SAMPLED, "top_k": TOP_K, "top_k_and_label": TOP_K_AND_LABEL}
#: What verl gives a registered loss.
_OF_A_LOSS = ("config", "distillation_config", "model_output", "data")


def register(name: str, rule: TokenRule, teacher: str) -> None:
    """Registers `rule` as verl's `loss_mode=name`, for a teacher of `TEACHERS`.

    Raises ValueError where that teacher, as verl has it, cannot serve the rule or the name is
    taken, ImportError without verl, RuntimeError where this verl has another plug-in point.
    """
    check_rule(name, rule, teacher)
    check_version("verl")
    from verl.trainer.distillation import losses

    from .verl_replaced import take_over_logits

    check_parameters("verl", losses, "distillation_loss", _OF_A_LOSS)

    top_k = teacher != "sampled"
    if top_k:
        take_over_logits(losses)
    settings = losses.DistillationLossSettings(
        names=[name], use_topk=top_k, use_estimator=not top_k
    )
    losses.register_distillation_loss(settings)(_from_logits if top_k else _from_log_probs)
    RULES[name] = rule
    if teacher == "top_k_and_label":
        NEEDS_LABEL.add(name)


def check_rule(name: str, rule: TokenRule, teacher: str) -> None:
    """Raises ValueError, with the reason, for a rule that verl's teacher of this form cannot
    serve."""
    why = None
    if teacher not in TEACHERS:
        forms = ", ".join(map(repr, TEACHERS))
        raise ValueError(f"{name}: teacher must be one of {forms}, got {teacher!r}")
    if rule.normalize == "kept":
        why = "its mean is over the tokens kept, and verl takes the mean over all"
    elif rule.uses_dense_teacher:
        why = "it needs the teacher's whole distribution, and verl's teachers send log-probs of ids"
    elif teacher == "sampled" and (rule.uses_top_k or rule.uses_forward_kl):
        why = "it needs the teacher's top-k log-probs: register it with teacher='top_k'"
    elif teacher == "sampled" and (rule.z_loss or rule.label_smoothing):
        why = (
            "its z_loss or label_smoothing reads the logits, and a sampled loss gets log-probs "
            "alone: leave both at 0, or register the rule with teacher='top_k'"
        )
    elif rule.score == "scores":
        why = "verl gives a distillation loss no scores: take another select_by"
    elif teacher == "sampled" and rule.score == "teacher_entropy":
        why = (
            "its select_by='teacher_entropy' needs more of the teacher than a token's log-prob: "
            "take select_by 'entropy', 'reward' or 'disagreement', or teacher='top_k'"
        )
    elif rule.uses_task_advantages:
        why = "verl gives a distillation loss no task_advantages: leave task_weight 0, no filter"
    elif teacher == "top_k" and rule.policy_gradient and rule.gate == "always":
        if not rule.bounds_reward:
            why = (
                "it has an unbounded K1 on every token, and verl drops the teacher's log-prob of a "
                "token outside the top k: take teacher='top_k_and_label', a rule with a gate, a "
                "bounded reward such as PowerOPD's, or teacher='sampled'"
            )
    if why:
        raise ValueError(f"{name}: {rule!r} cannot be served: {why}")


# --- verl's side -------------------------------------------------------------------------------


def _from_log_probs(config, distillation_config, model_output, data) -> tuple[Tensor, dict]:
    """A registered loss for a sampled teacher, as verl calls it: from log-probs, or what a fused
    engine has computed."""
    from verl.workers.utils.padding import no_padding_2_padding

    rule = rule_of(distillation_config)
    if "distillation_losses" in model_output:
        return _computed(rule, model_output, data)
    counted = padded(data["response_mask"]).bool()
    old, entropy = data.get("old_log_probs", None), model_output.get("entropy", None)
    losses, trust, score = sampled_losses(
        no_padding_2_padding(model_output["log_probs"], data),
        no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1),
        counted,
        rule,
        old_log_probs=None if old is None else padded(old),
        entropy=None if entropy is None else no_padding_2_padding(entropy, data),
        uniforms=no_padding_2_padding(uniforms_of(config, data), data),
        with_entropy="set actor_rollout_ref.actor.calculate_entropy=true",
    )
    seen = {"tropd_trust": trust} | ({} if score is None else {"tropd_score": score})
    return losses, _metrics(rule, counted, seen)


def _from_logits(config, distillation_config, model_output, data) -> tuple[Tensor, dict]:
    """A registered loss for a top-k teacher: what was computed where logits or hidden states were,
    as verl wants it."""
    rule = rule_of(distillation_config)
    if "tropd_trust" not in model_output:
        raise RuntimeError(
            f"loss_mode={distillation_config.distillation_loss.loss_mode!r} saw neither the "
            "student's logits nor its hidden states: use the strategy fsdp, fsdp2 or veomni, set "
            "actor_rollout_ref.model.use_fused_kernels=false elsewhere, or take a loss of a "
            f"sampled teacher ({', '.join(SAMPLED)})"
        )
    return _computed(rule, model_output, data)


def _computed(rule: TokenRule, model_output: Any, data: Any) -> tuple[Tensor, dict]:
    """Losses (B, R) and metrics of what stands in the model's output."""
    from verl.workers.utils.padding import no_padding_2_padding

    names = ["tropd_trust", "tropd_label_in_topk", "tropd_score"]
    if rule.uses_top_k or rule.uses_sums:  # else there are no masses
        names += ["student_mass", "teacher_mass"]
    seen = {n: no_padding_2_padding(model_output[n], data) for n in names if n in model_output}
    losses = no_padding_2_padding(model_output["distillation_losses"], data)
    return losses, _metrics(rule, padded(data["response_mask"]).bool(), seen)


def _metrics(rule: TokenRule, counted: Tensor, seen: dict[str, Tensor]) -> dict[str, Any]:
    """Means over the tokens that count and have the value, of the masses the least and the largest,
    and of a selection its threshold and what it holds, under verl's names and as verl aggregates
    them.

    verl fails if ranks give different numbers of values, so every micro-batch gives all of them. If
    no token is selected, a mean is 1, and an extreme is an infinity that changes no other.
    """
    from verl.utils.metric import AggregationType, Metric

    at_tokens = {name.removeprefix("tropd_"): rows.detach()[counted].double()
                 for name, rows in seen.items()}  # fmt: skip
    means: dict[str, float] = {}
    extremes = {}
    if "score" in at_tokens:
        means |= _selection(rule, at_tokens.pop("score"), ~at_tokens["trust"].isnan())
    for name, values in at_tokens.items():
        known = values[~values.isnan()].tolist()
        means[name] = sum(known) / len(known) if known else 1.0
        if name.endswith("_mass"):
            extremes[f"{name}_min"] = Metric(AggregationType.MIN, min(known, default=math.inf))
            extremes[f"{name}_max"] = Metric(AggregationType.MAX, max(known, default=-math.inf))
    found = {name: Metric(AggregationType.MEAN, value) for name, value in means.items()} | extremes
    return {f"distillation/{name}": metric for name, metric in found.items()}


def _selection(rule: TokenRule, scores: Tensor, selected: Tensor) -> dict[str, float]:
    """The lowest finite score that was selected, and the selected tokens' share of the sum of the
    finite scores, except for rewards, which have both signs. If no finite score was selected, the
    first is the rule's threshold, or else the highest finite score, or 0: tokens that the teacher
    rules out have infinite scores, and a fraction may take only those."""
    finite = scores.isfinite()
    held, known = scores[finite & selected].tolist(), scores[finite].tolist()
    lowest = rule.select_threshold
    if lowest is None:
        lowest = max(known, default=0.0)  # NaN would be the mean of the whole step
    found = {"select_threshold": min(held, default=lowest)}
    if rule.score != "reward":
        found["selected_score_share"] = sum(held) / sum(known) if any(known) else 1.0
    return found


if importlib.util.find_spec("verl") is not None:
    for _teacher, _rules in TEACHERS.items():
        for _name, _rule in _rules.items():
            register(_name, _rule, _teacher)
    from . import verl_fused  # noqa: F401  it registers itself

    # A process without what verl's servers import has no teacher to ask.
    with contextlib.suppress(ModuleNotFoundError):
        from . import verl_teacher  # noqa: F401  so does it
