"""verl's training step without logits: hidden states and the head go into the loss.

With `actor_rollout_ref.model.use_fused_kernels=true` the FSDP engine's model computes log-probs in
its own forward, and a top-k loss has no place. `FusedEngine` is that engine with the loss in the
forward of the head. verl's registry of engines looks for one of the vendor first, and verl's own
are of none: registering is all that it takes, and nothing of verl is replaced.

    forward_step           whose loss is it? If one of `RULES`, the batch's rows are put by
    the model's forward    backbone, then the head, in whose forward FSDP has it whole:
                           `linear_distillation_loss`, losses per token, no logits
    prepare_model_outputs  verl carries losses and masses; this adds the gate's M and the like

The losses are per token, since verl masks, clamps and averages them: so the backward computes the
logits of a chunk a second time. For every other loss, for old log-probs and for validation the
engine and the model's forward are verl's own; but verl 0.9.1's fused forward fails where FSDP 2 has
the head as a unit of its own (verl#5633), and its log-probs then come from here, too.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.models.transformers.dense_common import CausalLMOutputForPPO
from verl.workers.engine import (
    EngineRegistry,
    FSDPEngineWithLMHead,
    MegatronEngineWithLMHead,
    VeOmniEngineWithLMHead,
)

from ..heads import read_head
from .frameworks import check_parameters, check_version
from .heads import in_head
from .verl_batch import rows_of, rule_of
from .verl_replaced import CURRENT, take_over_hidden
from .verl_request import Request, asks, configs_of, request_of

#: (device, vendor) of verl's platforms.
PLATFORMS = (("cuda", "nvidia"), ("cuda", "amd"), ("npu", "huawei"))
_OF_ENGINES = {
    "forward_step": ("self", "micro_batch", "loss_function", "forward_only"),
    "prepare_model_inputs": ("self", "micro_batch"),
    "prepare_model_outputs": (
        "self", "output", "output_args", "micro_batch", "logits_processor_func"
    ),
}  # fmt: skip
#: What verl itself takes from the model's output to the loss.
_CARRIED_BY_VERL = ("distillation_losses", "student_mass", "teacher_mass")


@dataclass
class FusedOutput(CausalLMOutputForPPO):
    """verl's output of a fused forward, with the losses. They leave the model with its output:
    FSDP gathers the head again for the backward of what does."""

    distillation_losses: Tensor | None = None
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None

    @property
    def fused_linear_aux(self) -> FusedOutput:
        """Where verl looks for the three."""
        return self


class FusedLoss:
    """What a fused engine has beside verl's."""

    tropd_sampled = True  # whether it forms the losses of sampled teachers, too
    tropd_request: Request | None = None
    _tropd_configs: tuple[Any, Any] | None = None

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """verl's, with the loss in the model's forward if it is one of ours."""
        self._tropd_configs = configs_of(loss_function, self.tropd_sampled)
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore
        finally:
            self._tropd_configs = self.tropd_request = None

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict, dict]:
        """verl's, and the request."""
        inputs, arguments = super().prepare_model_inputs(micro_batch)  # type: ignore[misc]
        self.tropd_request = None
        if self._tropd_configs is not None and asks(micro_batch, "use_fused_kernels"):
            actor, distillation = self._tropd_configs
            rule = rule_of(distillation)
            if not asks(micro_batch, "use_remove_padding", True):
                raise ValueError(
                    "a fused distillation loss takes packed rows: set "
                    "actor_rollout_ref.model.use_remove_padding=true, or use_fused_kernels=false"
                )
            rows = rows_of(actor, distillation, micro_batch, pad=arguments["pad_size"])
            self.tropd_request = request_of(distillation, micro_batch, rule, rows)
        return inputs, arguments

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: Any, logits_processor_func: Any
    ) -> dict:
        """verl's, and what else the request found, nested as verl nests the losses."""
        found = super().prepare_model_outputs(  # type: ignore[misc]
            output, output_args, micro_batch, logits_processor_func
        )
        if self.tropd_request is not None:
            more = dict(self.tropd_request.found)
            if "distillation_losses" not in found:  # a sampled teacher's
                more["distillation_losses"] = output.distillation_losses.squeeze(0)
            offsets = micro_batch["input_ids"].offsets()
            for name, rows in more.items():
                rows = self._gather_and_unpad_packed(rows, output_args["pad_size"])  # type: ignore
                found[name] = torch.nested.nested_tensor_from_jagged(rows, offsets)
        return found


