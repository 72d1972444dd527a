"""verl's Megatron engine without logits: hidden states and this rank's part of the head go into the
loss.

With `use_fused_kernels` verl hands both, in the forward of Megatron's model and behind its gather
of the sequence, to one function that gives log-probs: `verl_replaced.take_over_head` computes the
loss there, over the tensor-parallel group. `FusedMegatron` says what is asked of it and puts what
it found beside verl's log-probs. In a pipeline only the last stage has a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import parallel_state
from torch import Tensor
from verl.models.mcore import model_forward_fused, util
from verl.utils.device import get_device_id
from verl.utils.kernel import linear_cross_entropy
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine import MegatronEngineWithLMHead

from .frameworks import check_parameters, check_version
from .verl_batch import rows_of, rule_of
from .verl_replaced import CURRENT, as_megatron, take_over_head
from .verl_request import asks, configs_of, request_of

_OF_A_STEP = (
    "self",
    "batch_iter",
    "model",
    "logits_processor_func",
    "postprocess_micro_batch_func",
)

check_version("megatron-core")
check_parameters("verl", MegatronEngineWithLMHead, "forward_step", _OF_A_STEP)
check_parameters(
    "verl", MegatronEngineWithLMHead, "_get_context_parallel_layout", ("unwrapped_model",)
)
take_over_head(model_forward_fused, linear_cross_entropy)


class FusedMegatron:
    """What the engine has beside verl's."""

    def forward_step(
        self,
        batch_iter: Iterator,
        model: Any,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Callable,
    ) -> tuple[Any, Callable]:
        """verl's of one micro-batch, with the loss in the model's forward if it is one of ours."""
        batch = next(batch_iter).to(get_device_id())
        fused = asks(batch, "use_fused_kernels", self.engine_config.use_fused_kernels)  # type: ignore[attr-defined]
        configs = configs_of(logits_processor_func, sampled=fused)
        request = None
        if configs is not None:
            self.check_layout(model)
        if configs is not None and fused:
            rows = rows_of(*configs, batch)
            rows, _ = as_megatron(rows, batch["input_ids"].offsets(), "thd")
            request = request_of(configs[1], batch, rule_of(configs[1]), rows)
            request.sums_d_hidden = self.tf_config.sequence_parallel  # type: ignore[attr-defined]
        CURRENT.set(request)
        try:
            output, loss = super().forward_step(  # type: ignore[misc]
                iter([batch]), model, logits_processor_func, postprocess_micro_batch_func
            )
        finally:
            CURRENT.set(None)
        if request is not None and request.found:
            output |= {n: as_verl(v, batch["input_ids"]) for n, v in request.found.items()}
        return output, loss

    def check_layout(self, model: Any) -> None:
        """Raises NotImplementedError where context parallelism lays rows out in another way than
        `as_megatron` and `as_verl`."""
        why = None
        layout = self._get_context_parallel_layout(unwrap_model(model))  # type: ignore[attr-defined]
        if self.engine_config.dynamic_context_parallel:  # type: ignore[attr-defined]
            why = "no dynamic_context_parallel"
        elif layout != "zigzag" and parallel_state.get_context_parallel_world_size() > 1:
            why = f"context parallelism in the layout 'zigzag' alone, and this model has {layout!r}"
        if why is not None:
            raise NotImplementedError(
                f"with use_fused_kernels, or of a top-k teacher, a distillation loss takes {why}: "
                "leave it out, or set actor_rollout_ref.model.use_fused_kernels=false and take a "
                "loss of a sampled teacher (tropd_opd, tropd_mask, ...)"
            )


def as_verl(rows: Tensor, input_ids: Tensor) -> Tensor:
    """Rows in Megatron's layout as verl nests them."""
    packed = util.preprocess_thd_engine(input_ids, pre_process=False)[1]
    return util.postprocess_thd_engine(rows[None], packed, input_ids, len(input_ids))


class FusedMegatronEngine(FusedMegatron, MegatronEngineWithLMHead):
    """verl's engine with the loss in the forward of the model's head."""
