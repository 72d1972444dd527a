"""The objectives as verl's distillation losses, for sampled and for top-k teachers.

    export VERL_USE_EXTERNAL_MODULES=tropd_kernels.integrations.verl
    python -m verl.trainer.main_ppo ... distillation.distillation_loss.loss_mode=tropd

verl imports the modules of that variable in each of its processes, and importing this one, where
verl is installed, registers the names of `SAMPLED` and `TOP_K`; `register` adds a rule of your own.
`verl_example.yaml` has the settings. Which teacher a name is for is part of its registration, since
verl asks the teacher accordingly:

| teacher | names                                                                            |
|---------|----------------------------------------------------------------------------------|
| sampled | tropd_opd, tropd_clip_outlier, tropd_mask_outlier, tropd_mask, tropd_entropy_opd |
| top-k   | tropd, tropd_aopd, tropd_forward_kl, tropd_mopd, tropd_topk_jsd, tropd_lsm       |

What verl gives at its plug-in point (verl 0.9.1: verl/trainer/distillation/losses.py,
verl/workers/engine/fsdp/transformer_impl.py, verl/experimental/teacher_loop/teacher_manager.py,
verl/workers/rollout/vllm_rollout/utils.py), n being the tokens of a packed micro-batch:

* A registered loss gets (config, distillation_config, model_output, data) and returns losses
  (B, R), R the longest response, and metrics. verl multiplies by the response mask and divides as
  `actor.loss_agg_mode` says; so this module leaves the mean to it.
* The student arrives as log-probs (n) of the tokens, at rollout temperature; the teacher as data's
  teacher_logprobs and teacher_ids (n, 1 or k), at temperature 1. Row i is about token i + 1.
* Logits (1, n, V) are seen by a top-k loss alone, in `compute_topk_loss`, which is no plug-in: it
  calls verl's forward KL, whatever the name. `register` therefore puts a function before it that
  takes this module's names and hands on every other. There the loss is that of
  `tropd_kernels.distillation_loss` with a TopKTeacher; k is `distillation_loss.topk`, whatever the
  rule's own. verl may compute log-probs from the same logits with a backward that overwrites them
  (flash-attn's), so unless it skips those (no task rewards) the logits are copied first.
* Under a top-k loss verl drops the teacher's log-prob of a token outside the k. Such a token counts
  as one that the teacher rules out: log q = -inf, R = -inf. A gate then calls it an outlier. The
  gate of TrOPD errs on at most a share 1 - (teacher's mass on k) of the student's tokens, since the
  sum over those ids of p min(q/p, 1) is at most that. Rules that have an unbounded reward without a
  gate (OPD, EOPD) would be infinite there and are refused; those of bounded ones (PowerOPD) count
  it as their least.
* No step and no sample index arrive. The Bernoulli gate's draws are a function of
  (`actor.data_loader_seed`, a hash of the sequence's token ids, position): the same for a token in
  any micro-batch and on any rank, and again when the same sequence is trained on once more.
* A fraction of the tokens (`select_by`, EntropyOPD) is of those of the micro-batch.

Not served: `use_policy_gradient`, under which verl would take these losses as rewards, and
`log_prob_min_clamp`, which nothing here reads, raise ValueError; rules whose mean is over the kept
tokens (REOPOLD), since the mean is verl's, and what needs the whole distribution are refused by
`register`; Megatron's logits, split over the vocabulary, and fused kernels, which form none, serve
sampled losses alone. `loss_max_clamp` is verl's own and stops the gradient of a loss beyond it.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..draws import bernoulli_uniforms, philox4x32
from ..functional import distillation_loss
from ..loss.token_selection import scores, selected
from ..objectives import (
    AOPD,
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
from ..rows.layout import Coef, LogitTransform, RowBatch, RowOptions, Stat, new_matrices
from ..rows.rule import apply_rule, gate
from ..teachers import TopKTeacher

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
#: The rules registered so far, by name.
RULES: dict[str, TokenRule] = {}

_IGNORED = -100
_ON_LOGITS = ("config", "distillation_config", "data", "student_logits", "data_format")


def register(name: str, rule: TokenRule, teacher: str) -> None:
    """Registers `rule` as verl's `loss_mode=name`, for a "sampled" or a "top_k" teacher.

    Raises ValueError where that teacher, as verl has it, cannot serve the rule or the name is
    taken, ImportError without verl, RuntimeError where this verl has another plug-in point.
    """
    check_rule(name, rule, teacher)
    from verl.trainer.distillation import losses

    top_k = teacher == "top_k"
    if top_k:
        _take_over_logits(losses)
    settings = losses.DistillationLossSettings(
        names=[name], use_topk=top_k, use_estimator=not top_k
    )
    losses.register_distillation_loss(settings)(_from_logits if top_k else _from_log_probs)
    RULES[name] = rule


def check_rule(name: str, rule: TokenRule, teacher: str) -> None:
    """Raises ValueError, with the reason, for a rule that verl's teacher of this form cannot
    serve."""
    why = None
    if teacher not in ("sampled", "top_k"):
        raise ValueError(f"{name}: teacher must be 'sampled' or 'top_k', got {teacher!r}")
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
                "token outside the top k: take a rule with a gate, a bounded reward such as "
                "PowerOPD's, or teacher='sampled'"
            )
    if why:
        raise ValueError(f"{name}: {rule!r} cannot be served: {why}")


# --- the losses, on plain tensors --------------------------------------------------------------


def sampled_losses(
    log_probs: Tensor,  # (*)
    teacher_log_probs: Tensor,  # (*)
    counted: Tensor,  # (*), bool
    rule: TokenRule,
    *,
    old_log_probs: Tensor | None = None,  # (*)
    entropy: Tensor | None = None,  # (*)
    uniforms: Tensor | None = None,  # (*)
) -> tuple[Tensor, Tensor]:
    """Loss of each token and the gate's M, 0 where `counted` is not, from log-probs alone. At a
    token that the rule does not select the loss is 0 and M is NaN.

    Those of a sampled teacher in `distillation_loss`; differentiable in log_probs, and in entropy
    where the rule has an entropy bonus.
    """
    if entropy is None and (rule.entropy_coef or rule.score == "entropy"):
        raise ValueError(
            f"{rule!r} reads the student's entropy: set "
            "actor_rollout_ref.actor.calculate_entropy=true"
        )

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1)

    stats, coefs = new_matrices(log_probs.detach(), log_probs.numel())
    stats[Stat.LOG_PROB], stats[Stat.TEACHER_LOG_PROB] = rows(log_probs), rows(teacher_log_probs)
    if entropy is not None:
        stats[Stat.ENTROPY] = rows(entropy)
    known = {"old_log_probs": rows(old_log_probs), "uniforms": rows(uniforms)}
    batch = RowBatch(student=None, teacher=None, labels=None, **known)
    options = RowOptions(rule, LogitTransform(), LogitTransform())
    enters = counted
    if rule.score is not None:
        ranked = scores(stats, batch, options).masked_fill(~counted.reshape(-1), math.nan)
        enters = counted & selected(ranked, rule).view(counted.shape)
    apply_rule(stats, coefs, gate(stats, batch, options), None, batch, options)

    def where(mask: Tensor, row: Tensor) -> Tensor:
        return torch.where(mask, row.view(counted.shape), 0.0)

    losses = where(enters, stats[Stat.TOKEN_LOSS])
    # Their gradients are known: each enters by its difference from itself, times its gradient.
    by = {Coef.LABEL: -log_probs, Coef.ENTROPY_WEIGHT: entropy}
    for coef, values in by.items():
        if values is not None:
            finite = torch.where(counted & ~values.isinf(), values, 0.0)
            losses = losses + where(enters, coefs[coef]) * (finite - finite.detach())
    trust = where(counted, stats[Stat.TRUST])
    return losses, trust.masked_fill(counted & ~enters, math.nan)


def top_k_losses(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n), -100 where a token does not count
    teacher_log_probs: Tensor,  # (n, k)
    teacher_ids: Tensor,  # (n, k)
    rule: TokenRule,
    *,
    old_log_probs: Tensor | None = None,  # (n)
    uniforms: Tensor | None = None,  # (n)
    backend: str | None = None,
) -> dict[str, Tensor]:
    """What verl carries from the logits to the loss, each (n), by name: the loss of each token,
    the masses of the k ids, the gate's M, and whether the label is among the k ids."""
    hit = teacher_ids == labels.unsqueeze(-1)
    known = torch.where(hit, teacher_log_probs, -torch.inf).amax(-1)
    if rule.top_k is not None:
        rule = replace(rule, top_k=teacher_ids.shape[-1])
    out = distillation_loss(
        logits, labels, TopKTeacher(teacher_ids.long(), teacher_log_probs, known), rule,
        old_log_probs=old_log_probs, uniforms=uniforms, ignore_index=_IGNORED, reduction="none",
        backend=backend,
    )  # fmt: skip
    return {
        "distillation_losses": out.loss,
        "student_mass": out.stats.student_topk_mass,
        "teacher_mass": out.stats.teacher_topk_mass,
        "tropd_trust": out.stats.trust,
        "tropd_label_in_topk": hit.any(-1).to(out.loss.dtype),
    }


