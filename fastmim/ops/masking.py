"""Which patches the encoder sees: a function of (seed, epoch, sample id) and of nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._registry import Implementation, Native, Op


class Masks(NamedTuple):
    """Random masks of a batch, as MAE (arXiv:2111.06377, sec. 3) draws them.

    Attributes:
        ids_shuffle: (B, N), int64. Patch positions in shuffle order; the first ``num_keep`` are
            visible.
        ids_restore: (B, N), int64. Inverse permutation: rank of each patch in shuffle order.
        num_keep: K, the number of visible patches.
    """

    ids_shuffle: Tensor
    ids_restore: Tensor
    num_keep: int

    @property
    def ids_keep(self) -> Tensor:
        """(B, K), int64: positions of the visible patches, in shuffle order."""
        return self.ids_shuffle[:, : self.num_keep]

    @property
    def ids_masked(self) -> Tensor:
        """(B, N - K), int64: positions of the masked patches, in shuffle order."""
        return self.ids_shuffle[:, self.num_keep :]

    @property
    def mask(self) -> Tensor:
        """(B, N), bool: True where the patch is masked, in the order of the image."""
        return self.ids_restore >= self.num_keep


def num_keep(num_patches: int, mask_ratio: float) -> int:
    """Visible patches per image: ``int(N * (1 - mask_ratio))`` in floating point, as MAE does.

    Args:
        num_patches: N, patches per image.
        mask_ratio: Fraction of patches removed, in (0, 1).

    Raises:
        ValueError: If the ratio is outside (0, 1) or leaves no visible or no masked patch.
    """
    if not 0.0 < mask_ratio < 1.0:  # also refuses NaN
        raise ValueError(f"mask_ratio: expected a number in (0, 1), got {mask_ratio}")
    kept = int(num_patches * (1 - mask_ratio))
    if not 1 <= kept < num_patches:
        remedy = "use larger images or smaller patches"
        if num_patches > 1:
            half = 0.5 / num_patches  # away from the bounds, which rounding may cross
            remedy = f"choose a ratio from {half:.4f} to {1 - 3 * half:.4f}"
        raise ValueError(
            f"mask_ratio: {mask_ratio} of {num_patches} patches keeps {kept} visible; at least one "
            f"must be visible and one masked: {remedy}"
        )
    return kept


def _check_keep(function: str, num_patches: int, kept: int) -> None:
    if not 1 <= kept < num_patches:
        raise ValueError(
            f"{function}: expected num_keep in [1, {num_patches}), got {kept} "
            f"of {num_patches} patches"
        )


def sample_masks(
    seed: int, epoch: int, sample_ids: Tensor, num_patches: int, num_keep: int
) -> Masks:
    """Draw masks that depend on (seed, epoch, sample id) only: ``rank of Philox(i) among 0..N-1``.

    The algorithm, in integers, so that every backend agrees to the bit. All words have 32 bits.
    Word ``w[i]`` of patch ``i`` is output ``i mod 4`` of Philox4x32-10 (Salmon et al., SC 2011)
    with counter ``(i div 4, epoch, low(sample_id), high(sample_id))`` and key
    ``(low(seed), high(seed))``. ``ids_restore[i]`` is the number of patches ``j`` with
    ``(w[j], j) < (w[i], i)`` in lexicographic order; the ``num_keep`` patches of lowest rank are
    visible. World size, batch order and worker count play no part.

    Args:
        seed: Any integer; its 64 low bits count.
        epoch: In [0, 2**32).
        sample_ids: (B,), int64, index of each image in its data set, not negative.
        num_patches: N, patches per image, at least 2.
        num_keep: K, visible patches, in [1, N).

    Returns:
        :class:`Masks` with int64 tensors (B, N) on the device of ``sample_ids``.

    Raises:
        ValueError: If ``sample_ids`` is not a vector of int64, or ``num_keep`` or ``epoch`` is out
            of range.
    """
    _check_samples("sample_masks", sample_ids, epoch)
    _check_keep("sample_masks", num_patches, num_keep)
    return Masks(*_sample(sample_ids, _signed(seed), epoch, num_patches), num_keep)


def sample_uniforms(seed: int, epoch: int, sample_ids: Tensor, count: int) -> Tensor:
    """Numbers that depend on (seed, epoch, sample id) only, for stochastic depth.

    The generator of :func:`sample_masks` with the first counter word from 2**31 on, where no mask
    reaches; a number is the 24 high bits of a word times 2**-24. Plain PyTorch: a few hundred
    numbers a batch need no kernel.

    Args:
        seed: Any integer; its 64 low bits count.
        epoch: In [0, 2**32).
        sample_ids: (B,), int64, index of each image in its data set, not negative.
        count: Numbers for each sample.

    Returns:
        (B, count), float32, in [0, 1).

    Raises:
        ValueError: If ``sample_ids`` is not a vector of int64, or ``epoch`` is out of range.
    """
    _check_samples("sample_uniforms", sample_ids, epoch)
    words = reference.random_words(sample_ids, _signed(seed), epoch, count, first_block=2**31)
    return (words >> 8).float() * 2.0**-24


def _check_samples(function: str, sample_ids: Tensor, epoch: int) -> None:
    if sample_ids.ndim != 1 or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"{function}: expected sample_ids (B,) of int64, "
            f"got {tuple(sample_ids.shape)} of {sample_ids.dtype}"
        )
    if not 0 <= epoch < 2**32:
        raise ValueError(f"{function}: expected epoch in [0, 2**32), got {epoch}")


def masks_from_noise(noise: Tensor, num_keep: int) -> Masks:
    """Masks from given noise, ``ids_shuffle = argsort(noise)``: the smallest stay visible.

    Exactly MAE's rule (arXiv:2111.06377, sec. 3); ties are broken as ``torch.argsort`` does.

    Args:
        noise: (B, N), any real dtype.
        num_keep: K, visible patches, in [1, N).

    Raises:
        ValueError: If ``noise`` is not (B, N) or ``num_keep`` is out of range.
    """
    if noise.ndim != 2:
        raise ValueError(f"masks_from_noise: expected noise (B, N), got {tuple(noise.shape)}")
    _check_keep("masks_from_noise", noise.shape[1], num_keep)
    return masks_from_shuffle(noise.argsort(dim=1), num_keep)


def masks_from_shuffle(ids_shuffle: Tensor, num_keep: int) -> Masks:
    """Masks from a given order: the first ``num_keep`` of each row are visible.

    Args:
        ids_shuffle: (B, N), int64, each row a permutation of 0..N-1; values are not checked.
        num_keep: K, visible patches, in [1, N).

    Raises:
        ValueError: If ``ids_shuffle`` is not (B, N) of int64 or ``num_keep`` is out of range.
    """
    if ids_shuffle.ndim != 2 or ids_shuffle.dtype != torch.int64:
        raise ValueError(
            "masks_from_shuffle: expected ids_shuffle (B, N) of int64, "
            f"got {tuple(ids_shuffle.shape)} of {ids_shuffle.dtype}"
        )
    _check_keep("masks_from_shuffle", ids_shuffle.shape[1], num_keep)
    return Masks(ids_shuffle, reference.inverse_permutation(ids_shuffle), num_keep)


def _signed(seed: int) -> int:
    """The 64 low bits of a seed as the int64 that an operator schema can carry."""
    low = seed & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low


def _fake_sample(sample_ids, seed, epoch, num_patches):
    ids = sample_ids.new_empty(sample_ids.shape[0], num_patches)
    return ids, torch.empty_like(ids)


def _refuse_large(sample_ids, seed, epoch, num_patches) -> str | None:
    if num_patches > 1024:
        return f"its kernel compares all pairs of at most 1024 patches, not {num_patches}"
    return None


_sample = Op(
    "sample_masks(Tensor sample_ids, int seed, int epoch, SymInt num_patches) -> (Tensor, Tensor)",
    fake=_fake_sample,
    implementations={
        "reference": reference.sample_masks,
        "triton": Implementation("fastmim.kernels.masking:sample_masks", accepts=_refuse_large),
        "cpp": Native("sample_masks"),
    },
    shapes={
        "edge": dict(b=3, n=7),
        "edge_two_patches": dict(b=2, n=2),
        "edge_empty": dict(b=0, n=16),
        "edge_l": dict(b=2, n=50),
        "edge_h14": dict(b=2, n=257),
        "vit_b": dict(b=256, n=196),
        "vit_h14": dict(b=256, n=256),
    },
    make=lambda b, n, device, dtype: (
        torch.randint(0, 2**40, (b,), device=device),
        1234,
        5,
        n,
    ),
)
