"""Attention of one sequence and head per program, and its gradients.

Queries, keys and values are rows of D values. They lie packed, (B, N, 3, H, D), or apart, queries
(B, M, H, D) and keys with values (B, N, 2, H, D); or packed without a batch, (T, 3, H, D), with the
first row of each sequence in a tensor.

The rows of a head are cut into chunks of 64 (of 32 or 16 where registers are short) and a tail of
16, 32 or 64, so that 65, 197 and 257 are padded to 80, 208 and 272. Only tails are masked, and all
chunks of sequences of various lengths. The forward pass keeps all scores of a chunk of queries in
registers: no running maximum, no rescaling. It takes 4 * M * N * D FLOP and 2 * (M + N) * D *
itemsize bytes for a head.

Three backward passes, one writer per output and no atomics in any of them: deterministic.

* ``short``, one tile: the softmax is computed again; neither ``out`` nor ``lse`` is read.
  10 * M * N * D FLOP, (3 * M + 4 * N) * D * itemsize bytes.
* ``long``: the gradients of all queries stay in registers while the program walks over the chunks
  of keys. The same FLOP; ``out`` and ``lse`` are read.
* ``swept``: one walk for the gradients of keys and values, a second one for those of the queries.
  14 * M * N * D FLOP, but registers for one chunk alone: any length, head dim and dtype.

Tiles are loaded where they are used, again for every chunk of the other side: from the caches, and
a tile kept over the loop would be kept in registers, itself (before sm_90) or as descriptors of its
place in shared memory. That decides whether 197 tokens fit without a spill.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fused, scale and maximum take one instruction. Without a loop over loads there is nothing to
# pipeline. 4 warps: one group of them multiplies 64 rows on sm_90; 8 would compute them twice.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1, "num_warps": 4}
CHUNK = 64
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
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Rows of chunk ``i``; the one after the FULL chunks is the tail."""
    if i == FULL:
        return _load_rows(ptr, i * CHUNK, N, STRIDE, D, BLOCK_D, LAST, True)
    else:
        return _load_rows(ptr, i * CHUNK, N, STRIDE, D, BLOCK_D, CHUNK, RAGGED)


@triton.jit
def _head(
    starts_ptr,  # (B + 1,), int32: of packed sequences; or None
    M,  # with starts: T, all rows
    N,  # with starts: rows of a sequence, at most
    H: tl.constexpr,
):
    """Of this program: the head, its first query, key and lse, and its queries and keys."""
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    if starts_ptr is None:
        return h, b * M, b * N, program * M, M, N
    else:
        # Whatever the starts are, no row outside the tensors is touched.
        start = tl.maximum(tl.load(starts_ptr + b), 0)
        rows = tl.minimum(tl.minimum(tl.load(starts_ptr + b + 1), M) - start, N)
        first = start.to(tl.int64)
        return h, first, first, h * M + first, rows, rows


