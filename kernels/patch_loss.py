"""Reconstruction loss of the masked patches and the direction of its gradient, in one pass.

A fixed number of programs walk over the rows of ``pred``; a row of P = p * p * C values (or several
short ones) is held in registers from the first pixel read to the direction written. The target is
computed from the image and never stored: P * (itemsize of a pixel + 2 * itemsize of pred) bytes a
row, and one more itemsize with a teacher. A second, small launch adds the partial sums of the
programs. No atomics and a fixed order: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import rows_of_ids

# Unfused, each operation rounds as in the reference.
OPTIONS = {"enable_fp_fusion": False}
TILE = 1024  # values of several short rows together
MAX_PROGRAMS = 4096  # enough to fill a large GPU; each leaves two partial sums


@triton.jit
def _reciprocal_root(x):
    """1 / sqrt(x) of two correctly rounded steps, which have names of their own in float32."""
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, tl.sqrt_rn(x))
    else:
        return 1.0 / tl.sqrt(x)


@triton.jit
def _patch_loss_kernel(
    pred_ptr,  # (B * M, P)
    imgs_ptr,  # (B, C, H, W)
    ids_ptr,  # (B, M)
    teacher_ptr,  # (B * M, P) or None
    scale_ptr,  # (C,) or None
    shift_ptr,  # (C,) or None
    direction_ptr,  # (B * M, P): the gradient of pred times half the number of predictions
    partial_ptr,  # (2, programs): squared errors, squared distances to the teacher
    gamma: tl.float64,
    num_rows,  # B * M
    programs,
    M,
    grid_width,  # W / p
    stride_ids,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    NORM_PIX: tl.constexpr,
    p: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PIXEL: tl.constexpr = tl.float64 if imgs_ptr.dtype.element_ty == tl.float64 else tl.float32
    WIDE: tl.constexpr = partial_ptr.dtype.element_ty
    P: tl.constexpr = p * p * C
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, COLUMNS)  # (y * p + x) * C + c
    inside_patch = i < P
    channel, x, y = i % C, i // C % p, i // (C * p)
    # 32 bits save registers; accepts() refuses patches that span more.
    pixel_offset = channel * stride_ic + y * stride_ih + x * stride_iw
    pixel_error = tl.zeros((ROWS, COLUMNS), WIDE)
    teacher_distance = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(program * ROWS, num_rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)  # b * M + m
        mask = (row < num_rows)[:, None] & inside_patch[None, :]
        # Divisions of 64 bits are slow; accepts() refuses 2**31 rows.
        image = (row.to(tl.int32) // M).to(tl.int64)
        id_ptr = ids_ptr + image * stride_ids + row.to(tl.int32) % M
        place = tl.load(id_ptr, mask=row < num_rows, other=0).to(tl.int32)
        down, right = (place // grid_width).to(tl.int64), (place % grid_width).to(tl.int64)
        source = image * stride_ib + (down * stride_ih + right * stride_iw) * p
        target = tl.load(imgs_ptr + source[:, None] + pixel_offset[None, :], mask=mask, other=0)
        target = target.to(PIXEL)
        if scale_ptr is not None:
            target *= tl.load(scale_ptr + channel, mask=inside_patch).to(PIXEL)[None, :]
        if shift_ptr is not None:
            target += tl.load(shift_ptr + channel, mask=inside_patch).to(PIXEL)[None, :]
        if NORM_PIX:
            mean = tl.sum(tl.where(mask, target, 0.0), axis=1) / P
            target = tl.where(mask, target - mean[:, None], 0.0)
            variance = tl.sum(target * target, axis=1) / (P - 1)
            target *= _reciprocal_root(variance + 1e-6)[:, None]
        values = row[:, None] * P + i[None, :]
        pred = tl.load(pred_ptr + values, mask=mask, other=0).to(WIDE)
        error = tl.where(mask, pred - target.to(WIDE), 0.0)
        pixel_error += error * error
        if teacher_ptr is not None:
            distance = pred - tl.load(teacher_ptr + values, mask=mask, other=0).to(WIDE)
            teacher_distance += distance * distance
            error += tl.full((), gamma, WIDE) * distance
        tl.store(direction_ptr + values, error.to(direction_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program, tl.sum(pixel_error))
    tl.store(partial_ptr + programs + program, tl.sum(teacher_distance))


@triton.jit
def _sum_losses_kernel(
    partial_ptr,  # (2, programs)
    total_ptr,  # scalar
    pixel_ptr,  # scalar
    consistency_ptr,  # scalar
    gamma: tl.float64,
    count,  # number of predictions
    programs,
    BLOCK: tl.constexpr,
):
    WIDE: tl.constexpr = partial_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < programs
    pixel = tl.sum(tl.load(partial_ptr + i, mask=mask, other=0)) / count
    consistency = tl.sum(tl.load(partial_ptr + programs + i, mask=mask, other=0)) / count
    tl.store(total_ptr, pixel + tl.full((), gamma, WIDE) * consistency)
    tl.store(pixel_ptr, pixel)
    tl.store(consistency_ptr, consistency)


def patch_loss(
    pred: Tensor,
    imgs: Tensor,
    ids: Tensor,
    patch_size: int,
    norm_pix: bool,
    teacher_pred: Tensor | None,
    gamma: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, m, size = pred.shape
    direction = torch.empty(b, m, size, device=pred.device, dtype=pred.dtype)
    wide = torch.float64 if torch.float64 in (pred.dtype, imgs.dtype) else torch.float32
    total, pixel, consistency = (torch.empty((), device=pred.device, dtype=wide) for _ in range(3))
    if not pred.numel():
        return total.zero_(), pixel.zero_(), consistency.zero_(), direction
    block = triton.next_power_of_2(size)
    rows = max(TILE // block, 1)
    programs = min(triton.cdiv(b * m, rows), MAX_PROGRAMS)
    partial = torch.empty(2, programs, device=pred.device, dtype=wide)
    ids, stride = rows_of_ids(ids)
    with torch.cuda.device_of(pred):
        _patch_loss_kernel[(programs,)](
            pred.contiguous(),
            imgs,
            ids,
            None if teacher_pred is None else teacher_pred.contiguous(),
            None if scale is None else scale.contiguous(),
            None if shift is None else shift.contiguous(),
            direction,
            partial,
            gamma,
            b * m,
            programs,
            m,
            imgs.shape[3] // patch_size,
            stride,
            *imgs.stride(),
            NORM_PIX=norm_pix,
            p=patch_size,
            C=imgs.shape[1],
            ROWS=rows,
            COLUMNS=block,
            num_warps=min(max(block // 128, 4), 16),  # 4 values a thread, as long as 16 warps do
            **OPTIONS,
        )
        _sum_losses_kernel[(1,)](
            partial,
            total,
            pixel,
            consistency,
            gamma,
            pred.numel(),
            programs,
            BLOCK=triton.next_power_of_2(programs),
            num_warps=4,
            **OPTIONS,
        )
    return total, pixel, consistency, direction
