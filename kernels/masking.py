"""Random masks of a batch: Philox words and their ranks, in one launch.

One program makes the masks of one image: it draws N words and counts, for each patch i, the patches
j with (w[j], j) < (w[i], i). N * N comparisons of 64-bit keys (65 000 for N = 256) against 16 * N
bytes written: bound by integer arithmetic. Integers only, so equal to the reference to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": False}  # no floating point here; set because its default changes
MAX_COMPARED = 16  # keys compared with all others at a time; more would not stay in registers


@triton.jit
def _keys(sample_id, seed, epoch, i):
    """``w[i] * 2**32 + i``: ordered as the pairs (w[i], i)."""
    low, high = sample_id.to(tl.int32), (sample_id >> 32).to(tl.int32)
    words = tl.philox(seed, i // 4, epoch, low, high)
    first = tl.where(i % 4 == 0, words[0], words[1])
    last = tl.where(i % 4 == 2, words[2], words[3])
    word = tl.where(i % 4 < 2, first, last)
    return (word.to(tl.uint64) << 32) | i.to(tl.uint64)


# A new seed or epoch is no reason to compile again.
@triton.jit(do_not_specialize=["seed", "epoch"])
def _sample_masks_kernel(
    sample_ids_ptr,  # (B,)
    ids_shuffle_ptr,  # (B, N)
    ids_restore_ptr,  # (B, N)
    seed: tl.int64,
    epoch: tl.int64,
    N,
    BLOCK_N: tl.constexpr,
    COMPARED: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    sample_id = tl.load(sample_ids_ptr + image)
    epoch_word = tl.full((), epoch, tl.int64).to(tl.int32)
    i = tl.arange(0, BLOCK_N)
    keys = _keys(sample_id, seed, epoch_word, i)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, BLOCK_N, COMPARED):
        j = start + tl.arange(0, COMPARED)
        others = tl.gather(keys, j, axis=0)
        lower = (others[:, None] < keys[None, :]) & (j < N)[:, None]
        rank += tl.sum(lower.to(tl.int32), axis=0)  # along registers: i lies across threads
    row = image * N
    tl.store(ids_restore_ptr + row + i, rank.to(tl.int64), mask=i < N)
    tl.store(ids_shuffle_ptr + row + rank, i.to(tl.int64), mask=i < N)


def sample_masks(
    sample_ids: Tensor, seed: int, epoch: int, num_patches: int
) -> tuple[Tensor, Tensor]:
    b = sample_ids.shape[0]
    ids_shuffle, ids_restore = (
        torch.empty(b, num_patches, device=sample_ids.device, dtype=torch.int64) for _ in range(2)
    )
    if ids_shuffle.numel():
        block = triton.next_power_of_2(num_patches)
        with torch.cuda.device_of(sample_ids):
            _sample_masks_kernel[(b,)](
                sample_ids.contiguous(),
                ids_shuffle,
                ids_restore,
                seed,
                epoch,
                num_patches,
                BLOCK_N=block,
                COMPARED=min(block, MAX_COMPARED),
                num_warps=4 if block <= 256 else 8,  # at most 64 comparisons a thread and step
                **OPTIONS,
            )
    return ids_shuffle, ids_restore