@triton.jit
def _attention_rows(
    q_ptr,
    k_ptr,
    out_ptr,
    lse_ptr,
    start,
    scale,  # times log2(e)
    M,
    N,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of ROWS queries to all keys."""
    q = _load_rows(q_ptr, start, M, Q_ROW, D, BLOCK_D, ROWS, TAIL)
    scores = ()
    row_max = tl.full((ROWS,), -float("inf"), tl.float32)
    for i in tl.static_range(FULL + 1):
        k = _load_chunk(k_ptr, i, N, KV_ROW, D, BLOCK_D, CHUNK, FULL, LAST, RAGGED)
        chunk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if RAGGED or i == FULL:
            key = tl.arange(0, k.shape[0]) + i * CHUNK
            chunk = tl.where((key < N)[None, :], chunk, -float("inf"))
        row_max = tl.maximum(row_max, tl.max(chunk, 1))
        scores += (chunk,)
    row_max *= scale
    row_sum = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in tl.static_range(FULL + 1):
        p = tl.exp2(scores[i] * scale - row_max[:, None])
        row_sum += tl.sum(p, 1)
        v = _load_chunk(k_ptr + H * D, i, N, KV_ROW, D, BLOCK_D, CHUNK, FULL, LAST, RAGGED)
        out = tl.dot(p.to(q.dtype), v, out, input_precision=PRECISION)
    out *= (1.0 / row_sum)[:, None]
    _store_rows(out_ptr, out, start, M, H * D, D, BLOCK_D, ROWS, TAIL)
    n = tl.arange(0, ROWS) + start
    tl.store(lse_ptr + n, (row_max + tl.log2(row_sum)) * LN_2, mask=n < M)


@triton.jit
def _attention_kernel(
    q_ptr,
    kv_ptr,
    out_ptr,  # (B, M, H, D) or (T, H, D)
    lse_ptr,  # (B, H, M) or (H, T), float32
    starts_ptr,
    scale,
    M,
    N,
    PACKED: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,  # chunks of keys before the tail
    LAST: tl.constexpr,  # of keys
    FULL_M: tl.constexpr,  # of queries
    LAST_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Q_ROW: tl.constexpr = 3 * H * D if PACKED else H * D
    KV_ROW: tl.constexpr = 3 * H * D if PACKED else 2 * H * D
    RAGGED: tl.constexpr = starts_ptr is not None
    h, query, key, first, M, N = _head(starts_ptr, M, N, H)
    q_ptr += query * Q_ROW + h * D
    k_ptr = kv_ptr + key * KV_ROW + h * D + (H * D if PACKED else 0)
    out_ptr += query * H * D + h * D
    lse_ptr += first
    scale *= LOG2_E
    full = tl.maximum(M - 1, 0) // CHUNK if RAGGED else FULL_M
    for i in range(full):
        _attention_rows(
            *(q_ptr, k_ptr, out_ptr, lse_ptr, i * CHUNK, scale, M, N, Q_ROW, KV_ROW, H, D),
            *(BLOCK_D, CHUNK, FULL, LAST, CHUNK, False, RAGGED, PRECISION),
        )
    _attention_rows(
        *(q_ptr, k_ptr, out_ptr, lse_ptr, full * CHUNK, scale, M, N, Q_ROW, KV_ROW, H, D),
        *(BLOCK_D, CHUNK, FULL, LAST, LAST_M, True, RAGGED, PRECISION),
    )


@triton.jit
def _attention_bwd_short_kernel(
    grad_ptr,  # (B, M, H, D) or (T, H, D)
    q_ptr,
    kv_ptr,
    grad_q_ptr,  # like q
    grad_kv_ptr,  # like kv
    starts_ptr,
    scale,
    M,
    N,
    PACKED: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAST: tl.constexpr,  # of keys
    LAST_M: tl.constexpr,  # of queries
):
    Q_ROW: tl.constexpr = 3 * H * D if PACKED else H * D
    KV_ROW: tl.constexpr = 3 * H * D if PACKED else 2 * H * D
    h, query, key, _, M, N = _head(starts_ptr, M, N, H)
    at_q = query * Q_ROW + h * D
    at_k = key * KV_ROW + h * D + (H * D if PACKED else 0)
    k_ptr, grad_k_ptr = kv_ptr + at_k, grad_kv_ptr + at_k
    q = _load_rows(q_ptr + at_q, 0, M, Q_ROW, D, BLOCK_D, LAST_M, True)
    k = _load_rows(k_ptr, 0, N, KV_ROW, D, BLOCK_D, LAST, True)
    v = _load_rows(k_ptr + H * D, 0, N, KV_ROW, D, BLOCK_D, LAST, True)
    grad_ptr += query * H * D + h * D
    grad = _load_rows(grad_ptr, 0, M, H * D, D, BLOCK_D, LAST_M, True)

    scores = tl.dot(q, tl.trans(k))
    scores = tl.where((tl.arange(0, LAST) < N)[None, :], scores, -float("inf"))
    row_max = tl.max(scores, 1) * (scale * LOG2_E)
    p = tl.exp2(scores * (scale * LOG2_E) - row_max[:, None])
    p /= tl.sum(p, 1)[:, None]
    grad_p = tl.dot(grad, tl.trans(v))
    delta = tl.sum(p * grad_p, 1)  # sum of out * grad over D; the whole row of p is here
    grad_scores = (p * (grad_p - delta[:, None])).to(q.dtype)

    # Queries beyond M have no grad, so they add nothing.
    grad_q = tl.dot(grad_scores, k) * scale
    _store_rows(grad_q_ptr + at_q, grad_q, 0, M, Q_ROW, D, BLOCK_D, LAST_M, True)
    grad_k = tl.dot(tl.trans(grad_scores), q) * scale
    _store_rows(grad_k_ptr, grad_k, 0, N, KV_ROW, D, BLOCK_D, LAST, True)
    grad_v = tl.dot(tl.trans(p.to(q.dtype)), grad)
    _store_rows(grad_k_ptr + H * D, grad_v, 0, N, KV_ROW, D, BLOCK_D, LAST, True)


@triton.jit
def _bwd_tile(
    q,
    grad,
    k,
    v,
    lse,  # of the queries
    delta,  # of the queries: sum of out * grad over D
    keys,  # that count, from the first
    scale,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax of a tile and the gradient of its scores, which lacks ``scale``."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if q.dtype == tl.float32:  # the difference is small; its rounding must be too
        p = tl.exp2((scores * scale - lse[:, None]) * LOG2_E)
    else:
        p = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
    if TAIL:
        p = tl.where((tl.arange(0, k.shape[0]) < keys)[None, :], p, 0.0)
    grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return p.to(q.dtype), (p * (grad_p - delta[:, None])).to(q.dtype)


@triton.jit
def _attention_bwd_keys(
    grad_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    grad_k_ptr,
    delta,
    grad_q,
    start,
    scale,
    M,
    N,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL_M: tl.constexpr,
    LAST_M: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Stores the gradients of ROWS keys and values; returns ``grad_q`` with their part added."""
    k = _load_rows(k_ptr, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
    v = _load_rows(k_ptr + H * D, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
    grad_k = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_v = tl.zeros((ROWS, BLOCK_D), tl.float32)
    added = ()
    for i in tl.static_range(FULL_M + 1):
        q = _load_chunk(q_ptr, i, M, Q_ROW, D, BLOCK_D, CHUNK, FULL_M, LAST_M, False)
        grad = _load_chunk(grad_ptr, i, M, H * D, D, BLOCK_D, CHUNK, FULL_M, LAST_M, False)
        n = tl.arange(0, q.shape[0]) + i * CHUNK
        lse = tl.load(lse_ptr + n, mask=n < M, other=0.0)
        p, grad_scores = _bwd_tile(q, grad, k, v, lse, delta[i], N - start, scale, TAIL, "ieee")
        grad_v = tl.dot(tl.trans(p), grad, grad_v)
        grad_k = tl.dot(tl.trans(grad_scores), q, grad_k)
        added += (tl.dot(grad_scores, k, grad_q[i]),)
    grad_k *= scale
    _store_rows(grad_k_ptr, grad_k, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
    _store_rows(grad_k_ptr + H * D, grad_v, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
    return added


@triton.jit
def _attention_bwd_long_kernel(
    grad_ptr,  # (B, M, H, D)
    q_ptr,
    kv_ptr,
    out_ptr,  # (B, M, H, D)
    lse_ptr,  # (B, H, M), float32
    grad_q_ptr,  # like q
    grad_kv_ptr,  # like kv
    scale,
    M,
    N,
    PACKED: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    FULL_M: tl.constexpr,
    LAST_M: tl.constexpr,
):
    Q_ROW: tl.constexpr = 3 * H * D if PACKED else H * D
    KV_ROW: tl.constexpr = 3 * H * D if PACKED else 2 * H * D
    h, query, key, first, M, N = _head(None, M, N, H)
    q_ptr += query * Q_ROW + h * D
    grad_q_ptr += query * Q_ROW + h * D
    at_k = key * KV_ROW + h * D + (H * D if PACKED else 0)
    k_ptr, grad_k_ptr = kv_ptr + at_k, grad_kv_ptr + at_k
    grad_ptr += query * H * D + h * D
    out_ptr += query * H * D + h * D
    lse_ptr += first

    delta, grad_q = (), ()
    for i in tl.static_range(FULL_M + 1):
        out = _load_chunk(out_ptr, i, M, H * D, D, BLOCK_D, CHUNK, FULL_M, LAST_M, False)
        grad = _load_chunk(grad_ptr, i, M, H * D, D, BLOCK_D, CHUNK, FULL_M, LAST_M, False)
        delta += (tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1),)
        grad_q += (tl.zeros(grad.shape, tl.float32),)
    for i in range(FULL):
        grad_q = _attention_bwd_keys(
            *(grad_ptr, q_ptr, k_ptr, lse_ptr, grad_k_ptr, delta, grad_q, i * CHUNK, scale, M, N),
            *(Q_ROW, KV_ROW, H, D, BLOCK_D, CHUNK, FULL_M, LAST_M, CHUNK, False),
        )
    grad_q = _attention_bwd_keys(
        *(grad_ptr, q_ptr, k_ptr, lse_ptr, grad_k_ptr, delta, grad_q, FULL * CHUNK, scale, M, N),
        *(Q_ROW, KV_ROW, H, D, BLOCK_D, CHUNK, FULL_M, LAST_M, LAST, True),
    )
    for i in tl.static_range(FULL_M + 1):
        rows = grad_q[i] * scale
        _store_rows(
            *(grad_q_ptr, rows, i * CHUNK, M, Q_ROW, D, BLOCK_D, rows.shape[0], i == FULL_M)
        )


@triton.jit
def _load_queries(
    grad_ptr,
    q_ptr,
    out_ptr,
    lse_ptr,
    start,
    M,
    Q_ROW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Queries, the gradients of their results, and what their softmax needs."""
    q = _load_rows(q_ptr, start, M, Q_ROW, D, BLOCK_D, ROWS, TAIL)
    grad = _load_rows(grad_ptr, start, M, H * D, D, BLOCK_D, ROWS, TAIL)
    out = _load_rows(out_ptr, start, M, H * D, D, BLOCK_D, ROWS, TAIL)
    n = tl.arange(0, ROWS) + start
    lse = tl.load(lse_ptr + n, mask=n < M, other=0.0)
    return q, grad, lse, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)


@triton.jit
def _sweep_queries(
    grad_ptr,
    q_ptr,
    k_ptr,
    out_ptr,
    lse_ptr,
    grad_k_ptr,
    start,
    scale,
    M,
    N,
    full_m,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST_M: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the gradients of ROWS keys and values, a sum over all queries."""
    grad_k = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_v = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(full_m):
        k = _load_rows(k_ptr, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
        v = _load_rows(k_ptr + H * D, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
        q, grad, lse, delta = _load_queries(
            *(grad_ptr, q_ptr, out_ptr, lse_ptr, i * CHUNK, M, Q_ROW, H, D, BLOCK_D),
            *(CHUNK, False),
        )
        p, grad_scores = _bwd_tile(q, grad, k, v, lse, delta, N - start, scale, TAIL, PRECISION)
        grad_v = tl.dot(tl.trans(p), grad, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(grad_scores), q, grad_k, input_precision=PRECISION)
    k = _load_rows(k_ptr, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
    v = _load_rows(k_ptr + H * D, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
    q, grad, lse, delta = _load_queries(
        *(grad_ptr, q_ptr, out_ptr, lse_ptr, full_m * CHUNK, M, Q_ROW, H, D, BLOCK_D),
        *(LAST_M, True),
    )
    p, grad_scores = _bwd_tile(q, grad, k, v, lse, delta, N - start, scale, TAIL, PRECISION)
    grad_v = tl.dot(tl.trans(p), grad, grad_v, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(grad_scores), q, grad_k, input_precision=PRECISION)
    grad_k *= scale
    _store_rows(grad_k_ptr, grad_k, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)
    _store_rows(grad_k_ptr + H * D, grad_v, start, N, KV_ROW, D, BLOCK_D, ROWS, TAIL)


@triton.jit
def _sweep_keys(
    grad_ptr,
    q_ptr,
    k_ptr,
    out_ptr,
    lse_ptr,
    grad_q_ptr,
    start,
    scale,
    M,
    N,
    full,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the gradients of ROWS queries, a sum over all keys."""
    q, grad, lse, delta = _load_queries(
        grad_ptr, q_ptr, out_ptr, lse_ptr, start, M, Q_ROW, H, D, BLOCK_D, ROWS, TAIL
    )
    grad_q = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(full):
        k = _load_rows(k_ptr, i * CHUNK, N, KV_ROW, D, BLOCK_D, CHUNK, False)
        v = _load_rows(k_ptr + H * D, i * CHUNK, N, KV_ROW, D, BLOCK_D, CHUNK, False)
        _, grad_scores = _bwd_tile(q, grad, k, v, lse, delta, N, scale, False, PRECISION)
        grad_q = tl.dot(grad_scores, k, grad_q, input_precision=PRECISION)
    k = _load_rows(k_ptr, full * CHUNK, N, KV_ROW, D, BLOCK_D, LAST, True)
    v = _load_rows(k_ptr + H * D, full * CHUNK, N, KV_ROW, D, BLOCK_D, LAST, True)
    _, grad_scores = _bwd_tile(q, grad, k, v, lse, delta, N - full * CHUNK, scale, True, PRECISION)
    grad_q = tl.dot(grad_scores, k, grad_q, input_precision=PRECISION) * scale
    _store_rows(grad_q_ptr, grad_q, start, M, Q_ROW, D, BLOCK_D, ROWS, TAIL)


@triton.jit
def _attention_bwd_swept_kernel(
    grad_ptr,  # (B, M, H, D) or (T, H, D)
    q_ptr,
    kv_ptr,
    out_ptr,  # like grad
    lse_ptr,  # (B, H, M) or (H, T), float32
    grad_q_ptr,  # like q
    grad_kv_ptr,  # like kv
    starts_ptr,
    scale,
    M,
    N,
    PACKED: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST: tl.constexpr,
    LAST_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Q_ROW: tl.constexpr = 3 * H * D if PACKED else H * D
    KV_ROW: tl.constexpr = 3 * H * D if PACKED else 2 * H * D
    h, query, key, first, M, N = _head(starts_ptr, M, N, H)
    q_ptr += query * Q_ROW + h * D
    grad_q_ptr += query * Q_ROW + h * D
    at_k = key * KV_ROW + h * D + (H * D if PACKED else 0)
    k_ptr, grad_k_ptr = kv_ptr + at_k, grad_kv_ptr + at_k
    grad_ptr += query * H * D + h * D
    out_ptr += query * H * D + h * D
    lse_ptr += first
    full_m, full = tl.maximum(M - 1, 0) // CHUNK, tl.maximum(N - 1, 0) // CHUNK
    for i in range(full):
        _sweep_queries(
            *(grad_ptr, q_ptr, k_ptr, out_ptr, lse_ptr, grad_k_ptr, i * CHUNK, scale, M, N),
            *(full_m, Q_ROW, KV_ROW, H, D, BLOCK_D, CHUNK, LAST_M, CHUNK, False, PRECISION),
        )
    _sweep_queries(
        *(grad_ptr, q_ptr, k_ptr, out_ptr, lse_ptr, grad_k_ptr, full * CHUNK, scale, M, N),
        *(full_m, Q_ROW, KV_ROW, H, D, BLOCK_D, CHUNK, LAST_M, LAST, True, PRECISION),
    )
    for i in range(full_m):
        _sweep_keys(
            *(grad_ptr, q_ptr, k_ptr, out_ptr, lse_ptr, grad_q_ptr, i * CHUNK, scale, M, N),
            *(full, Q_ROW, KV_ROW, H, D, BLOCK_D, CHUNK, LAST, CHUNK, False, PRECISION),
        )
    _sweep_keys(
        *(grad_ptr, q_ptr, k_ptr, out_ptr, lse_ptr, grad_q_ptr, full_m * CHUNK, scale, M, N),
        *(full, Q_ROW, KV_ROW, H, D, BLOCK_D, CHUNK, LAST, LAST_M, True, PRECISION),
    )


class _Call(NamedTuple):
    """What the kernels need to know of one call.

    Attributes:
        q: Queries; with keys and values if these are packed with them.
        kv: Keys and values.
        starts: First rows of the sequences; None: B of them, of M queries and N keys each.
        scale: Of the scores.
        sequences: B.
        queries: M, or that of the longest sequence.
        keys: N, likewise.
    """

    q: Tensor
    kv: Tensor
    starts: Tensor | None
    scale: float
    sequences: int
    queries: int
    keys: int

    @classmethod
    def packed(cls, qkv: Tensor, scale: float) -> "_Call":
        b, n = qkv.shape[:2]
        qkv = qkv.contiguous()
        return cls(qkv, qkv, None, scale, b, n, n)

    @classmethod
    def apart(cls, q: Tensor, kv: Tensor, scale: float) -> "_Call":
        b, m = q.shape[:2]
        return cls(q.contiguous(), kv.contiguous(), None, scale, b, m, kv.shape[1])

    @classmethod
    def ragged(cls, qkv: Tensor, starts: Tensor, longest: int, scale: float) -> "_Call":
        qkv = qkv.contiguous()
        return cls(qkv, qkv, starts.contiguous(), scale, len(starts) - 1, longest, longest)

    @property
    def half(self) -> bool:
        return self.q.element_size() == 2

    @property
    def grid(self) -> tuple[int]:
        return (self.sequences * self.q.shape[-2],)

    @property
    def counts(self) -> tuple[int, int]:
        return (self.queries if self.starts is None else self.q.shape[0], self.keys)

    def shape(self) -> dict[str, int]:
        h, d = self.q.shape[-2:]
        block = max(16, triton.next_power_of_2(d))
        return {"PACKED": self.q is self.kv, "H": h, "D": d, "BLOCK_D": block}

    def last(self, count: int, chunk: int) -> int:
        """Rows of the tail of all sequences that have at most this many."""
        if self.starts is not None and count > chunk:
            return chunk
        return _last(count, chunk)

    def precision(self) -> str:
        """Of products of float32; the other types have one way only."""
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if tf32 and not self.half else "ieee"


def _full(count: int, chunk: int) -> int:
    """Chunks before the tail."""
    return (count - 1) // chunk


def _last(count: int, chunk: int) -> int:
    """Rows of the tail; products have at least 16."""
    return max(16, triton.next_power_of_2(count - _full(count, chunk) * chunk))


def _forward(call: _Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    wide = call.shape()["BLOCK_D"] == 128 and call.keys > 80  # their scores need the registers
    chunk = CHUNK if call.half and not wide else 32
    if out.numel():
        with torch.cuda.device_of(call.q):
            _attention_kernel[call.grid](
                *(call.q, call.kv, out, lse, call.starts, call.scale, *call.counts),
                **call.shape(),
                CHUNK=chunk,
                FULL=_full(call.keys, chunk),
                LAST=_last(call.keys, chunk),
                FULL_M=_full(call.queries, chunk),
                LAST_M=call.last(call.queries, chunk),
                PRECISION=call.precision(),
                **OPTIONS | {"num_warps": 4 if chunk == CHUNK else 8},
            )
    return out, lse


def _backward(
    call: _Call, grad: Tensor, out: Tensor, lse: Tensor, grad_q: Tensor, grad_kv: Tensor
) -> None:
    if not grad_q.numel():
        return
    given, kept = (grad.contiguous(), call.q, call.kv), (out.contiguous(), lse.contiguous())
    grads, grid, shape = (grad_q, grad_kv), call.grid, call.shape()
    m, n = call.queries, call.keys
    with torch.cuda.device_of(call.q):
        if call.half and max(m, n) <= CHUNK:
            _attention_bwd_short_kernel[grid](
                *(*given, *grads, call.starts, call.scale, *call.counts),
                **shape,
                LAST=_last(n, CHUNK),
                LAST_M=_last(m, CHUNK),
                **OPTIONS,
            )
        elif call.half and call.starts is None and shape["BLOCK_D"] <= 32:
            _attention_bwd_long_kernel[grid](
                *(*given, *kept, *grads, call.scale, *call.counts),
                **shape,
                CHUNK=CHUNK,
                FULL=_full(n, CHUNK),
                LAST=_last(n, CHUNK),
                FULL_M=_full(m, CHUNK),
                LAST_M=_last(m, CHUNK),
                **OPTIONS,
            )
        else:
            chunk = 32 if call.half else 16
            warps = 8 if shape["BLOCK_D"] == 128 or not call.half else 4
            _attention_bwd_swept_kernel[grid](
                *(*given, *kept, *grads, call.starts, call.scale, *call.counts),
                **shape,
                CHUNK=chunk,
                LAST=call.last(n, chunk),
                LAST_M=call.last(m, chunk),
                PRECISION=call.precision(),
                **OPTIONS | {"num_warps": warps},
            )


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=dtype or like.dtype)


def attention(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    b, n, _, h, d = qkv.shape
    out, lse = _empty(qkv, b, n, h, d), _empty(qkv, b, h, n, dtype=torch.float32)
    return _forward(_Call.packed(qkv, scale), out, lse)


def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    grads = _empty(qkv, *qkv.shape)
    _backward(_Call.packed(qkv, scale), grad, out, lse, grads, grads)
    return grads


def attention_queries(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    b, m, h, d = q.shape
    out, lse = _empty(q, b, m, h, d), _empty(q, b, h, m, dtype=torch.float32)
    return _forward(_Call.apart(q, kv, scale), out, lse)


def attention_queries_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    grad_q, grad_kv = _empty(q, *q.shape), _empty(kv, *kv.shape)
    _backward(_Call.apart(q, kv, scale), grad, out, lse, grad_q, grad_kv)
    return grad_q, grad_kv


def attention_varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    t, _, h, d = qkv.shape
    out, lse = _empty(qkv, t, h, d), _empty(qkv, h, t, dtype=torch.float32)
    return _forward(_Call.ragged(qkv, cu_seqlens, max_seqlen, scale), out, lse)


def attention_varlen_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    grads = _empty(qkv, *qkv.shape)
    _backward(_Call.ragged(qkv, cu_seqlens, max_seqlen, scale), grad, out, lse, grads, grads)
    return grads
