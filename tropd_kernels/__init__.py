"""Fused on-policy distillation losses for large vocabularies. See README.md.

The names are those of `public`, which is imported when the first of them is asked for, and torch
with it: the command line's help needs neither.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .public import *  # noqa: F403
    from .public import __all__ as __all__


def __getattr__(name: str) -> Any:
    if name == "__all__" or not name.startswith("_"):
        if find_spec(f"{__name__}.{name}") is not None:  # which may be imported before `public`
            return import_module(f".{name}", __name__)
        public = import_module(".public", __name__)
        if name in ("__all__", *public.__all__):
            return globals().setdefault(name, getattr(public, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
