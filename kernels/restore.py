"""The decoder's input, and its gradient.

Forward: one program makes 8 tokens, up to 256 columns, in one launch; neighbours are the same
position of different images, so the position table is read from cache. It moves
B * (K + N + 2) * D * itemsize bytes. Backward: a fixed
number of programs walk over all rows; each copies the gradients of visible tokens and adds up those
of mask tokens in registers, and a second, small launch adds these partial sums. It reads
B * (N + 1) * D values and writes B * (K + 1) * D. No atomics and a fixed order: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import columns
from .reduce import sum_partials

# Unfused is what the reference does; there is no product to fuse.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
MAX_PROGRAMS = 512  # a few for each of the 100 to 150 processors of a large GPU
ROWS = 8  # of a tile: each takes twice the registers of a copy, for what is added to it


@triton.jit
def _restore_tokens_kernel(
    x_ptr,  # (B, K + 1, D)
    mask_token_ptr,  # (D,)
    ids_restore_ptr,  # (B, N)
    pos_embed_ptr,  # (N + 1, D)
    out_ptr,  # (B, N + 1, D)
    B,
    K,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)  # place * B + b
    d = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    place, image = row // B, row % B  # place 0 is the cls token
    inside = place <= N
    is_patch = inside & (place > 0)
    rank = tl.load(ids_restore_ptr + image * N + place - 1, mask=is_patch, other=-1)
    columns_inside = d < D
    mask = inside[:, None] & columns_inside[None, :]
    visible = (rank < K)[:, None]
    source = (image * (K + 1) + rank + 1)[:, None] * D + d[None, :]
    tokens = tl.load(x_ptr + source, mask=mask & visible, other=0).to(WIDE)
    hidden = tl.load(mask_token_ptr + d, mask=columns_inside)
    hidden = hidden.to(x_ptr.dtype.element_ty).to(WIDE)
    tokens = tl.where(visible, tokens, hidden[None, :])
    tokens += tl.load(pos_embed_ptr + place[:, None] * D + d[None, :], mask=mask).to(WIDE)
    target = (image * (N + 1) + place)[:, None] * D + d[None, :]
    tl.store(out_ptr + target, tokens.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _restore_tokens_bwd_kernel(
    grad_ptr,  # (B, N + 1, D)
    ids_shuffle_ptr,  # (B, N)
    grad_x_ptr,  # (B, K + 1, D)
    partial_ptr,  # (programs, D)
    num_rows,  # B * (N + 1)
    programs,
    K,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0).to(tl.int64)
    program = tile // tiles
    d = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    columns_inside = (d < D)[None, :]
    total = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    for start in range(program * ROWS, num_rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        image = row // (N + 1)
        rank = row % (N + 1) - 1  # in shuffle order; -1 is the cls token
        inside = row < num_rows
        is_patch = inside & (rank >= 0)
        place = tl.load(ids_shuffle_ptr + image * N + rank, mask=is_patch, other=-1)
        source = (image * (N + 1) + place + 1)[:, None] * D + d[None, :]
        grad = tl.load(grad_ptr + source, mask=inside[:, None] & columns_inside, other=0)
        visible = (rank < K)[:, None]
        target = (image * (K + 1) + rank + 1)[:, None] * D + d[None, :]
        tl.store(grad_x_ptr + target, grad, mask=inside[:, None] & visible & columns_inside)
        total += tl.where(visible, 0, grad.to(total.dtype))
    tl.store(partial_ptr + program * D + d, tl.sum(total, axis=0), mask=d < D)


def restore_tokens(
    x: Tensor, mask_token: Tensor, ids_shuffle: Tensor, ids_restore: Tensor, pos_embed: Tensor
) -> Tensor:
    b, n = ids_restore.shape
    d = x.shape[2]
    dtype = torch.promote_types(x.dtype, pos_embed.dtype)
    out = torch.empty(b, n + 1, d, device=x.device, dtype=dtype)
    if out.numel():
        block = columns(d)
        with torch.cuda.device_of(x):
            _restore_tokens_kernel[(triton.cdiv(b * (n + 1), ROWS) * triton.cdiv(d, block),)](
                x.contiguous(),
                mask_token.contiguous(),
                ids_restore.contiguous(),
                pos_embed.contiguous(),
                out,
                b,
                x.shape[1] - 1,
                n,
                D=d,
                ROWS=ROWS,
                COLUMNS=block,
                **OPTIONS,
            )
    return out


def restore_tokens_backward(
    grad: Tensor, ids_shuffle: Tensor, num_visible: int
) -> tuple[Tensor, Tensor]:
    b, length, d = grad.shape
    grad_x = torch.empty(b, num_visible + 1, d, device=grad.device, dtype=grad.dtype)
    if not grad.numel():
        return grad_x, torch.zeros(1, 1, d, device=grad.device, dtype=grad.dtype)
    programs = min(triton.cdiv(b * length, ROWS), MAX_PROGRAMS)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    partial = torch.empty(programs, d, device=grad.device, dtype=wide)
    block = columns(d)
    with torch.cuda.device_of(grad):
        _restore_tokens_bwd_kernel[(programs * triton.cdiv(d, block),)](
            grad.contiguous(),
            ids_shuffle.contiguous(),
            grad_x,
            partial,
            b * length,
            programs,
            num_visible,
            length - 1,
            D=d,
            ROWS=ROWS,
            COLUMNS=block,
            **OPTIONS,
        )
    return grad_x, sum_partials(partial, grad.dtype).view(1, 1, d)
