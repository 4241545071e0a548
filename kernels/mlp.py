"""Bias and exact (erf) GELU of a transformer's MLP: (..., D) to (..., D), and the way back.

One program takes a tile of up to 1024 columns. Backward, it goes through every P-th block of rows
and keeps its part of the bias gradient in registers; a second launch adds the parts.

Memory bound. A value costs 2 * itemsize bytes forward, 3 * itemsize backward. One writer per output
and no atomics: deterministic, and the order of the sums does not depend on the card.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import sum_partials

# 8 warps: 16 values of the tile for each thread
OPTIONS = {"enable_fp_fusion": True, "num_warps": 8}  # a product and its sum round once
TILE = 4096
WIDEST = 1024  # columns of a tile: the widths of all models' MLPs are multiples of it
# Two for each of the 132 multiprocessors of an H100 or H200, a constant so that no other card sums
# in another order.
PROGRAMS = 264

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the normal distribution at 0


@triton.jit
def _bias_gelu_kernel(
    x_ptr,  # (rows, D)
    bias_ptr,  # (D,)
    out_ptr,  # (rows, D), dtype of x
    rows,
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(wide)
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide) + bias[None, :]
    out = z * 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    tl.store(out_ptr + at, out.to(dtype), mask=inside)


@triton.jit
def _bias_gelu_bwd_kernel(
    grad_ptr,  # (rows, D)
    x_ptr,  # (rows, D)
    bias_ptr,  # (D,)
    grad_x_ptr,  # (rows, D), dtype of x
    partials_ptr,  # (P, D), the dtype of the arithmetic
    rows,
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = partials_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(wide)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), wide)
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide) + bias[None, :]
        cumulative = 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
        slope = cumulative + z * (tl.exp(z * z * -0.5) * DENSITY)
        grad_x = tl.load(grad_ptr + at, mask=inside, other=0.0).to(wide) * slope
        grad_bias += grad_x
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partials_ptr + program * D + d, tl.sum(grad_bias, axis=0), mask=d < D)


def _blocks(d: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block_d = min(triton.next_power_of_2(d), WIDEST)
    return min(TILE // block_d, 32), block_d


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if out.numel():
        d = x.shape[-1]
        rows = x.numel() // d
        block_rows, block_d = _blocks(d)
        with torch.cuda.device_of(x):
            _bias_gelu_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(d, block_d))](
                x.contiguous(),
                bias.contiguous(),
                out,
                rows,
                d,
                BLOCK_ROWS=block_rows,
                BLOCK_D=block_d,
                **OPTIONS,
            )
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if not grad_x.numel():
        return grad_x, torch.zeros_like(bias)
    d = x.shape[-1]
    rows = x.numel() // d
    block_rows, block_d = _blocks(d)
    columns = triton.cdiv(d, block_d)
    programs = min(triton.cdiv(rows, block_rows), max(1, PROGRAMS // columns))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = x.new_empty(programs, d, dtype=wide)
    with torch.cuda.device_of(x):
        _bias_gelu_bwd_kernel[(programs, columns)](
            grad.contiguous(),
            x.contiguous(),
            bias.contiguous(),
            grad_x,
            partials,
            rows,
            d,
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_d,
            **OPTIONS,
        )
    return grad_x, sum_partials(partials, bias.dtype)