def token_uniforms(seed: int, ids: Tensor, offsets: Tensor) -> Tensor:
    """The gate's draws (n), one for each row of packed sequences; row i is about token i + 1.

    ids: (n) token ids. offsets: (B + 1) where each sequence starts, and n. A sequence is named by
    the sums of two Philox words of (position, id) over its tokens: 62 bits.
    """
    lengths = offsets.diff()
    row = torch.repeat_interleave(
        torch.arange(lengths.shape[0], device=ids.device), lengths, output_size=ids.shape[0]
    )
    position = torch.arange(ids.shape[0], device=ids.device) - offsets[:-1][row]
    zero = torch.zeros_like(position)
    words = philox4x32((position, ids.long(), zero, zero), (zero[:1], zero[:1]))
    low, high = (
        zero.new_zeros(lengths.shape[0]).index_add(0, row, word) & (2**31 - 1) for word in words[:2]
    )
    return bernoulli_uniforms(seed, 0, (low + (high << 31))[row], position + 1)


# --- verl's side -------------------------------------------------------------------------------


def _from_log_probs(config, distillation_config, model_output, data) -> tuple[Tensor, dict]:
    """A registered loss for a sampled teacher, as verl calls it."""
    from verl.workers.utils.padding import no_padding_2_padding

    rule = _rule_of(distillation_config)
    counted = _padded(data["response_mask"]).bool()
    old, entropy = data.get("old_log_probs", None), model_output.get("entropy", None)
    losses, trust = sampled_losses(
        no_padding_2_padding(model_output["log_probs"], data),
        no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1),
        counted,
        rule,
        old_log_probs=None if old is None else _padded(old),
        entropy=None if entropy is None else no_padding_2_padding(entropy, data),
        uniforms=no_padding_2_padding(_uniforms(config, data), data),
    )
    return losses, _metrics(counted, tropd_trust=trust)


