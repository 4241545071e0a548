"""Attention of one image and head per program: packed (B, N, 3, H, D) to (B, N, H, D) and back.

The tokens of a head are cut into chunks of 64 and a tail of 16, 32 or 64, so that 65, 197 and 257
tokens are padded to 80, 208 and 272. The scores of a row stay in registers, all of them: no running
maximum, no rescaling. Only the tail is masked.

Forward: 4 * N**2 * D FLOP and 4 * N * D * itemsize bytes for a head. Backward, up to 64 tokens, or
128 of wide heads: the softmax is computed again from ``qkv`` in one tile; neither ``out`` nor
``lse`` is read, 7 * N * D * itemsize bytes. Backward, more tokens: the gradients of all queries
stay in registers while the program walks over the chunks of keys, 8 * N * D * itemsize bytes. Both
take 10 * N**2 * D FLOP. One writer per output and no atomics: deterministic.

Tiles are loaded where they are used, again for every chunk of the other side: from the caches, and
a tile kept over the loop would be kept in registers, itself (before sm_90) or as descriptors of its
place in shared memory. That decides whether 197 tokens fit without a spill.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fused, scale and maximum take one instruction. Without a loop over loads there is nothing to
# pipeline. 4 warps: one group of them multiplies 64 rows on sm_90; 8 would compute them twice.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1, "num_warps": 4}
CHUNK = tl.constexpr(64)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _load_rows(
    ptr,  # (N, D), STRIDE between rows
    start,
    N,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """(ROWS, BLOCK_D) from row ``start``; zero beyond N, which only the tail passes, and D."""
    n, d = tl.arange(0, ROWS) + start, tl.arange(0, BLOCK_D)
    at = ptr + n[:, None] * STRIDE + d[None, :]
    if TAIL:
        return tl.load(at, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    elif BLOCK_D != D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store_rows(
    ptr,  # (N, D), STRIDE between rows
    value,  # (ROWS, BLOCK_D)
    start,
    N,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
):
    n, d = tl.arange(0, ROWS) + start, tl.arange(0, BLOCK_D)
    at = ptr + n[:, None] * STRIDE + d[None, :]
    value = value.to(ptr.dtype.element_ty)
    if TAIL:
        tl.store(at, value, mask=(n < N)[:, None] & (d < D)[None, :])
    elif BLOCK_D != D:
        tl.store(at, value, mask=(d < D)[None, :])
    else:
        tl.store(at, value)


@triton.jit
def _load_chunk(
    ptr,
    i: tl.constexpr,
    N,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
):
    """Rows of chunk ``i``; the one after the FULL chunks is the tail."""
    if i == FULL:
        return _load_rows(ptr, i * CHUNK, N, STRIDE, D, BLOCK_D, LAST, True)
    else:
        return _load_rows(ptr, i * CHUNK, N, STRIDE, D, BLOCK_D, CHUNK, False)


@triton.jit
def _attention_rows(
    q_ptr,
    out_ptr,
    lse_ptr,
    start,
    scale,  # times log2(e)
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Attention of ROWS queries to the chunks of keys ``k``."""
    q = _load_rows(q_ptr, start, N, 3 * H * D, D, BLOCK_D, ROWS, TAIL)
    scores = ()
    row_max = tl.full((ROWS,), -float("inf"), tl.float32)
    for i in tl.static_range(FULL + 1):
        k = _load_chunk(q_ptr + H * D, i, N, 3 * H * D, D, BLOCK_D, FULL, LAST)
        chunk = tl.dot(q, tl.trans(k))
        if i == FULL:
            key = tl.arange(0, LAST) + FULL * CHUNK
            chunk = tl.where((key < N)[None, :], chunk, -float("inf"))
        row_max = tl.maximum(row_max, tl.max(chunk, 1))
        scores += (chunk,)
    row_max *= scale
    row_sum = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in tl.static_range(FULL + 1):
        p = tl.exp2(scores[i] * scale - row_max[:, None])
        row_sum += tl.sum(p, 1)
        v = _load_chunk(q_ptr + 2 * H * D, i, N, 3 * H * D, D, BLOCK_D, FULL, LAST)
        out = tl.dot(p.to(q.dtype), v, out)
    out *= (1.0 / row_sum)[:, None]
    _store_rows(out_ptr, out, start, N, H * D, D, BLOCK_D, ROWS, TAIL)
    n = tl.arange(0, ROWS) + start
    tl.store(lse_ptr + n, (row_max + tl.log2(row_sum)) * LN_2, mask=n < N)


