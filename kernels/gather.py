"""Row copies between (B, N, D) and (B, K, D).

One program writes a tile of 16 tokens by up to 256 columns. Both kernels move bytes and do no
arithmetic, so they are bound by memory: the gather moves 2 * B * K * D * itemsize bytes, the
scatter B * (K + N) * D * itemsize, in one launch without a zero fill before it: a program looks up
which token, if any, belongs where it writes. One writer per row and no atomics: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import columns, rows_of_ids

# Four warps and tiles of 16 x 256 values: every thread has four or more accesses of 16 bytes in
# flight.
# No arithmetic here: enable_fp_fusion is set because its default changes.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
ROWS = 16  # of a tile
MAX_IDS = 256  # ids that the scatter compares at a time


@triton.jit
def _gather_kernel(
    x_ptr,  # (B, N, D)
    ids_ptr,  # (B, K)
    out_ptr,  # (B, K, D)
    num_rows,  # B * K
    N,
    K,
    stride_ids,
    D: tl.constexpr,  # known when compiling: rows of 16 n bytes are moved 16 bytes at a time
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)  # b * K + k
    d = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < num_rows
    image = row // K
    id_ptr = ids_ptr + image * stride_ids + row % K
    source = image * N + tl.load(id_ptr, mask=inside, other=0)
    mask = inside[:, None] & (d < D)[None, :]
    tokens = tl.load(x_ptr + source[:, None] * D + d[None, :], mask=mask)
    tl.store(out_ptr + row[:, None] * D + d[None, :], tokens, mask=mask)


@triton.jit
def _scatter_kernel(
    x_ptr,  # (B, K, D)
    ids_ptr,  # (B, K)
    out_ptr,  # (B, N, D)
    N,
    K,
    stride_ids,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IDS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    blocks = tl.cdiv(N, ROWS)
    image = program // tiles // blocks
    n = (program // tiles % blocks) * ROWS + tl.arange(0, ROWS)
    d = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.full((ROWS,), -1, tl.int64)  # k with ids[k] = n, if any
    for start in range(0, K, IDS):
        k = start + tl.arange(0, IDS)
        ids = tl.load(ids_ptr + image * stride_ids + k, mask=k < K, other=-1)
        found = tl.where(ids[None, :] == n[:, None], k[None, :], -1)
        source = tl.maximum(source, tl.max(found, axis=1))
    columns_inside = (d < D)[None, :]
    tokens = tl.load(
        x_ptr + (image * K + source)[:, None] * D + d[None, :],
        mask=(source >= 0)[:, None] & columns_inside,
        other=0,
    )
    tl.store(
        out_ptr + (image * N + n)[:, None] * D + d[None, :],
        tokens,
        mask=(n < N)[:, None] & columns_inside,
    )


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    b, n, d = x.shape
    k = ids.shape[1]
    out = torch.empty(b, k, d, device=x.device, dtype=x.dtype)
    if out.numel():
        block = columns(d)
        ids, stride = rows_of_ids(ids)
        with torch.cuda.device_of(x):
            _gather_kernel[(triton.cdiv(b * k, ROWS) * triton.cdiv(d, block),)](
                x.contiguous(),
                ids,
                out,
                b * k,
                n,
                k,
                stride,
                D=d,
                ROWS=ROWS,
                COLUMNS=block,
                **OPTIONS,
            )
    return out


def scatter_tokens(x: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    b, k, d = x.shape
    out = torch.empty(b, num_tokens, d, device=x.device, dtype=x.dtype)
    if out.numel():
        block = columns(d)
        ids, stride = rows_of_ids(ids)
        with torch.cuda.device_of(x):
            _scatter_kernel[(b * triton.cdiv(num_tokens, ROWS) * triton.cdiv(d, block),)](
                x.contiguous(),
                ids,
                out,
                num_tokens,
                k,
                stride,
                D=d,
                ROWS=ROWS,
                COLUMNS=block,
                IDS=min(triton.next_power_of_2(max(k, 1)), MAX_IDS),
                **OPTIONS,
            )
    return out
