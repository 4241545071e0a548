"""Calls that the Triton kernels of several operators cannot serve."""

import torch
from torch import Tensor

MAX_WIDTH = 8192  # a row stays in the registers of one program; in float64 half of that does
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse_types(*given: Tensor | torch.dtype | None) -> str | None:
    """Why these tensors cannot be read, or results of a dtype written; None if they can."""
    for value in given:
        dtype = value.dtype if isinstance(value, Tensor) else value
        if dtype is not None and dtype not in _TYPES:
            return f"it takes float32, bfloat16, float16 and float64 tensors, not {dtype}"
    return None


def refuse_rows(x: Tensor, *others: Tensor | torch.dtype | None) -> str | None:
    """Why the rows of ``x`` cannot be held or the others not served; None if they can."""
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        return f"it takes rows of 1 to {MAX_WIDTH} values, not {x.shape[-1]}"
    return refuse_types(x, *others)