@triton.jit
def _attention_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    out_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N), float32
    scale,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    q_ptr = qkv_ptr + b * N * 3 * H * D + h * D
    out_ptr += b * N * H * D + h * D
    lse_ptr += program * N
    scale *= LOG2_E
    for i in range(FULL):
        _attention_rows(
            *(q_ptr, out_ptr, lse_ptr, i * CHUNK, scale, N),
            *(H, D, BLOCK_D, FULL, LAST, CHUNK, False),
        )
    _attention_rows(
        *(q_ptr, out_ptr, lse_ptr, FULL * CHUNK, scale, N),
        *(H, D, BLOCK_D, FULL, LAST, LAST, True),
    )


@triton.jit
def _attention_bwd_short_kernel(
    grad_ptr,  # (B, N, H, D)
    qkv_ptr,  # (B, N, 3, H, D)
    grad_qkv_ptr,  # (B, N, 3, H, D)
    scale,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    q_ptr = qkv_ptr + b * N * 3 * H * D + h * D
    grad_ptr += b * N * H * D + h * D
    grad_q_ptr = grad_qkv_ptr + b * N * 3 * H * D + h * D
    q = _load_rows(q_ptr, 0, N, 3 * H * D, D, BLOCK_D, ROWS, True)
    k = _load_rows(q_ptr + H * D, 0, N, 3 * H * D, D, BLOCK_D, ROWS, True)
    v = _load_rows(q_ptr + 2 * H * D, 0, N, 3 * H * D, D, BLOCK_D, ROWS, True)
    grad = _load_rows(grad_ptr, 0, N, H * D, D, BLOCK_D, ROWS, True)

    scores = tl.dot(q, tl.trans(k))
    scores = tl.where((tl.arange(0, ROWS) < N)[None, :], scores, -float("inf"))
    row_max = tl.max(scores, 1) * (scale * LOG2_E)
    p = tl.exp2(scores * (scale * LOG2_E) - row_max[:, None])
    p /= tl.sum(p, 1)[:, None]
    grad_p = tl.dot(grad, tl.trans(v))
    delta = tl.sum(p * grad_p, 1)  # sum of out * grad over D; the whole row of p is here
    grad_scores = (p * (grad_p - delta[:, None])).to(q.dtype)

    # Rows beyond N have no grad, so they add nothing.
    grad_q = tl.dot(grad_scores, k) * scale
    _store_rows(grad_q_ptr, grad_q, 0, N, 3 * H * D, D, BLOCK_D, ROWS, True)
    grad_k = tl.dot(tl.trans(grad_scores), q) * scale
    _store_rows(grad_q_ptr + H * D, grad_k, 0, N, 3 * H * D, D, BLOCK_D, ROWS, True)
    grad_v = tl.dot(tl.trans(p.to(q.dtype)), grad)
    _store_rows(grad_q_ptr + 2 * H * D, grad_v, 0, N, 3 * H * D, D, BLOCK_D, ROWS, True)


@triton.jit
def _attention_bwd_keys(
    grad_ptr,
    q_ptr,
    lse_ptr,
    grad_q_ptr,
    delta,
    grad_q,
    start,
    scale,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Stores the gradients of ROWS keys and values; returns ``grad_q`` with their part added."""
    k = _load_rows(q_ptr + H * D, start, N, 3 * H * D, D, BLOCK_D, ROWS, TAIL)
    v = _load_rows(q_ptr + 2 * H * D, start, N, 3 * H * D, D, BLOCK_D, ROWS, TAIL)
    grad_k = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_v = tl.zeros((ROWS, BLOCK_D), tl.float32)
    added = ()
    for i in tl.static_range(FULL + 1):
        q = _load_chunk(q_ptr, i, N, 3 * H * D, D, BLOCK_D, FULL, LAST)
        grad = _load_chunk(grad_ptr, i, N, H * D, D, BLOCK_D, FULL, LAST)
        n = tl.arange(0, q.shape[0]) + i * CHUNK
        lse = tl.load(lse_ptr + n, mask=n < N, other=0.0) * LOG2_E
        scores = tl.dot(q, tl.trans(k))
        p = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
        if TAIL:
            p = tl.where((tl.arange(0, ROWS) + start < N)[None, :], p, 0.0)
        grad_v = tl.dot(tl.trans(p.to(q.dtype)), grad, grad_v)
        grad_p = tl.dot(grad, tl.trans(v))
        grad_scores = (p * (grad_p - delta[i][:, None])).to(q.dtype)
        grad_k = tl.dot(tl.trans(grad_scores), q, grad_k)
        added += (tl.dot(grad_scores, k, grad_q[i]),)
    grad_k *= scale
    _store_rows(grad_q_ptr + H * D, grad_k, start, N, 3 * H * D, D, BLOCK_D, ROWS, TAIL)
    _store_rows(grad_q_ptr + 2 * H * D, grad_v, start, N, 3 * H * D, D, BLOCK_D, ROWS, TAIL)
    return added


@triton.jit
def _attention_bwd_kernel(
    grad_ptr,  # (B, N, H, D)
    qkv_ptr,  # (B, N, 3, H, D)
    out_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N), float32
    grad_qkv_ptr,  # (B, N, 3, H, D)
    scale,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    q_ptr = qkv_ptr + b * N * 3 * H * D + h * D
    grad_ptr += b * N * H * D + h * D
    out_ptr += b * N * H * D + h * D
    lse_ptr += program * N
    grad_q_ptr = grad_qkv_ptr + b * N * 3 * H * D + h * D

    delta, grad_q = (), ()
    for i in tl.static_range(FULL + 1):
        out = _load_chunk(out_ptr, i, N, H * D, D, BLOCK_D, FULL, LAST).to(tl.float32)
        grad = _load_chunk(grad_ptr, i, N, H * D, D, BLOCK_D, FULL, LAST).to(tl.float32)
        delta += (tl.sum(out * grad, 1),)
        grad_q += (tl.zeros(grad.shape, tl.float32),)
    for i in range(FULL):
        grad_q = _attention_bwd_keys(
            *(grad_ptr, q_ptr, lse_ptr, grad_q_ptr, delta, grad_q, i * CHUNK, scale, N),
            *(H, D, BLOCK_D, FULL, LAST, CHUNK, False),
        )
    grad_q = _attention_bwd_keys(
        *(grad_ptr, q_ptr, lse_ptr, grad_q_ptr, delta, grad_q, FULL * CHUNK, scale, N),
        *(H, D, BLOCK_D, FULL, LAST, LAST, True),
    )
    for i in tl.static_range(FULL + 1):
        rows = grad_q[i] * scale
        _store_rows(grad_q_ptr, rows, i * CHUNK, N, 3 * H * D, D, BLOCK_D, rows.shape[0], i == FULL)


def _shape(n: int, d: int) -> dict[str, int]:
    """Head dim, its padding and that of the tokens: full chunks and the rows of the tail."""
    full = (n - 1) // CHUNK.value
    last = max(16, triton.next_power_of_2(n - full * CHUNK.value))  # 16: the smallest product
    return {"D": d, "BLOCK_D": max(16, triton.next_power_of_2(d)), "FULL": full, "LAST": last}


def attention(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    b, n, _, h, d = qkv.shape
    out = torch.empty(b, n, h, d, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(b, h, n, device=qkv.device, dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(qkv):
            _attention_kernel[(b * h,)](
                qkv.contiguous(), out, lse, scale, n, H=h, **_shape(n, d), **OPTIONS
            )
    return out, lse


def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    b, n, _, h, d = qkv.shape
    grad_qkv = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    if not grad_qkv.numel():
        return grad_qkv
    grad, qkv, shape = grad.contiguous(), qkv.contiguous(), _shape(n, d)
    with torch.cuda.device_of(qkv):
        if n > 64 and d <= 64:
            _attention_bwd_kernel[(b * h,)](
                grad,
                qkv,
                out.contiguous(),
                lse.contiguous(),
                grad_qkv,
                scale,
                n,
                H=h,
                **shape,
                **OPTIONS,
            )
        else:
            _attention_bwd_short_kernel[(b * h,)](
                grad,
                qkv,
                grad_qkv,
                scale,
                n,
                H=h,
                D=d,
                BLOCK_D=shape["BLOCK_D"],
                ROWS=128 if n > 64 else shape["LAST"],
                **OPTIONS | {"num_warps": 8 if n > 64 else 4},  # a group of 4 for 64 rows
            )
    return grad_qkv
