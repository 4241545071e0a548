"""Random resized crop, flip and normalisation of a batch on its device."""

import math

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._limits import refuse_types
from fastmim.ops._registry import Implementation, Op
from fastmim.ops.patches import check_pixels


def augment(
    imgs: Tensor,
    sample_ids: Tensor,
    *,
    seed: int,
    epoch: int,
    size: tuple[int, int],
    area: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Crop, resize, flip and normalise: ``out = scale * resize(crop(imgs)) + shift``.

    A crop depends on (seed, epoch, sample id) and the size of the picture alone, by the rule of
    torchvision's RandomResizedCrop; it is the one that the loader draws with the same numbers. The
    words come from Philox4x64-10 (Salmon et al., SC 2011) with key ``(seed, 1)`` and counter
    ``(0, epoch, sample id, 0)``. Resizing is bicubic with antialias, rounded to uint8 after the
    rows and after the columns: within one grey level of ``interpolate(..., antialias=True)``, and
    the same on every backend. The ranges are those of MAE (arXiv:2111.06377, appendix A.1).

    Args:
        imgs: (B, C, H, W), uint8, any strides.
        sample_ids: (B,), int64, index of each image in its data set, not negative.
        seed: In [0, 2**64).
        epoch: In [0, 2**63).
        size: (h, w) of the result.
        area: Smallest and largest part of the picture's area, in (0, 1].
        ratio: Smallest and largest width / height, positive; drawn log-uniformly.
        hflip: Probability of a left-right flip, in [0, 1].
        scale: (C,) factor per channel; usually ``1 / (255 * std)``.
        shift: (C,) summand per channel; usually ``-mean / std``.
        dtype: Of the result, uint8 or floating point. Default: uint8, float32 with ``scale`` or
            ``shift``.

    Returns:
        (B, C, h, w), contiguous. The normalisation is done in float32. No gradient.

    Raises:
        ValueError: If dtypes or sizes do not fit or a range is empty.
    """
    _check_batch(imgs, sample_ids, size)
    _check_ranges(area, ratio, hflip)
    check_pixels("augment", imgs, scale, shift)
    normalized = scale is not None or shift is not None
    dtype = dtype or (torch.float32 if normalized else torch.uint8)
    if not dtype.is_floating_point and (normalized or dtype != torch.uint8):
        raise ValueError(
            f"augment: expected dtype uint8 without scale and shift, or floating point, got {dtype}"
        )
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**63):
        raise ValueError(
            f"augment: expected seed in [0, 2**64) and epoch in [0, 2**63), got {seed} and {epoch}"
        )
    signed = (seed + 2**63) % 2**64 - 2**63  # an operator's integers have 64 bits with a sign
    boxes = _sample_crops(sample_ids, signed, epoch, *imgs.shape[2:], *area, *ratio, hflip)
    return _crop_resize(imgs, boxes, *size, scale, shift, dtype)


def _check_batch(imgs: Tensor, sample_ids: Tensor, size: tuple[int, int]) -> None:
    if imgs.ndim != 4 or imgs.dtype != torch.uint8 or 0 in imgs.shape[2:] or min(size) < 1:
        raise ValueError(
            "augment: expected imgs (B, C, H, W) of uint8 and a size of at least (1, 1), "
            f"got {tuple(imgs.shape)} of {imgs.dtype} and {size}"
        )
    if tuple(sample_ids.shape) != tuple(imgs.shape[:1]) or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"augment: expected sample_ids ({imgs.shape[0]},) of int64, "
            f"got {tuple(sample_ids.shape)} of {sample_ids.dtype}"
        )


def _check_ranges(area: tuple[float, float], ratio: tuple[float, float], hflip: float) -> None:
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"augment: expected 0 < area[0] <= area[1] <= 1, got {area}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"augment: expected 0 < ratio[0] <= ratio[1], got {ratio}")
    if not 0 <= hflip <= 1:
        raise ValueError(f"augment: expected hflip in [0, 1], got {hflip}")


def _fake_sample_crops(sample_ids, *rest):
    return sample_ids.new_empty(sample_ids.shape[0], 5, dtype=torch.int32)


def _fake_crop_resize(imgs, boxes, height, width, scale, shift, dtype):
    return imgs.new_empty(*imgs.shape[:2], height, width, dtype=dtype)


def _refuse(imgs, boxes, height, width, scale, shift, dtype):
    return refuse_types(scale, shift, None if dtype == torch.uint8 else dtype)


def _make_crops(b, h, w, device, dtype):
    ids = torch.randint(2**40, (b,), device=device)
    return ids, -3, 7, h, w, 0.2, 1.0, 3 / 4, 4 / 3, 0.5


def _make_resize(b, c, h, w, height, width, raw=False, *, device, dtype):
    imgs = torch.randint(256, (b, c, h, w), device=device, dtype=torch.uint8)
    ids = torch.arange(b, device=device)
    boxes = reference.sample_crops(ids, 0, 0, h, w, 0.2, 1.0, 3 / 4, 4 / 3, 0.5)
    scale, shift = torch.rand(2, c, device=device, dtype=torch.float64)
    return imgs, boxes, height, width, scale, shift, torch.uint8 if raw else dtype


_sample_crops = Op(
    "sample_crops(Tensor sample_ids, int seed, int epoch, int height, int width, float area_low, "
    "float area_high, float ratio_low, float ratio_high, float hflip) -> Tensor",
    fake=_fake_sample_crops,
    # A few numbers for each image: no kernel would be noticed beside the pixels.
    implementations={"reference": reference.sample_crops},
    shapes={
        "edge": dict(b=5, h=37, w=53),
        "edge_one_pixel": dict(b=2, h=1, w=1),
        "edge_strip": dict(b=2, h=3, w=500),
        "edge_empty": dict(b=0, h=4, w=8),
        "imagenet": dict(b=256, h=256, w=256),
    },
    make=_make_crops,
)
_crop_resize = Op(
    "crop_resize(Tensor imgs, Tensor boxes, int height, int width, Tensor? scale, Tensor? shift, "
    "ScalarType dtype) -> Tensor",
    fake=_fake_crop_resize,
    implementations={
        "reference": reference.crop_resize,
        "triton": Implementation("fastmim.kernels.augment:crop_resize", accepts=_refuse),
    },
    shapes={
        "edge": dict(b=2, c=3, h=11, w=13, height=6, width=8),
        "edge_larger": dict(b=2, c=1, h=5, w=4, height=9, width=13, raw=True),
        "edge_one_pixel": dict(b=1, c=2, h=1, w=1, height=3, width=2, raw=True),
        "edge_to_one_pixel": dict(b=1, c=1, h=12, w=5, height=1, width=1, raw=True),
        "edge_empty": dict(b=0, c=3, h=4, w=4, height=2, width=2),
        "imagenet": dict(b=256, c=3, h=256, w=256, height=224, width=224),
    },
    make=_make_resize,
)