def _from_logits(config, distillation_config, model_output, data) -> tuple[Tensor, dict]:
    """A registered loss for a top-k teacher: what `_on_logits` has computed, as verl wants it."""
    from verl.workers.utils.padding import no_padding_2_padding

    _rule_of(distillation_config)
    if "tropd_trust" not in model_output:
        raise RuntimeError(
            f"loss_mode={distillation_config.distillation_loss.loss_mode!r} did not see the "
            "student's logits: set actor_rollout_ref.model.use_fused_kernels=false, or take a "
            f"loss of a sampled teacher ({', '.join(SAMPLED)})"
        )
    counted = _padded(data["response_mask"]).bool()
    names = ("student_mass", "teacher_mass", "tropd_trust", "tropd_label_in_topk")
    seen = {name: no_padding_2_padding(model_output[name], data) for name in names}
    losses = no_padding_2_padding(model_output["distillation_losses"], data)
    return losses, _metrics(counted, **seen)


def _on_logits(config, distillation_config, data, student_logits, data_format) -> dict[str, Tensor]:
    """The losses (1, n) of a top-k teacher on logits (1, n, V), in place of verl's
    `compute_topk_loss`. Under Ulysses n is this rank's share."""
    from verl.utils import tensordict_utils
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
    from verl.workers.utils.padding import no_padding_2_padding

    rule = _rule_of(distillation_config)
    if config.strategy not in ("fsdp", "fsdp2", "veomni"):
        raise NotImplementedError(
            f"loss_mode={distillation_config.distillation_loss.loss_mode!r} needs whole rows of "
            f"logits, which strategy={config.strategy!r} does not give: use fsdp, or a loss of a "
            f"sampled teacher ({', '.join(SAMPLED)})"
        )
    ids = data["input_ids"].values()
    counted = _padded(data["response_mask"]).bool()
    # The rows whose next token counts, found by verl's own way from rows to responses.
    rows = no_padding_2_padding(torch.arange(ids.shape[0], device=ids.device), data)[counted]
    flat = {
        "counts": torch.zeros_like(ids).index_fill(0, rows, 1),
        "labels": ids.roll(-1),
        "ids": data["teacher_ids"].values(),
        "log_probs": data["teacher_logprobs"].values(),
        "uniforms": _uniforms(config, data),
    }
    if (old := data.get("old_log_probs", None)) is not None:
        old = _padded(old)[counted].float()
        flat["old"] = old.new_zeros(ids.shape[0]).index_copy(0, rows, old)
    if get_ulysses_sequence_parallel_world_size() > 1:
        flat = {k: slice_input_tensor(v.unsqueeze(0), dim=1)[0] for k, v in flat.items()}
    logits = student_logits.squeeze(0)
    if not tensordict_utils.get_non_tensor_data(data, key="distillation_only", default=False):
        logits = logits.clone()
    outputs = top_k_losses(
        logits,
        torch.where(flat["counts"] > 0, flat["labels"].long(), _IGNORED),
        flat["log_probs"].float(),
        flat["ids"],
        rule,
        old_log_probs=flat.get("old"),
        uniforms=flat["uniforms"],
    )
    return {name: value.unsqueeze(0) for name, value in outputs.items()}


