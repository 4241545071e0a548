"""Calls that the kernels of several operators cannot serve."""

import torch
from torch import Tensor

MAX_WIDTH = 8192  # a row stays in the registers of one program; in float64 half of that does
_NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = (*_NATIVE_TYPES, torch.float64)


def refuse_types(*given: Tensor | torch.dtype | None) -> str | None:
    """Why the Triton kernels cannot read these tensors or write these dtypes; None if they can."""
    return _refuse(given, _TYPES)


def refuse_native(*given: Tensor | torch.dtype | None) -> str | None:
    """Why the C++ kernels over rows cannot; None if they can."""
    return _refuse(given, _NATIVE_TYPES)


def refuse_rows(x: Tensor, *others: Tensor | torch.dtype | None) -> str | None:
    """Why the rows of ``x`` cannot be held or the others not served; None if they can."""
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        return f"it takes rows of 1 to {MAX_WIDTH} values, not {x.shape[-1]}"
    return refuse_types(x, *others)


def _refuse(
    given: tuple[Tensor | torch.dtype | None, ...], types: tuple[torch.dtype, ...]
) -> str | None:
    for value in given:
        dtype = value.dtype if isinstance(value, Tensor) else value
        if dtype is not None and dtype not in types:
            names = ", ".join(str(t).removeprefix("torch.") for t in types)
            return f"it takes {names}, not {dtype}"
    return None