class FusedEngine(FusedLoss, FSDPEngineWithLMHead):
    """verl's FSDP engine with the loss in the forward of the model's head."""

    def _build_module(self) -> Any:
        module = super()._build_module()
        verls = module.forward

        # The request is no argument: FSDP casts what a model is given to the parameters' dtype.
        @functools.wraps(verls)
        def forward(*arguments: Any, **named: Any) -> Any:
            request, labels = self.tropd_request, named.get("shift_labels")
            if request is None and labels is not None and is_sharded_alone(module):
                request = Request(labels.squeeze(0))
            if request is None:
                return verls(*arguments, **named)
            check_forward(module, getattr(verls, "__func__", verls).__module__)
            return fused_forward(module, request, *arguments, **named)

        module.forward = forward
        return module


class FusedVeOmni(FusedLoss):
    """The same for VeOmni, whose models call a function of hidden states and head, of which
    `verl_replaced.take_over_hidden` takes what is for a loss of ours. Losses of sampled teachers
    are those of its log-probs."""

    tropd_sampled = False

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """verl's, and behind it no request is left."""
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            CURRENT.set(None)

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict, dict]:
        """verl's; the function of hidden states finds the request."""
        inputs, arguments = super().prepare_model_inputs(micro_batch)
        CURRENT.set(self.tropd_request)
        return inputs, arguments


def is_sharded_alone(module: Any) -> bool:
    """Whether the head is a unit of its own under FSDP 2, as verl 0.9.1 has it beside an embedding
    that is not tied to it: then verl's fused forward finds a piece of it and fails."""
    weight = getattr(module.get_output_embeddings(), "weight", None)
    return hasattr(weight, "full_tensor")


def fused_forward(
    module: Any,
    request: Request,
    *arguments: Any,
    temperature: float = 1.0,
    return_dict: bool = True,
    shift_labels: Any = None,  # the request has them
    **named: Any,
) -> FusedOutput:
    """The backbone, and what is asked (1, n) of its hidden states (1, n, H), computed in the head's
    own forward: there FSDP has it whole, and gathers it again for the backward."""
    head, linear = read_head(module), module.get_output_embeddings()
    hidden = head.backbone(*arguments, **named).last_hidden_state
    settings = dict(logit_scale=head.logit_scale, softcap=head.softcap, temperature=temperature)
    found = in_head(
        linear,
        hidden,
        lambda hidden, weight, bias: request.of_head(
            hidden.squeeze(0), weight, bias=bias, **settings
        ),
    )
    carried = ("log_probs", "entropy", *_CARRIED_BY_VERL)
    return FusedOutput(**{n: found[n][None].clone() for n in carried if n in found})


def check_forward(module: Any, written_in: str) -> None:
    """Raises NotImplementedError for a model whose forward verl has replaced by one that does more
    than call a backbone and a head. written_in: the forward's module."""
    if written_in.startswith("verl.") and not written_in.endswith(".dense_common"):
        raise NotImplementedError(
            f"{type(module).__name__} has a forward of verl's own ({written_in}), which does more "
            "than call a backbone and a head: set actor_rollout_ref.model.use_fused_kernels=false"
        )


def check_engine(engine: type) -> None:
    """Raises RuntimeError, with its name, for a method before which `FusedLoss` puts one, if it
    takes other arguments."""
    for name, parameters in _OF_ENGINES.items():
        check_parameters("verl", engine, name, parameters)


def veomni_engine() -> type:
    """The engine for veomni."""
    from veomni.ops.kernels import cross_entropy

    check_version("veomni")
    take_over_hidden(cross_entropy)
    return type("FusedVeOmniEngine", (FusedVeOmni, VeOmniEngineWithLMHead), {})


def megatron_engine() -> type:
    """The engine for megatron."""
    from .verl_megatron import FusedMegatronEngine

    return FusedMegatronEngine


def register_engines(platforms: tuple = PLATFORMS) -> None:
    """Makes verl take `FusedEngine` for fsdp and fsdp2, and their likes for veomni and megatron,
    where these are there. One of the latter that is another than was read is warned of and stays
    verl's: FSDP needs none of it."""
    check_engine(FSDPEngineWithLMHead)
    engines: dict[str, type] = {"fsdp": FusedEngine, "fsdp2": FusedEngine}
    for strategy, verls, ours in (
        ("veomni", VeOmniEngineWithLMHead, veomni_engine),
        ("megatron", MegatronEngineWithLMHead, megatron_engine),
    ):
        if verls is not None:
            try:
                engines[strategy] = ours()
            except (ImportError, RuntimeError) as why:
                warnings.warn(f"verl's {strategy} engine stays verl's own: {why}", stacklevel=2)
    for strategy, engine in engines.items():
        known = EngineRegistry._engines["language_model"][strategy]
        for device, vendor in platforms:
            # Megatron's engine on an NPU is another: MindSpeed's.
            if (device, vendor) not in known and (strategy, device) != ("megatron", "npu"):
                EngineRegistry.register("language_model", strategy, device, vendor)(engine)


register_engines()