def _take_over_logits(losses: Any) -> None:
    """Puts `_on_logits` before verl's `compute_topk_loss`, for the names registered here."""
    original = getattr(losses, "compute_topk_loss", None)
    if getattr(original, "serves_tropd", False):
        return
    if original is None or tuple(inspect.signature(original).parameters) != _ON_LOGITS:
        raise RuntimeError(
            "this verl computes top-k losses otherwise than verl 0.9 (compute_topk_loss in "
            "verl/trainer/distillation/losses.py): only losses of sampled teachers can be "
            "registered with it"
        )

    def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
        ours = distillation_config.distillation_loss.loss_mode in RULES
        call = _on_logits if ours else original
        return call(config, distillation_config, data, student_logits, data_format)

    compute_topk_loss.serves_tropd = True  # type: ignore[attr-defined]
    losses.compute_topk_loss = compute_topk_loss


def _rule_of(distillation_config: Any) -> TokenRule:
    settings = distillation_config.distillation_loss
    for name, wanted, written in (
        ("use_policy_gradient", False, "false"),
        ("log_prob_min_clamp", None, "null"),
    ):
        if getattr(settings, name) != wanted:
            raise ValueError(
                f"loss_mode={settings.loss_mode!r} is back-propagated as it is: set distillation."
                f"distillation_loss.{name}={written}, got {getattr(settings, name)!r}"
            )
    return RULES[settings.loss_mode]


def _uniforms(config: Any, data: Any) -> Tensor:
    ids = data["input_ids"]
    return token_uniforms(config.data_loader_seed, ids.values(), ids.offsets())


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _metrics(counted: Tensor, **values: Tensor) -> dict[str, Any]:
    """Means over the tokens that count and have the value, as verl averages them."""
    from verl.utils.metric import AggregationType, Metric

    means = {name: value.detach()[counted].double().nanmean() for name, value in values.items()}
    return {
        f"distillation/{name.removeprefix('tropd_')}": Metric(AggregationType.MEAN, float(mean))
        for name, mean in means.items()
        if mean.isfinite()  # a rule without sums over the k ids has no masses
    }


if importlib.util.find_spec("verl") is not None:
    for _name, _rule in SAMPLED.items():
        register(_name, _rule, "sampled")
    for _name, _rule in TOP_K.items():
        register(_name, _rule, "top_k")
