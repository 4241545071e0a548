"""bfloat16 for Triton's interpreter, which keeps it as uint16 and lets numpy work on the bits.

Without the repair arithmetic and comparisons of bfloat16 give garbage and casts to it truncate,
both without an error. Repaired: casts, unary and binary operations, fma and dot. Not repaired:
atomics. The interfaces are private to Triton, hence tests/test_interpreter.py.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

REPAIRED = ("binary_op", "cast_impl", "create_dot", "create_fma", "create_fp_to_fp", "unary_op")
ORIGINAL = {name: getattr(InterpreterBuilder, name) for name in REPAIRED}


def install() -> None:
    """Repair the interpreter of this process; a second call changes nothing."""
    for name in REPAIRED:
        setattr(InterpreterBuilder, name, globals()[f"_{name}"])


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """The same values in float32, if they are bfloat16."""
    if not _is_bf16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32).reshape(handle.data.shape), tl.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    """Values of any type as bfloat16, rounded to the nearest, ties to even; NaN stays NaN."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    data = np.where(np.isnan(single), np.uint16(0x7FC0), rounded)
    return TensorHandle(data.reshape(np.shape(values)), tl.bfloat16)


def _cast_impl(self, source, target):
    if target.scalar == tl.bfloat16:
        return _narrow(_widen(source).data)
    return ORIGINAL["cast_impl"](self, _widen(source), target)


def _create_fp_to_fp(self, source, target, rounding):
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return _cast_impl(self, source, target)
    return ORIGINAL["create_fp_to_fp"](self, source, target, rounding)


def _unary_op(self, argument, operation):
    if _is_bf16(argument):
        return _narrow(operation(_widen(argument).data))
    return ORIGINAL["unary_op"](self, argument, operation)


def _binary_op(self, left, right, operation):
    if not _is_bf16(left):
        return ORIGINAL["binary_op"](self, left, right, operation)
    result = operation(_widen(left).data, _widen(right).data)
    return TensorHandle(result, tl.int1) if result.dtype == bool else _narrow(result)


def _create_fma(self, x, y, z):
    if not _is_bf16(z):
        return ORIGINAL["create_fma"](self, x, y, z)
    product = np.multiply(_widen(x).data, _widen(y).data, dtype=np.float64)
    return _narrow(product + _widen(z).data)


def _create_dot(self, a, b, accumulator, *options):
    return ORIGINAL["create_dot"](self, _widen(a), _widen(b), accumulator, *options)
