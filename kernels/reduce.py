"""Sums over the partial results that the programs of another kernel left: (P, D) to (D,).

One program sums P values for each of 64 columns, in an order that depends on P and D alone. Reads
P * D values once. One writer per output and no atomics: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 warps: 16 values of the tile for each thread, loaded at once to hide the latency of a short loop
OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}  # nothing is multiplied
TILE = 4096


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # (S, P, D), S one or two
    first_ptr,  # (D,), sum of partials[0]
    second_ptr,  # (D,), sum of partials[1]
    P,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    which = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_P, BLOCK_D), partials_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (d < D)[None, :]
        total += tl.load(
            partials_ptr + (which * P + p)[:, None] * D + d[None, :], mask=inside, other=0.0
        )
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first_ptr + d, result.to(first_ptr.dtype.element_ty), mask=d < D)
    else:
        tl.store(second_ptr + d, result.to(second_ptr.dtype.element_ty), mask=d < D)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, D) contiguous to (D,) of ``dtype``."""
    out = torch.empty(partials.shape[1], device=partials.device, dtype=dtype)
    _launch(partials[None], out, out)
    return out


def sum_two_partials(partials: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(2, P, D) contiguous to two tensors (D,) of ``dtype``, in one launch."""
    first, second = (
        torch.empty(partials.shape[2], device=partials.device, dtype=dtype) for _ in range(2)
    )
    _launch(partials, first, second)
    return first, second


def _launch(partials: Tensor, first: Tensor, second: Tensor) -> None:
    sums, p, d = partials.shape
    block_d = min(triton.next_power_of_2(d), 64)
    with torch.cuda.device_of(partials):
        _sum_partials_kernel[(triton.cdiv(d, block_d), sums)](
            partials,
            first,
            second,
            p,
            d,
            BLOCK_P=TILE // block_d,
            BLOCK_D=block_d,
            **OPTIONS,
        )
