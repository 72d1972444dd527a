"""Triton's interpreter at three times its speed, to the same bits.

For each call of a function inside a kernel it looks through all of `triton.language` for what it
has to replace, although the kernel's launch has replaced that. Here a launch does so once.
"""

from __future__ import annotations

from functools import cache

import triton.language as tl
from triton.runtime import interpreter


def replace_once_a_launch() -> None:
    replace, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    replaced: set[str] = set()  # in the launch that runs

    @cache
    def modules(function) -> frozenset[str]:
        """Under which names of the language the interpreter finds something to replace for it."""
        seen = function.__globals__.values()
        return frozenset(m.__name__ for m in (tl, tl.core) if any(v is m for v in seen))

    def replace_what_is_left(function):
        if modules(function) <= replaced:
            return None  # only a launch, which is the first to call, uses the scope
        replaced.update(modules(function))
        return replace(function)

    def restore_and_forget(scope) -> None:
        restore(scope)
        replaced.clear()

    interpreter._patch_lang = replace_what_is_left
    interpreter._LangPatchScope.restore = restore_and_forget
