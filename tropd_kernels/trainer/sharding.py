"""Models whose parameters are stored in shards: FSDP2 and DeepSpeed's ZeRO-3.

| who     | what FSDP2 does                             | what ZeRO-3 does                        |
|---------|---------------------------------------------|-----------------------------------------|
| student | accelerate wraps it, a unit for each layer  | the engine gathers the head when the    |
|         | and one for the last norm and the head      | loss, in the student's forward, asks it |
| teacher | `_shard_frozen`: a unit for each layer, and | TRL's `prepare_deepspeed`               |
|         | one for the rest, given back after the loss |                                         |

Both replace the parameters that were read when the trainer was made, so each call reads the head
again (`heads.current`). The loss must run in the forward of the wrapped student, where FSDP2 and
ZeRO-3 hold the whole head and reduce its gradient.

Processes that share parameters also generate together: each token is a gather, in which all take
part until the last of them has finished its completions.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from trl.models.utils import prepare_deepspeed

from ..heads import Head, read_head
from .patching import base_of


def fsdp_version(accelerator: Any) -> int | None:
    """1 or 2; None without FSDP."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return None if plugin is None else plugin.fsdp_version


def is_zero_3(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def is_sharded(accelerator: Any) -> bool:
    return is_zero_3(accelerator) or fsdp_version(accelerator) is not None


def generates_together(accelerator: Any) -> bool:
    """Whether the processes need each other for every token of a forward."""
    return is_sharded(accelerator) and accelerator.num_processes > 1


def refuse_fsdp_1(accelerator: Any) -> None:
    if fsdp_version(accelerator) == 1:
        raise NotImplementedError(
            "FSDP: its first version flattens the head together with other parameters, so that the "
            "loss cannot read it: set fsdp_version to 2 (FSDP_VERSION=2)"
        )


def refuse_dtensors(name: str, model: nn.Module) -> None:
    """Call it before accelerate shards the model: accelerate does not know such parameters."""
    for parameter, tensor in model.named_parameters():
        if getattr(tensor, "device_mesh", None) is not None:
            raise NotImplementedError(
                f"{name}: its {parameter} is a DTensor, as tensor parallelism (tp_plan) makes: "
                "load it whole, and let accelerate shard it (FSDP2, ZeRO-3). In a loop of your own "
                "linear_distillation_loss takes such a head"
            )


def check_backbone(model: nn.Module) -> None:
    base = base_of(model)
    if base.base_model is base:
        raise NotImplementedError(
            f"a {type(base).__name__} has no backbone at its base_model, where TRL's trainer looks "
            "for hidden states: choose another model, or call linear_distillation_loss with what "
            "heads.read_head finds"
        )


def read_head_form(model: nn.Module, sharded: bool) -> Head:
    """`read_head` with its check, but without the parameters, which `heads.current` reads.

    Kept here, they would be the whole head besides its shards.

    sharded: the model stays on the CPU until it is sharded, where it may not run at all
    (flash-attention). It is checked only if its config leaves a doubt. If ZeRO-3 has partitioned
    the model while loading it, only the head is gathered and nothing can be checked.
    """
    check_backbone(model)
    holder = model.get_output_embeddings()  # type: ignore[operator]
    parts = [] if holder is None else list(holder.parameters())
    if any(hasattr(part, "ds_id") for part in parts):
        head = _partitioned_head(model, parts)
    elif sharded:
        try:
            head = read_head(model)
        except ValueError:
            head = read_head(model, verify=True)
    else:
        head = read_head(model, verify=True)
    return replace(head, weight=head.weight.detach().new_empty(0), bias=None)


def _partitioned_head(model: nn.Module, parts: list[nn.Parameter]) -> Head:
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        try:
            return read_head(model)
        except ValueError as error:
            raise ValueError(
                f"{error}. ZeRO-3 has partitioned this model while loading it: load it before the "
                "TrOPDConfig is made and pass the model itself, which then is whole and is checked"
            ) from error


def reshard(model: Any) -> None:
    """Frees what FSDP2 leaves gathered after a forward without a backward.

    That is the outermost unit: here embedding, last norm and head.
    """
    if hasattr(model, "reshard"):
        model.reshard()


def weights_are_finite(model: nn.Module) -> bool:
    """Whether no trained parameter holds NaN or infinity in this process's part.

    Reads the weights once, as generation does for each token.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    sums = [_part(p).detach().sum(dtype=torch.float32) for p in trained]
    return not sums or bool(torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all())


def _part(parameter: Any) -> Tensor:
    """The part of a parameter that this process stores."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3's, padded with uninitialized memory
        part = parameter.ds_tensor
        before = torch.distributed.get_rank(parameter.ds_process_group) * part.numel()
        return part[: max(parameter.ds_numel - before, 0)]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def holds_on_all(accelerator: Any, here: bool) -> bool:
    """Whether a condition holds on every process: a collective."""
    flag = torch.tensor([here], device=accelerator.device)
    return bool(accelerator.gather(flag).all())


def check_images(accelerator: Any, here: bool) -> None:
    """Raises ValueError on all processes that share parameters where some are to run the layers
    that read images and others not: those gather these layers, and these the next ones.

    A collective, if they share parameters. here: whether this process has images.
    """
    if not generates_together(accelerator):
        return
    found = accelerator.gather(torch.tensor([here], device=accelerator.device))
    if found.any() and not found.all():
        raise ValueError(
            "images: some processes have images in this batch and others none, and under FSDP or "
            "ZeRO-3 all of them have to run the layers that read images: give each row an image "
            "(a blank one where there is none), or train by DDP"
        )


def prepare_frozen(model: nn.Module, accelerator: Any) -> Any:
    """The model under the run's engine, for forwards without a backward."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(model, accelerator)
    if fsdp_version(accelerator):
        return _shard_frozen(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _shard_frozen(model: nn.Module, accelerator: Any) -> nn.Module:
    """The model under FSDP2, with a unit for each of its layers.

    accelerate prepares only one model, and TRL would make the whole model one unit, gathered at
    once.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    mesh = getattr(accelerator, "torch_device_mesh", None)
    options: dict[str, Any] = dict(
        offload_policy=plugin.cpu_offload,
        mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        mesh=None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    )
    if not all(p.is_floating_point() for p in model.parameters()):
        raise NotImplementedError(
            "teacher_model: FSDP2 cannot shard quantised weights: load the teacher in bfloat16, or "
            "serve it (teacher_model_server_url)"
        )
    model.requires_grad_(False)
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed(list(model.modules())):  # inner modules first
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model
