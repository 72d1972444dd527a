"""Where people train: what is served, with which version it was tested, and what switches it on.

`FRAMEWORKS` is what `tropd integrations` prints. `check_version` warns of a version that was not
tested; `replace_function` puts a function of ours before one of a framework that has no hook there,
and says so where that function is another than the one that was read.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

__all__ = [
    "FRAMEWORKS",
    "Framework",
    "check_parameters",
    "check_version",
    "fingerprint",
    "overview",
    "replace_function",
]


@dataclass(frozen=True)
class Framework:
    """One framework.

    distribution: its name on the package index; None where it is not published there.
    tested: the version that the tests ran with, or the commit that the adapter was written from.
    switch: what a user sets.
    """

    name: str
    distribution: str | None
    tested: str
    switch: str

    @property
    def installed(self) -> str | None:
        """The version that is installed here, or None."""
        try:
            return metadata.version(self.distribution) if self.distribution else None
        except metadata.PackageNotFoundError:
            return None


FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework(
            "verl",
            "verl",
            "0.9.1",
            "VERL_USE_EXTERNAL_MODULES=tropd_kernels.integrations.verl, "
            "distillation.distillation_loss.loss_mode=tropd, "
            "actor_rollout_ref.model.use_fused_kernels=true",
        ),
        Framework("veomni", "veomni", "0.1.12", "as verl, with actor.strategy=veomni"),
        Framework(
            "megatron-core", "megatron-core", "0.16.1", "as verl, with actor.strategy=megatron"
        ),
        Framework(
            "torchtitan",
            "torchtitan",
            "0.3.0",
            "loss=tropd_kernels.integrations.torchtitan.DistillationLoss.Config(...)",
        ),
        Framework(
            "nemo-automodel",
            "nemo-automodel",
            "0.7.0",
            "kd_loss_fn._target_: tropd_kernels.integrations.nemo_automodel.KDLoss",
        ),
        Framework(
            "ms-swift",
            "ms-swift",
            "4.6.0",
            "--external_plugins FILE, which calls tropd_kernels.integrations.ms_swift.install()",
        ),
        Framework(
            "skyrl",
            "skyrl",
            "0.4.0",
            "tropd_kernels.integrations.skyrl.register(NAME, ...), policy_loss_type=NAME",
        ),
        Framework(
            "prime-rl",
            None,
            "559b447",
            "trainer.loss.import_path=tropd_kernels.integrations.prime_rl.loss",
        ),
        Framework(
            "slime",
            None,
            "624b824",
            "--custom-loss-function-path tropd_kernels.integrations.slime.loss",
        ),
        Framework(
            "miles",
            None,
            "00c9154",
            "--custom-loss-function-path tropd_kernels.integrations.slime.loss",
        ),
        Framework(
            "tinker",
            "tinker",
            "0.38.0",
            "forward_backward_custom(data, tropd_kernels.integrations.tinker.custom_loss())",
        ),
    )
}


def overview() -> str:
    """What `tropd integrations` prints: each framework, the version here, the one that was tested,
    and the switch."""
    lines = []
    for framework in FRAMEWORKS.values():
        here = framework.installed or "not installed"
        if framework.distribution is None:
            here = "not on PyPI"
        elif framework.installed not in (None, framework.tested):
            here += ", untested"
        lines += [
            f"{framework.name}  here: {here}  tested: {framework.tested}",
            f"    {framework.switch}",
        ]
    return "\n".join(lines)


@functools.cache
def check_version(name: str) -> None:
    """Warns, once, where the installed version is another than the one that was tested."""
    framework = FRAMEWORKS[name]
    found = framework.installed
    if found is not None and found != framework.tested:
        warnings.warn(
            f"{name} {found} is installed, and tropd_kernels.integrations was tested with {name} "
            f"{framework.tested}: compare a first step's loss with {name}'s own",
            stacklevel=2,
        )


def fingerprint(function: Callable) -> str:
    """Twelve digits of the hash of a function's source; "" where there is no source."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def check_parameters(
    framework: str,
    owner: Any,
    name: str,
    parameters: tuple[str, ...],
    source: Callable | None = None,
) -> None:
    """Raises RuntimeError, with its name, where the function `owner.name` of a framework is missing
    or takes other parameters than those that an adapter was written for."""
    function = getattr(owner, name, None)
    found = None if function is None else tuple(inspect.signature(source or function).parameters)
    if found != parameters:
        got = "missing" if found is None else f"({', '.join(found)})"
        raise RuntimeError(
            f"{owner.__name__}.{name} is {got}, expected ({', '.join(parameters)}) as in "
            f"{framework} {FRAMEWORKS[framework].tested}: this version has another plug-in point, "
            "and only what needs none of its functions can be used"
        )


def replace_function(
    framework: str,
    owner: Any,
    name: str,
    replacement: Callable[[Callable], Callable],
    *,
    parameters: tuple[str, ...],
    expected: str,
    source: Callable | None = None,
) -> None:
    """Puts `replacement(original)` in the place of `owner.name`; a second time it does nothing.

    source: the function that was read, if another is called by that name.

    Raises RuntimeError, with the function's name, where it is missing or takes other parameters
    than those that the replacement was written for. Warns where its source is another.
    """
    original = getattr(owner, name, None)
    if getattr(original, "serves_tropd", False):
        return
    check_parameters(framework, owner, name, parameters, source)
    where = f"{owner.__name__}.{name}"
    tested = f"{framework} {FRAMEWORKS[framework].tested}"
    if fingerprint(source or original) != expected:
        warnings.warn(
            f"{where} is another than in {tested}, with which its replacement was tested: compare "
            f"a first step's loss with {framework}'s own",
            stacklevel=3,
        )
    ours = functools.wraps(original)(replacement(original))
    ours.serves_tropd = True  # type: ignore[attr-defined]
    setattr(owner, name, ours)
