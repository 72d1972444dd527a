"""`tropd check`: gradients of the best backend here against the reference in float64."""

from __future__ import annotations

import torch

from .backends import choose_backend
from .functional import linear_distillation_loss
from .objectives import GKD, OPD, TokenRule, TrOPD
from .teachers import HiddenTeacher

#: Largest relative error of a float32 gradient that is accepted, against float64.
TOLERANCE = 1e-4


def check(device: str | None = None) -> bool:
    """Prints the errors of four objectives; whether the worst of them is accepted. None takes a GPU
    if there is one. Raises ValueError for a device that cannot be used here."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as fault:
        reason = str(fault).splitlines()[0]
        raise ValueError(f"--device {device}: it cannot be used here: {reason}") from fault
    backend = choose_backend(None, torch.device(device))
    print(f"backend {backend} on {device}, against the reference in float64")
    rules = {
        "tropd": TrOPD(),
        "opd": OPD(),
        "gkd": GKD(),
        "tropd, whole vocabulary": TrOPD(top_k=None),
    }
    errors = {name: gradient_error(rule, backend, device) for name, rule in rules.items()}
    for name, error in errors.items():
        print(f"  {name:<24} {error:.1e}")
    worst = max(errors.values())
    print(f"worst gradient error {worst:.1e}: {'passed' if worst <= TOLERANCE else 'FAILED'}")
    return worst <= TOLERANCE


def gradient_error(rule: TokenRule, backend: str, device: str) -> float:
    """Largest relative error, in norm, of the gradients of hidden states and head: 96 tokens, 4,099
    ids, float32."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden, teacher_hidden = normal(96, 64), normal(96, 48)
    weight, teacher_weight = normal(4099, 64, scale=0.3), normal(4099, 48, scale=0.3)
    labels = torch.randint(4099, (96,), generator=draw)
    uniforms = torch.rand(96, generator=draw)

    def gradients(backend: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        h, w = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
        teacher = HiddenTeacher(teacher_hidden.to(device, dtype), teacher_weight.to(device, dtype))
        linear_distillation_loss(
            h, w, labels.to(device), teacher, rule, uniforms=uniforms.to(device), backend=backend
        ).loss.backward()
        return [h.grad.double().cpu(), w.grad.double().cpu()]

    pairs = zip(
        gradients(backend, torch.float32, device), gradients("reference", torch.float64, "cpu")
    )
    return max(float((ours - true).norm() / true.norm()) for ours, true in pairs)
