"""The load-balancing loss of a mixture-of-experts student.

A model adds it to its own loss, which is not computed here. So the router's logits are recorded in
the backbone's forward, and the model's own function makes the auxiliary loss of them, over all
tokens of prompts and completions that are not padding, as in TRL's GRPO.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .patching import added_keywords, base_of

_EXPERTS = "num_experts num_local_experts n_routed_experts"
_WITHOUT = "set router_aux_loss_coef=0 to train without it"


class RouterLoss:
    """The routers' part of the loss: `coefficient` x the model's auxiliary loss."""

    def __init__(self, model: Any, coefficient: float):
        """Raises NotImplementedError for a model that computes its auxiliary loss otherwise."""
        self.coefficient = coefficient
        base = base_of(model)
        config = base.config.get_text_config()
        made = _function_of(base)
        self.experts = _first(_EXPERTS, base, config)
        self.chosen = _first("num_experts_per_tok", base, config)
        takes = [] if made is None else list(inspect.signature(made).parameters)
        if takes != ["gate_logits", "num_experts", "top_k", "attention_mask"] or None in (
            self.experts, self.chosen,
        ):  # fmt: skip
            raise NotImplementedError(
                f"router_aux_loss_coef: {type(base).__name__} has a router's loss of weight "
                f"{coefficient:g} by its config, and computes it in a way that is not known here: "
                f"{_WITHOUT}"
            )
        self._function: Callable[..., Tensor] = made

    @contextlib.contextmanager
    def recording(self, model: Any) -> Iterator[list[Any]]:
        """Lists each inner forward's router logits: a tuple of (tokens, experts) per layer.

        Raises ValueError inside where the model's checkpoints cut them off from the gradient."""
        found: list[Any] = []
        backbone = base_of(model).base_model

        def keep(module, arguments, output):
            found.append(logits := getattr(output, "router_logits", None))
            lost = logits and output[0].requires_grad and not any(z.requires_grad for z in logits)
            if lost and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
                raise ValueError(
                    "router_aux_loss_coef: the router's loss has no gradient, as where the model "
                    "itself checkpoints with use_reentrant: set gradient_checkpointing, or call "
                    'model.gradient_checkpointing_enable({"use_reentrant": False}), or '
                    f"{_WITHOUT}"
                )

        hook = backbone.register_forward_hook(keep)
        try:
            with added_keywords(backbone, output_router_logits=True):
                yield found
        finally:
            hook.remove()

    def loss(self, logits: Any, mask: Tensor) -> Tensor:
        """The auxiliary loss, without its coefficient. mask: (B, T), 0 for padding."""
        if not logits:
            raise NotImplementedError(
                f"router_aux_loss_coef: the backbone gives no router logits: {_WITHOUT}"
            )
        return self._function(logits, self.experts, self.chosen, mask)


def router_loss(model: Any, args: Any) -> RouterLoss | None:
    """The student's router loss, or None where it has none or its weight is 0.

    Raises ValueError for a coefficient for a model without routers, and with reentrant
    checkpointing, in which the router's logits carry no gradient. args: a `TrOPDConfig`.
    """
    base, given = base_of(model), args.router_aux_loss_coef
    config = base.config.get_text_config()
    routed = hasattr(config, "output_router_logits")
    # Of a model of its own transformers adds such a loss by this function alone, so that the weight
    # in the config of one without it (Llama 4) is of no loss.
    routed = routed and not (
        type(base).__module__.startswith("transformers.") and _function_of(base) is None
    )
    if given and not routed:
        raise ValueError(
            f"router_aux_loss_coef: {given:g}, but {type(base).__name__} is no mixture of experts "
            "with a router's loss: leave it out"
        )
    own = _first("router_aux_loss_coef aux_loss_coef", base, config) or 0.0
    coefficient = own if given is None else given
    experts = _first(_EXPERTS, base, config)
    if not routed or coefficient == 0 or experts == 0:  # Granite's hybrids may be dense
        return None
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get(
        "use_reentrant"
    ):
        raise ValueError(
            "gradient_checkpointing_kwargs: with use_reentrant, which TRL sets for an adapter "
            "under ZeRO-3, the router's loss has no gradient: leave it out, or set "
            f"gradient_checkpointing=False, or {_WITHOUT}"
        )
    return RouterLoss(model, coefficient)


def _function_of(model: Any) -> Any:
    """The auxiliary loss of a model's file: each has its own."""
    return getattr(inspect.getmodule(type(model)), "load_balancing_loss_func", None)


def _first(names: str, *owners: Any) -> Any:
    for owner in owners:
        for name in names.split():
            if (value := getattr(owner, name, None)) is not None:
                return value
    return None
