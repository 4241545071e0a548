"""LayerNorm with the residual add before it: (..., D) to (..., D), and the way back.

Forward: one program takes a few whole rows into registers, adds the branch, rounds the sum to the
dtype of the stream and normalises what was rounded: mean first, then the variance of the centred
values. Backward: one of at most PROGRAMS programs takes every PROGRAMS-th block of rows and keeps
its part of the gradients of weight and bias in registers; a second launch adds the parts.

Memory bound. A value costs, forward, itemsize of x + branch + total + out bytes; backward, that of
grad + grad_total + total + grad_x. One writer per output and no atomics: deterministic, and the
order of the sums does not depend on the card.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import sum_two_partials

# 8 warps: 16 values of the tile for each thread, 8 backward, where the parts of two sums stay in
# registers; a row of 8192 still fits them, in float64 one of 4096
OPTIONS = {"enable_fp_fusion": True, "num_warps": 8}  # a product and its sum round once
TILE = 4096
TILE_BACKWARD = 2048
# Two for each of the 132 multiprocessors of an H100 or H200, a constant so that no other card sums
# in another order. More of them would write and read more partial sums.
PROGRAMS = 264


@triton.jit
def _norm_kernel(
    x_ptr,  # (rows, D)
    branch_ptr,  # (rows, D) or None
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (rows, D)
    total_ptr,  # (rows, D), dtype of x; not written without a branch
    mean_ptr,  # (rows,), the dtype of the arithmetic
    rstd_ptr,  # (rows,)
    rows,
    D,
    EPS: tl.constexpr,  # a number passed at run time would be float32
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(wide)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0)
        if branch.dtype != tl.float64:
            branch = branch.to(wide)
        rounded = (total + branch).to(wide).to(x_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=inside)
        total = rounded.to(wide)
    mean = tl.sum(total, axis=1) / D
    centred = tl.where(inside, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(wide)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(wide)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_bwd_kernel(
    grad_ptr,  # (rows, D)
    grad_total_ptr,  # (rows, D) or None
    total_ptr,  # (rows, D)
    mean_ptr,  # (rows,), the dtype of the arithmetic
    rstd_ptr,  # (rows,)
    weight_ptr,  # (D,)
    grad_x_ptr,  # (rows, D), dtype of total
    partials_ptr,  # (2, P, D): weight, bias
    rows,
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = mean_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(wide)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_D), wide)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), wide)
    for start in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(wide)
        total = tl.load(total_ptr + at, mask=inside, other=0.0).to(wide)
        unit = (total - mean[:, None]) * rstd[:, None]
        grad_weight += grad * unit
        grad_bias += grad
        scaled = grad * weight[None, :]  # zero beyond D, so the sums end there
        level = tl.sum(scaled, axis=1) / D
        along = tl.sum(scaled * unit, axis=1) / D
        grad_x = (scaled - level[:, None] - unit * along[:, None]) * rstd[:, None]
        if grad_total_ptr is not None:
            grad_x += tl.load(grad_total_ptr + at, mask=inside, other=0.0).to(wide)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    part = partials_ptr + program * D + d
    tl.store(part, tl.sum(grad_weight, axis=0), mask=d < D)
    tl.store(part + programs.to(tl.int64) * D, tl.sum(grad_bias, axis=0), mask=d < D)


def _blocks(d: int, tile: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block_d = triton.next_power_of_2(d)
    return max(1, min(tile // block_d, 32)), block_d


def norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.shape, device=x.device, dtype=dtype)
    total = x.new_empty(0 if branch is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=wide) for _ in range(2))
    if out.numel():
        block_rows, block_d = _blocks(x.shape[-1], TILE)
        with torch.cuda.device_of(x):
            _norm_kernel[(triton.cdiv(mean.numel(), block_rows),)](
                x.contiguous(),
                None if branch is None else branch.contiguous(),
                weight.contiguous(),
                bias.contiguous(),
                out,
                total,
                mean,
                rstd,
                mean.numel(),
                x.shape[-1],
                EPS=eps,
                BLOCK_ROWS=block_rows,
                BLOCK_D=block_d,
                **OPTIONS,
            )
    return out, total, mean, rstd


def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty(total.shape, device=total.device, dtype=total.dtype)
    if not grad_x.numel():
        return grad_x, torch.zeros_like(weight), torch.zeros_like(weight)
    d = total.shape[-1]
    block_rows, block_d = _blocks(d, TILE_BACKWARD)
    programs = min(triton.cdiv(mean.numel(), block_rows), PROGRAMS)
    partials = mean.new_empty(2, programs, d)
    with torch.cuda.device_of(total):
        _norm_bwd_kernel[(programs,)](
            grad.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            total.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            weight.contiguous(),
            grad_x,
            partials,
            mean.numel(),
            d,
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_d,
            **OPTIONS,
        )
    return grad_x, *sum_two_partials(partials, weight.dtype)
