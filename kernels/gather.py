"""Row copies between (B, N, D) and (B, K, D).

One program copies one token. Both kernels move bytes and do no arithmetic, so they are bound by
memory: 2 * B * K * D * itemsize bytes, plus the zero fill of the scatter. One writer per row and no
atomics: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": False}  # no arithmetic here; set because its default changes


@triton.jit
def _gather_kernel(
    x_ptr,  # (B, N, D)
    ids_ptr,  # (B, K)
    out_ptr,  # (B, K, D)
    N,
    K,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # b * K + k; int64 because row * D can pass 2**31
    source = (row // K) * N + tl.load(ids_ptr + row)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(x_ptr + source * D + d, mask=d < D)
    tl.store(out_ptr + row * D + d, token, mask=d < D)


@triton.jit
def _scatter_kernel(
    x_ptr,  # (B, K, D)
    ids_ptr,  # (B, K)
    out_ptr,  # (B, N, D), zero-filled
    N,
    K,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = (row // K) * N + tl.load(ids_ptr + row)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(x_ptr + row * D + d, mask=d < D)
    # ids are unique within an image, so no two programs write the same row
    tl.store(out_ptr + target * D + d, token, mask=d < D)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    b, n, d = x.shape
    k = ids.shape[1]
    out = torch.empty(b, k, d, device=x.device, dtype=x.dtype)
    if out.numel():
        with torch.cuda.device_of(x):
            _gather_kernel[(b * k,)](
                x.contiguous(),
                ids.contiguous(),
                out,
                n,
                k,
                d,
                BLOCK_D=triton.next_power_of_2(d),
                **OPTIONS,
            )
    return out


def scatter_tokens(x: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    b, k, d = x.shape
    out = torch.zeros(b, num_tokens, d, device=x.device, dtype=x.dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            _scatter_kernel[(b * k,)](
                x.contiguous(),
                ids.contiguous(),
                out,
                num_tokens,
                k,
                d,
                BLOCK_D=triton.next_power_of_2(d),
                **OPTIONS,
            )
    return out
