"""Visible pixels of images to rows of the patch-embedding product.

One program cuts rows of pixels, up to 2048 values, out of one patch: for 3 channels of 16 x 16 the
whole patch. Only the named patches are read, as they are stored (uint8 or floating point), and each
value is written once: B * K * C * p * p * (itemsize of a pixel + itemsize of the result) bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import rows_of_ids

# Unfused, scale and shift round as in the reference. Four warps: 8 to 16 values a thread.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
MAX_VALUES = 2048


@triton.jit
def _gather_patches_kernel(
    imgs_ptr,  # (B, C, H, W)
    ids_ptr,  # (B, K)
    scale_ptr,  # (C,) or None
    shift_ptr,  # (C,) or None
    out_ptr,  # (B, K, C * p * p)
    K,
    C,
    grid_width,  # W / p
    stride_ids,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    p: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if imgs_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C * p, ROWS)
    patch = program // blocks  # b * K + k
    place = tl.load(ids_ptr + (patch // K) * stride_ids + patch % K)
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)  # c * p + y
    x = tl.arange(0, COLUMNS)
    channel = row // p
    corner = (patch // K) * stride_ib + (place // grid_width) * p * stride_ih
    start = corner + (place % grid_width) * p * stride_iw + channel * stride_ic
    inside = row < C * p
    mask = inside[:, None] & (x < p)[None, :]
    source = (start + (row % p) * stride_ih)[:, None] + x.to(tl.int64)[None, :] * stride_iw
    pixels = tl.load(imgs_ptr + source, mask=mask).to(WIDE)
    if scale_ptr is not None:
        pixels *= tl.load(scale_ptr + channel, mask=inside).to(WIDE)[:, None]
    if shift_ptr is not None:
        pixels += tl.load(shift_ptr + channel, mask=inside).to(WIDE)[:, None]
    out = out_ptr + patch * C * p * p
    tl.store(out + (row * p)[:, None] + x[None, :], pixels.to(out_ptr.dtype.element_ty), mask=mask)


def gather_patches(
    imgs: Tensor,
    ids: Tensor,
    patch_size: int,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    b, c, _, width = imgs.shape
    k = ids.shape[1]
    size = c * patch_size * patch_size
    out = torch.empty(b, k, size, device=imgs.device, dtype=dtype)
    if out.numel():
        ids, stride = rows_of_ids(ids)
        block = triton.next_power_of_2(patch_size)
        rows = min(triton.next_power_of_2(c * patch_size), max(MAX_VALUES // block, 1))
        with torch.cuda.device_of(imgs):
            _gather_patches_kernel[(b * k * triton.cdiv(c * patch_size, rows),)](
                imgs,
                ids,
                None if scale is None else scale.contiguous(),
                None if shift is None else shift.contiguous(),
                out,
                k,
                c,
                width // patch_size,
                stride,
                *imgs.stride(),
                p=patch_size,
                ROWS=rows,
                COLUMNS=block,
                **OPTIONS,
            )
    return out
