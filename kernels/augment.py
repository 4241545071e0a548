"""Crop, antialiased bicubic resize, flip and normalisation of uint8 images.

Two small launches make the weights of the rows and columns of every image: in float64, rounded to
multiples of 2**-22. Two more resize: along the rows of the crop, rounded to uint8, then along its
columns, as Pillow and PyTorch do with uint8. Their sums are integers, so exact in any order. One
program makes a tile of one plane and walks as many taps as its widest window has.

Memory bound where the crop is about as large as the result: reads the crop, writes and reads
crop height * width bytes, writes height * width values for each plane; the weights of an image
serve its planes from the cache. One writer per output and no atomics: deterministic.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# No fused products: the weights must be those of the reference. 4 warps: 16 sums of a tile for each
# thread, whose windows take registers too.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
BLOCK_ROWS, BLOCK_COLUMNS = 16, 128


@triton.jit
def _cubic(x):
    """The filter of Keys with a = -1/2."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _crop_weights_kernel(
    boxes_ptr,  # (B, 5), int32
    first_ptr,  # (B, length), int32: first tap of each output, from the edge of the crop
    count_ptr,  # (B, length), int32
    weights_ptr,  # (B, taps, length), int32, in units of 2**-22
    length,  # of the result
    taps,
    AXIS: tl.constexpr,  # 0: height; 1: width, which is flipped where the box says so
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    box = boxes_ptr + image * 5
    size = tl.load(box + 2 + AXIS)
    i = tl.minimum(at, length - 1)
    if AXIS == 1:
        i = tl.where(tl.load(box + 4) != 0, length - 1 - i, i)
    scale = size.to(tl.float64) / length
    stretch = tl.maximum(scale, 1.0)
    centre = (i.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - 2.0 * stretch + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + 2.0 * stretch + 0.5).to(tl.int32), size)
    inside = at < length
    tl.store(first_ptr + image * length + at, first, mask=inside)
    tl.store(count_ptr + image * length + at, tl.minimum(last - first, taps), mask=inside)
    inverse = 1.0 / stretch
    total = tl.zeros_like(centre)
    for t in range(0, taps):
        weight = _cubic(((first + t).to(tl.float64) - centre + 0.5) * inverse)
        total += tl.where(first + t < last, weight, 0.0)
    for t in range(0, taps):
        weight = _cubic(((first + t).to(tl.float64) - centre + 0.5) * inverse)
        weight = weight / total * 4194304.0
        weight = tl.where(weight < 0.0, weight - 0.5, weight + 0.5)  # half away from zero
        weight = tl.where(inside & (first + t < last), weight, 0.0).to(tl.int32)
        tl.store(weights_ptr + (image * taps + t) * length + at, weight, mask=inside)


@triton.jit
def _to_pixel(sums):
    return tl.minimum(tl.maximum((sums + 2097152) >> 22, 0), 255)


@triton.jit
def _crop_resize_rows_kernel(
    x_ptr,  # (B, C, H, W), uint8
    boxes_ptr,  # (B, 5), int32
    first_ptr,  # (B, width), int32
    count_ptr,  # (B, width), int32
    weights_ptr,  # (B, taps, width), int32
    out_ptr,  # (B, C, H, width), uint8; row 0 is the first of the crop
    C,
    H,
    W,
    width,
    taps,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    blocks = tl.cdiv(H, BLOCK_H)
    plane = tl.program_id(0).to(tl.int64) // blocks
    start = tl.program_id(0).to(tl.int64) % blocks * BLOCK_H
    image = plane // C
    box = boxes_ptr + image * 5
    top, left, h = tl.load(box), tl.load(box + 1), tl.load(box + 2)
    if start < h:
        row = start + tl.arange(0, BLOCK_H)
        column = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
        first = tl.load(first_ptr + image * width + column, mask=column < width, other=0)
        count = tl.load(count_ptr + image * width + column, mask=column < width, other=0)
        source = x_ptr + ((plane * H + top + row) * W + left)[:, None] + first[None, :]
        weights = weights_ptr + image * taps * width + column
        sums = tl.zeros((BLOCK_H, BLOCK_W), tl.int32)
        for t in range(0, tl.max(count, axis=0)):
            weight = tl.load(weights + t * width, mask=t < count, other=0)
            inside = (row < h)[:, None] & (t < count)[None, :]
            sums += tl.load(source + t, mask=inside, other=0).to(tl.int32) * weight[None, :]
        at = ((plane * H + row) * width)[:, None] + column[None, :]
        inside = (row < h)[:, None] & (column < width)[None, :]
        tl.store(out_ptr + at, _to_pixel(sums).to(tl.uint8), mask=inside)


@triton.jit
def _crop_resize_columns_kernel(
    x_ptr,  # (B, C, H, width), uint8; row 0 is the first of the crop
    first_ptr,  # (B, height), int32
    count_ptr,  # (B, height), int32
    weights_ptr,  # (B, taps, height), int32
    scale_ptr,  # (C,) or None
    shift_ptr,  # (C,) or None
    out_ptr,  # (B, C, height, width), uint8 or floating point
    C,
    H,
    height,
    width,
    taps,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    blocks = tl.cdiv(height, BLOCK_H)
    plane = tl.program_id(0).to(tl.int64) // blocks
    row = tl.program_id(0).to(tl.int64) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    image = plane // C
    first = tl.load(first_ptr + image * height + row, mask=row < height, other=0)
    count = tl.load(count_ptr + image * height + row, mask=row < height, other=0)
    source = x_ptr + ((plane * H + first) * width)[:, None] + column[None, :]
    weights = weights_ptr + image * taps * height + row
    sums = tl.zeros((BLOCK_H, BLOCK_W), tl.int32)
    for t in range(0, tl.max(count, axis=0)):
        weight = tl.load(weights + t * height, mask=t < count, other=0)
        inside = (t < count)[:, None] & (column < width)[None, :]
        sums += tl.load(source + t * width, mask=inside, other=0).to(tl.int32) * weight[:, None]
    out = _to_pixel(sums)
    if out_ptr.dtype.element_ty != tl.uint8:
        out = out.to(tl.float32)
        if scale_ptr is not None:
            out *= tl.load(scale_ptr + plane % C).to(tl.float32)
        if shift_ptr is not None:
            out += tl.load(shift_ptr + plane % C).to(tl.float32)
    at = ((plane * height + row) * width)[:, None] + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def _weights(boxes: Tensor, axis: int, size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """First tap, count and weights of each of ``length`` outputs; a crop has at most ``size``."""
    b = len(boxes)
    taps = 2 * math.ceil(2 * max(1.0, size / length)) + 1
    first, count = (boxes.new_empty(b, length) for _ in range(2))
    weights = boxes.new_empty(b, taps, length)
    _crop_weights_kernel[(b, triton.cdiv(length, BLOCK_COLUMNS))](
        boxes, first, count, weights, length, taps, AXIS=axis, BLOCK=BLOCK_COLUMNS, **OPTIONS
    )
    return first, count, weights


def crop_resize(
    imgs: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    b, c, h, w = imgs.shape
    out = torch.empty(b, c, height, width, device=imgs.device, dtype=dtype)
    if not out.numel():
        return out
    rows = imgs.new_empty(b, c, h, width)
    boxes = boxes.contiguous()
    columns = triton.cdiv(width, BLOCK_COLUMNS)
    blocks = {"BLOCK_H": BLOCK_ROWS, "BLOCK_W": BLOCK_COLUMNS}
    with torch.cuda.device_of(imgs):
        across, down = _weights(boxes, 1, w, width), _weights(boxes, 0, h, height)
        _crop_resize_rows_kernel[(b * c * triton.cdiv(h, BLOCK_ROWS), columns)](
            imgs.contiguous(),
            boxes,
            *across,
            rows,
            c,
            h,
            w,
            width,
            across[2].shape[1],
            **blocks,
            **OPTIONS,
        )
        _crop_resize_columns_kernel[(b * c * triton.cdiv(height, BLOCK_ROWS), columns)](
            rows,
            *down,
            None if scale is None else scale.contiguous(),
            None if shift is None else shift.contiguous(),
            out,
            c,
            h,
            height,
            width,
            down[2].shape[1],
            **blocks,
            **OPTIONS,
        )
    return out
