"""The row engine on Triton: launches the passes of `triton_kernels`, as `triton_launch` says."""

from __future__ import annotations

import importlib
import math
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from ..objectives import TokenRule
from . import triton_launch
from .engine import RowEngine, Statistics
from .layout import LogitTransform, Matrices, RowBatch, RowOptions, matrices
from .rewards import log_shares
from .rule import Sums
from .topk_teacher import topk_teacher_ids, topk_teacher_least
from .torch_rows import row_squares
from .triton_launch import (
    COLUMNS,
    FUSION_OFF,
    block_options,
    lanes_hold,
    parts_of_row,
    power_of_two,
    tile_options,
)

#: Rows of one program of the rule kernel.
RULE_BLOCK = 128


class TritonRows(RowEngine):
    """The passes of `rows.engine` as kernels, the gate and the rule among them."""

    pads_rows = True

    @cached_property
    def kernels(self) -> ModuleType:
        """Imported by the first pass: a plan may ask about this engine where Triton is missing."""
        return importlib.import_module(".triton_kernels", __package__)

    def forward(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Matrices:
        rule, n = options.rule, batch.student.shape[0]
        stats, coefs, _ = self.statistics(batch, options, into)
        if n == 0:
            return stats, coefs
        sums = None
        dense = batch.teacher is not None
        if dense and rule.uses_sums and not rule.sums_from_statistics:
            sums = self._dense_sums(batch, options, stats, coefs)
        elif batch.ids is not None:
            sums = self._topk_teacher_sums(batch, options, stats, coefs)
        self.kernels.rule_kernel[(-(-n // RULE_BLOCK),)](
            *_gate_inputs(batch, rule), batch.mixing, batch.task_advantages, batch.token_weight,
            options.loss_scale, stats, coefs, sums, n,
            _columns(stats, coefs),
            ACC=self._acc(stats), **_gate_constants(rule), **_reward_constants(rule),
            **_rule_constants(rule, batch.student.shape[1]), DENSE=dense, BLOCK=RULE_BLOCK,
            **FUSION_OFF,
        )  # fmt: skip
        return stats, coefs

    def statistics(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Statistics:
        stats, coefs = matrices(batch, into)
        if batch.student.shape[0] == 0:
            return Statistics(stats, coefs)
        z, t = _rows(batch.student), None if batch.teacher is None else _rows(batch.teacher)
        n, vocab_size = z.shape
        # From the student's logits only, so that `entropy` gets the same bits without a teacher.
        launch = tile_options(
            vocab_size, stats.dtype, z.element_size(), triton_launch.STATISTICS_UNROLL
        )
        parts = parts_of_row(n, vocab_size, launch["UNROLL"] * launch["LANES"])
        has_mean = options.rule.label_smoothing != 0
        scratch = None if parts == 1 else stats.new_empty((10 if has_mean else 8, parts, n))
        arguments = (
            z, t, _bias(options.student), _bias(options.teacher), batch.labels,
            batch.label_log_probs, batch.teacher_entropy, stats, coefs, scratch, vocab_size,
            z.stride(0), 0 if t is None else t.stride(0), _columns(stats, coefs),
        )  # fmt: skip
        constants = dict(
            ACC=self._acc(stats), **_transforms(options), HAS_MEAN=has_mean, PARTS=parts, **launch
        )
        self.kernels.statistics_kernel[(n, parts)](*arguments, **constants)
        if parts > 1:
            self.kernels.join_kernel[(n,)](*arguments, **constants)
        return Statistics(stats, coefs)

    def sums(
        self, batch: RowBatch, options: RowOptions, needed: Tensor | None, found: Statistics
    ) -> Sums:
        """The kernel itself finds the rows that need them."""
        make = self._topk_teacher_sums if needed is None else self._dense_sums
        made = make(batch, options, found.stats, found.coefs)
        assert made is not None  # the rule has sums
        return Sums(*made)

    def _dense_sums(
        self, batch: RowBatch, options: RowOptions, stats: Tensor, coefs: Tensor
    ) -> Tensor:
        """(SUMS, n)."""
        assert batch.teacher is not None
        rule, z, t = options.rule, _rows(batch.student), _rows(batch.teacher)
        n, vocab_size = z.shape
        sums = coefs.new_empty((self.kernels.SUMS, n))
        logit_size = min(z.element_size(), t.element_size())
        # 16 warps lack registers where rows are not aligned, and thus read number by number, and
        # where a thread's 16 bytes are 8 logits.
        aligned = z.stride(0) % 16 == t.stride(0) % 16 == 0
        few = not rule.sums_of_every_row and aligned and logit_size >= 4
        k = rule.top_k if rule.uses_top_k else None
        launch = tile_options(
            vocab_size, coefs.dtype, logit_size, triton_launch.SUMS_UNROLL,
            triton_launch.ASKED_WARPS if few else None,
        )  # fmt: skip
        self.kernels.dense_sums_kernel[(n,)](
            z, t, _bias(options.student), _bias(options.teacher), *_gate_inputs(batch, rule),
            stats, coefs, sums, vocab_size, z.stride(0), t.stride(0), _columns(stats, coefs),
            ACC=self._acc(coefs), **_transforms(options), **_gate_constants(rule),
            **_generator_constants(rule), TOP_K=k,
            TAIL=rule.top_k_tail, HAS_KL=rule.uses_forward_kl and not rule.weighs_by_gaps,
            THRESHOLD_GIVEN=options.sharded,
            BY_LANES=k is not None and lanes_hold(k, launch["LANES"]),
            SEARCH_BLOCK=min(1024, launch["LANES"]), **launch,
        )  # fmt: skip
        return sums

    def _topk_teacher_sums(
        self, batch: RowBatch, options: RowOptions, stats: Tensor, coefs: Tensor
    ) -> Tensor | None:
        """(SUMS, n) over a top-k teacher's K, None where the rule has no sums. Writes the teacher's
        entropy into stats where the teacher does not give it."""
        rule, z = options.rule, _rows(batch.student)
        n, vocab_size = z.shape
        unknown = batch.teacher_entropy is None
        if not (rule.uses_sums or unknown):
            return None
        sums = coefs.new_empty((self.kernels.SUMS, n)) if rule.uses_sums else None
        k = batch.topk[0].shape[1]
        ids, ordered = _topk_ids(batch, rule, vocab_size), None
        if rule.uses_sums and rule.top_k_tail == "bucket":
            ordered = _sorted_ids(batch, rule, vocab_size)
        launch = {} if ordered is None else block_options(vocab_size, coefs.dtype)
        self.kernels.topk_teacher_sums_kernel[(n,)](
            z, _bias(options.student), *ids, ordered, stats, coefs, sums,
            vocab_size, z.stride(0), k, _columns(stats, coefs), ACC=self._acc(coefs),
            **_transform("", options.student), **_generator_constants(rule), TAIL=rule.top_k_tail,
            ENTROPY_UNKNOWN=unknown, BLOCK=power_of_two(k), TILE=launch.pop("BLOCK", None),
            **(launch or FUSION_OFF),
        )  # fmt: skip
        return sums

    def gradient(self, batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
        rule, z = options.rule, _rows(batch.student)
        teacher = batch.teacher if rule.reads_teacher_rows else None
        t = None if teacher is None else _rows(teacher)
        n, vocab_size = z.shape
        if n == 0:
            return
        coefs = _rows(coefs)
        common = dict(
            ACC=self._acc(coefs),
            HAS_ENTROPY=rule.entropy_coef != 0,
            HAS_P_TOP_K=rule.uses_top_k and rule.p_differs_on_k,
            HAS_UNIFORM=rule.label_smoothing != 0,
            **_generator_constants(rule),
        )
        topk_ids = id_logits = None
        if batch.ids is not None and rule.uses_sums:
            topk_ids = _topk_ids(batch, rule, vocab_size)
            if _share_memory(z, out):
                id_logits = z.gather(1, topk_ids[0].clamp(0, vocab_size - 1))
        launch = block_options(vocab_size, coefs.dtype)
        parts = parts_of_row(n, vocab_size, launch["BLOCK"])
        self.kernels.gradient_kernel[(n, parts)](
            z, t, _bias(options.student), _bias(options.teacher), batch.labels, coefs, out,
            vocab_size, z.stride(0), 0 if t is None else t.stride(0), coefs.stride(0),
            out.stride(0), HAS_REVERSE=rule.uses_reverse_kl, HAS_TOP_K=rule.uses_top_k,
            **_transforms(options), **common, PARTS=parts, **launch,
        )  # fmt: skip
        if topk_ids is not None:
            k = topk_ids[0].shape[1]
            self.kernels.topk_teacher_grad_kernel[(n,)](
                *topk_ids, z if id_logits is None else None, id_logits, _bias(options.student),
                batch.labels, coefs, out, vocab_size, k, z.stride(0), coefs.stride(0),
                out.stride(0), **_transform("", options.student), **common,
                BLOCK=power_of_two(k), **FUSION_OFF,
            )  # fmt: skip

    def column_sums(self, d_logits: Tensor, hidden: Tensor) -> Tensor:
        d_logits = _rows(d_logits)
        n, vocab_size = d_logits.shape
        sums = hidden.new_empty((3, vocab_size))
        self.kernels.column_sums_kernel[(-(-vocab_size // COLUMNS["BLOCK"]),)](
            d_logits, hidden.contiguous(), sums, n, vocab_size, d_logits.stride(0),
            ACC=self._acc(hidden), **COLUMNS,
        )  # fmt: skip
        return sums

    def row_squares(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return row_squares(matrix, dtype)

    def _acc(self, like: Tensor):
        return self.kernels.accumulator(like.dtype)


# --- arguments ---------------------------------------------------------------------------------


def _topk_ids(
    batch: RowBatch, rule: TokenRule, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A top-k teacher's ids and log-probs (n, K), and the least (n,) of those in the rule's K."""
    ids, log_probs = (each.contiguous() for each in batch.topk)
    least = topk_teacher_least(ids, log_probs, rule.top_k, vocab_size) if rule.uses_sums else None
    return ids, log_probs, least


def _sorted_ids(batch: RowBatch, rule: TokenRule, vocab_size: int) -> Tensor:
    """The ids of a top-k teacher's K (n, K) in ascending order, vocab_size at padding."""
    ids, log_probs = topk_teacher_ids(*batch.topk, rule.top_k, vocab_size)
    return ids.masked_fill(log_probs == -math.inf, vocab_size).sort(-1).values


def _gate_inputs(batch: RowBatch, rule: TokenRule) -> tuple[Tensor | None, ...]:
    prefix = batch.teacher_prefix if rule.prefix_weight is not None else None
    return batch.old_log_probs, batch.advantages, batch.uniforms, prefix


def _columns(stats: Tensor, coefs: Tensor) -> int:
    """The row stride of these matrices, which may be columns of wider ones."""
    assert stats.stride() == coefs.stride() and stats.stride(1) == 1
    return stats.stride(0)


def _rows(matrix: Tensor) -> Tensor:
    """With unit stride along a row, as the kernels read it."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    storages = (t.untyped_storage().data_ptr() for t in (a, b))
    return a.dtype == b.dtype and len(set(storages)) == 1


def _bias(how: LogitTransform) -> Tensor | None:
    """At least float32, as the logits are: with two widths, threads would exchange one of them."""
    if how.bias is None:
        return None
    return how.bias.to(torch.promote_types(how.bias.dtype, torch.float32))


def _transform(prefix: str, how: LogitTransform) -> dict:
    constants = {"SCALE": how.scale, "CAP": how.softcap}
    return {prefix + k: v for k, v in constants.items()} | {"TEMPERATURE": how.temperature}


def _transforms(options: RowOptions) -> dict:
    return _transform("TEACHER_", options.teacher) | _transform("", options.student)


def _generator_constants(rule: TokenRule) -> dict:
    return {"GENERATOR": rule.generator, "PARAMETER": rule.divergence_parameter}


def _log_shares(rule: TokenRule) -> tuple[float | None, float | None]:
    kind, parameter = rule.reward_transform
    if kind != "proximal":
        return None, None
    assert parameter is not None
    return log_shares(parameter)


def _gate_constants(rule: TokenRule) -> dict:
    log_share, log_rest = _log_shares(rule) if rule.gates_transformed else (None, None)
    return {
        "GATE": rule.gate,
        "OUTLIER": rule.outlier,
        "THRESHOLD": rule.threshold,
        "KL_ENTROPY": rule.forward_kl_entropy,
        "KL_WEIGHT": rule.kl_weights[0],
        "SUMS_OF_EVERY_ROW": rule.sums_of_every_row,
        "FROM_CURRENT": rule.reward_policy == "current",
        "MIX_LOG_SHARE": log_share,
        "MIX_LOG_REST": log_rest,
        "BY_GAPS": rule.weighs_by_gaps,
    }


def _reward_constants(rule: TokenRule) -> dict:
    kind, parameter = rule.reward_transform
    log_share, log_rest = _log_shares(rule)
    return {
        "TRANSFORM": kind,
        "TRANSFORM_PARAMETER": parameter,
        "LOG_SHARE": log_share,
        "LOG_REST": log_rest,
        "REWARD_LOW": rule.clip_reward_low,
        "REWARD_HIGH": rule.clip_reward_high,
        "TASK_WEIGHT": rule.task_weight,
        "REWARD_FILTER": rule.reward_filter,
    }


def _rule_constants(rule: TokenRule, vocab_size: int) -> dict:
    nll, smoothed = rule.label_weights
    return {
        "GENERATOR": rule.generator,
        "TAIL": rule.top_k_tail,
        "REVERSE_KL_WEIGHT": rule.kl_weights[1],
        "POLICY": rule.policy_gradient,
        "CLIP_LOW": rule.clip_ratio_low,
        "CLIP_HIGH": rule.clip_ratio_high,
        "PREFIX_WEIGHT": rule.prefix_weight,
        "NLL": nll,
        "SMOOTHED": smoothed,
        "UNIFORM": smoothed / vocab_size,
        "ENTROPY_COEF": rule.entropy_coef,
        "Z_LOSS": rule.z_loss,
        "USES_TEACHER": rule.uses_teacher,
        "USES_FORWARD_KL": rule.uses_forward_kl,
        "USES_REVERSE_KL": rule.uses_reverse_kl,
        "USES_TOP_K": rule.uses_top_k,
    }
