"""Loss between predicted and teacher features, and the direction of its gradient, in one pass.

``smooth_l1`` and ``cosine``: one program takes a few rows of both, normalises those of the teacher
in registers and writes the direction and its part of the loss. ``cosine_token``: statistics of the
teacher's tokens first, then one program for each image and block of features, which goes through
the tokens twice: for the three sums of the similarity, and for the direction. Another launch adds
the parts of the loss.

Memory bound: pred, target and the direction pass once; with ``cosine_token`` target is read three
times and pred twice, the last time from the cache. Nothing of the normalised target is written.
One writer per output and no atomics: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import sum_partials

# 8 warps: 16 values of the tile for each thread; a row of 8192 still fits the registers, in float64
# one of 4096
OPTIONS = {"enable_fp_fusion": True, "num_warps": 8}  # a product and its sum round once
TILE = 4096
FEATURES = 64  # columns of a cosine_token tile: 128 bytes of a 16-bit row, one line of the cache


@triton.jit
def _statistics(z, inside, D):
    """Mean and reciprocal deviation (unbiased) of each row of ``z``, zero where not inside."""
    mean = tl.sum(z, axis=1) / D
    centred = tl.where(inside, z - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / (D - 1) + 1e-6)


@triton.jit
def _affine(z, weight_ptr, bias_ptr, d, D):
    if weight_ptr is not None:
        z *= tl.load(weight_ptr + d, mask=d < D, other=0.0).to(z.dtype)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(z.dtype)[None, :]
    return z


@triton.jit
def _target_row(row, inside, ids_ptr, M, N):
    """Row of target (B * N) that belongs to ``row`` of pred (B * M)."""
    if ids_ptr is not None:
        row = (row // M) * N + tl.load(ids_ptr + row, mask=inside, other=0)
    return row


@triton.jit
def _cosine(xx, zz, xz):
    """Similarity, and the factors of x and z in its gradient, from the sums of squares."""
    x_norm, z_norm = tl.sqrt(xx), tl.sqrt(zz)
    # as torch's: each norm at least 1e-8, and a NaN stays
    inverse = 1.0 / tl.where(x_norm < 1e-8, 1e-8, x_norm)
    toward = inverse / tl.where(z_norm < 1e-8, 1e-8, z_norm)
    similarity = xz * toward
    return similarity, tl.where(x_norm > 1e-8, similarity * inverse * inverse, 0.0), toward


@triton.jit
def _feature_loss_kernel(
    pred_ptr,  # (B, M, D)
    target_ptr,  # (B, N, D)
    ids_ptr,  # (B, M) or None
    weight_ptr,  # (D,) or None
    bias_ptr,  # (D,) or None
    direction_ptr,  # (B, M, D): the gradient of pred times count
    partials_ptr,  # (P,), float64: thousands of terms make one number
    rows,  # B * M
    count,  # terms of the mean
    M,
    N,
    D,
    BETA: tl.constexpr,  # a number passed at run time would be float32
    COSINE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = (
        tl.float64
        if pred_ptr.dtype.element_ty == tl.float64 or target_ptr.dtype.element_ty == tl.float64
        else tl.float32
    )
    program = tl.program_id(0).to(tl.int64)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    source = _target_row(row, row < rows, ids_ptr, M, N)
    z = tl.load(target_ptr + source[:, None] * D + d[None, :], mask=inside, other=0.0).to(wide)
    x = tl.load(pred_ptr + at, mask=inside, other=0.0).to(wide)
    if NORMALIZE:
        mean, rstd = _statistics(z, inside, D)
        z = (z - mean[:, None]) * rstd[:, None]
    z = tl.where(inside, _affine(z, weight_ptr, bias_ptr, d, D), 0.0)
    share = tl.full((), 1.0, tl.float64) / count
    if COSINE:
        sums = tl.sum(x * x, axis=1), tl.sum(z * z, axis=1), tl.sum(x * z, axis=1)
        similarity, turning, toward = _cosine(sums[0], sums[1], sums[2])
        loss = tl.where(row < rows, 1.0 - similarity, 0.0)
        direction = turning[:, None] * x - toward[:, None] * z
    else:
        difference = x - z
        distance = tl.abs(difference)
        curved = difference * difference * (0.5 / BETA)
        loss = tl.where(distance < BETA, curved, distance - 0.5 * BETA)
        loss = tl.sum(tl.where(inside, loss, 0.0), axis=1)
        direction = difference / BETA
        direction = tl.where(direction > 1.0, 1.0, direction)  # a NaN stays
        direction = tl.where(direction < -1.0, -1.0, direction)
    tl.store(direction_ptr + at, direction.to(direction_ptr.dtype.element_ty), mask=inside)
    tl.store(partials_ptr + program, tl.sum(loss.to(tl.float64), axis=0) * share)


@triton.jit
def _target_statistics_kernel(
    target_ptr,  # (B, N, D)
    ids_ptr,  # (B, M) or None
    mean_ptr,  # (B, M), the dtype of the arithmetic
    rstd_ptr,  # (B, M)
    rows,  # B * M
    M,
    N,
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    source = _target_row(row, row < rows, ids_ptr, M, N)
    z = tl.load(target_ptr + source[:, None] * D + d[None, :], mask=inside, other=0.0)
    mean, rstd = _statistics(z.to(mean_ptr.dtype.element_ty), inside, D)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _load_tokens(
    pred_ptr, target_ptr, ids_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    image, m, d, M, N, D, wide: tl.constexpr,
):  # fmt: skip
    """Tokens ``m`` of an image, features ``d``: pred and the finished target, zero outside."""
    row = image * M + m
    inside = (m < M)[:, None] & (d < D)[None, :]
    source = _target_row(row, m < M, ids_ptr, M, N)
    x = tl.load(pred_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(wide)
    z = tl.load(target_ptr + source[:, None] * D + d[None, :], mask=inside, other=0.0).to(wide)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row, mask=m < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=m < M, other=0.0)
        z = (z - mean[:, None]) * rstd[:, None]
    return x, tl.where(inside, _affine(z, weight_ptr, bias_ptr, d, D), 0.0)


@triton.jit
def _feature_loss_token_kernel(
    pred_ptr,  # (B, M, D)
    target_ptr,  # (B, N, D)
    ids_ptr,  # (B, M) or None
    mean_ptr,  # (B, M) or None
    rstd_ptr,  # (B, M) or None
    weight_ptr,  # (D,) or None
    bias_ptr,  # (D,) or None
    direction_ptr,  # (B, M, D): the gradient of pred times count
    partials_ptr,  # (P,), float64: thousands of terms make one number
    count,  # terms of the mean
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide: tl.constexpr = (
        tl.float64
        if pred_ptr.dtype.element_ty == tl.float64 or target_ptr.dtype.element_ty == tl.float64
        else tl.float32
    )
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    image = program // blocks
    d = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    xx = tl.zeros((BLOCK_M, BLOCK_D), wide)
    zz = tl.zeros((BLOCK_M, BLOCK_D), wide)
    xz = tl.zeros((BLOCK_M, BLOCK_D), wide)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        x, z = _load_tokens(
            pred_ptr, target_ptr, ids_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
            image, m, d, M, N, D, wide,
        )  # fmt: skip
        xx += x * x
        zz += z * z
        xz += x * z
    similarity, turning, toward = _cosine(
        tl.sum(xx, axis=0), tl.sum(zz, axis=0), tl.sum(xz, axis=0)
    )
    share = tl.full((), 1.0, tl.float64) / count
    loss = tl.where(d < D, 1.0 - similarity, 0.0).to(tl.float64)
    tl.store(partials_ptr + program, tl.sum(loss, axis=0) * share)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        x, z = _load_tokens(
            pred_ptr, target_ptr, ids_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
            image, m, d, M, N, D, wide,
        )  # fmt: skip
        direction = turning[None, :] * x - toward[None, :] * z
        tl.store(
            direction_ptr + (image * M + m)[:, None] * D + d[None, :],
            direction.to(direction_ptr.dtype.element_ty),
            mask=(m < M)[:, None] & (d < D)[None, :],
        )


def _blocks(d: int) -> dict[str, int]:
    """Rows and columns of a tile of whole rows."""
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_ROWS": max(1, min(TILE // block_d, 32)), "BLOCK_D": block_d}


def _wide(pred: Tensor, target: Tensor) -> torch.dtype:
    """Of the arithmetic and the loss."""
    return torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32


def feature_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    normalize: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    direction = torch.empty(pred.shape, device=pred.device, dtype=pred.dtype)
    if not direction.numel():
        return pred.new_zeros((), dtype=_wide(pred, target)), direction
    pred, target, ids, weight, bias = (
        None if t is None else t.contiguous() for t in (pred, target, ids, weight, bias)
    )
    launch = _by_token if kind == "cosine_token" else _by_row
    with torch.cuda.device_of(pred):
        partials = launch(pred, target, ids, normalize, weight, bias, kind, beta, direction)
    return sum_partials(partials[:, None], _wide(pred, target)).reshape(()), direction


def _by_row(pred, target, ids, normalize, weight, bias, kind, beta, direction) -> Tensor:
    b, m, d = pred.shape
    blocks = _blocks(d)
    partials = pred.new_empty(triton.cdiv(b * m, blocks["BLOCK_ROWS"]), dtype=torch.float64)
    _feature_loss_kernel[(len(partials),)](
        pred,
        target,
        ids,
        weight,
        bias,
        direction,
        partials,
        b * m,
        b * m if kind == "cosine" else b * m * d,
        m,
        target.shape[1],
        d,
        BETA=beta,
        COSINE=kind == "cosine",
        NORMALIZE=normalize,
        **blocks,
        **OPTIONS,
    )
    return partials


def _by_token(pred, target, ids, normalize, weight, bias, kind, beta, direction) -> Tensor:
    b, m, d = pred.shape
    n = target.shape[1]
    mean = rstd = None
    if normalize:
        wide = _wide(pred, target)
        mean, rstd = (pred.new_empty(b, m, dtype=wide) for _ in range(2))
        blocks = _blocks(d)
        _target_statistics_kernel[(triton.cdiv(b * m, blocks["BLOCK_ROWS"]),)](
            target, ids, mean, rstd, b * m, m, n, d, **blocks, **OPTIONS
        )
    block_d = min(triton.next_power_of_2(d), FEATURES)
    block_m = min(triton.next_power_of_2(m), TILE // FEATURES)
    partials = pred.new_empty(b * triton.cdiv(d, block_d), dtype=torch.float64)
    _feature_loss_token_kernel[(len(partials),)](
        pred,
        target,
        ids,
        mean,
        rstd,
        weight,
        bias,
        direction,
        partials,
        b * d,
        m,
        n,
        d,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        **OPTIONS,
    )
    return partials
