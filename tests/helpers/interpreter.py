"""Triton's interpreter without what it does in vain: faster, and to the same bits."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    _replace_once_a_launch()
    _check_no_overflow_in_vain()
    _look_dtypes_up()
    _keep_shapes()
    _broadcast_only_what_differs()
    _convert_only_what_differs()


def _replace_once_a_launch() -> None:
    """For each call of a function inside a kernel the interpreter looks through all of
    `triton.language` for what it has to replace, although the kernel's launch has replaced that."""
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


def _check_no_overflow_in_vain() -> None:
    """Each sum of integers is made again in 64 bits, for an assertion that only `debug` makes."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _look_dtypes_up() -> None:
    """Each call of the interpreter's function makes a table of all dtypes."""
    of_scalars = cache(interpreter._get_np_dtype)

    def np_dtype(type_):
        scalar = type_.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else of_scalars(scalar)

    interpreter._get_np_dtype = np_dtype


def _keep_shapes() -> None:
    """Each tensor, and each type of one, makes its shape anew, number by number."""
    make, shapes = tl.tensor.__init__, {}
    make_type, types = tl.block_type.__init__, {}

    def init(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            make(self, handle, type)
            shapes[shape] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(shapes[shape], handle=handle, type=type, dtype=type.scalar)

    def init_type(self, element_ty, shape):
        if element_ty.is_ptr():
            make_type(self, element_ty, shape)
            return
        key = element_ty, *shape
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        self.__dict__.update(types[key])

    tl.tensor.__init__, tl.block_type.__init__ = init, init_type


def _broadcast_only_what_differs() -> None:
    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and tuple(a.shape) == tuple(b.shape):
            return lhs, rhs
        return broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value


def _convert_only_what_differs() -> None:
    """Each operation seeks the type that two operands have in common, converts both, and makes a
    tensor of a number."""
    semantic = interpreter.interpreter_semantic
    convert, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    floats, integers = {"fp32", "fp64"}, {"int32", "int64"}
    constants: dict[tuple, tl.tensor] = {}

    def constant(number, beside):
        """A tensor of the other operand's type and shape; None where they may have another type in
        common."""
        if type(number) is not int:
            if type(number) is not float or beside.dtype.name not in floats:
                return None
        elif not -(2**31) <= number < 2**31:
            return None
        key = number, beside.type.name
        if key not in constants:
            made = semantic.scalar_constant(number, dtype=beside.dtype)
            made = broadcast(beside, made)[1]
            if not abs(number) > 0:  # -0.0 equals 0.0 as a key, and NaN not itself
                return made
            constants[key] = made
        return constants[key]

    def binary_op_type_checking_impl(
        lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
    ):
        beside = lhs if type(lhs) is tl.tensor else rhs
        if type(beside) is tl.tensor:
            name = beside.dtype.name
            if name in floats or name in integers:
                other = rhs if beside is lhs else lhs
                if type(other) is tl.tensor:
                    if lhs.type.name == rhs.type.name:  # which names the shape, too
                        return lhs, rhs
                elif arithmetic_check:
                    made = constant(other, beside)
                    if made is not None:
                        return (lhs, made) if beside is lhs else (made, rhs)
        return convert(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl
