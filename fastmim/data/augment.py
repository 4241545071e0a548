"""Random resized crop and flip for pre-training, centre crop for evaluation: uint8 in, uint8 out.

A crop is a pure function of (seed, epoch, sample index): the random words come from Philox-4x64
with the key (seed, 1) and the counter (0, epoch, index, 0). No state is carried, so the pixels of a
step depend on nothing that ran before it, nor on the process that makes them. Resizing is PyTorch's
bicubic with antialias on uint8, which gives Pillow's pixels to within one level.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

_CROP_STREAM = 1  # second word of the Philox key; 2 and 3 are the loader's
_TRIES = 10  # as in torchvision
_MAX_ASPECT = 8  # eval: the middle of a longer strip, whose resize could take gigabytes
_WORDS = 3 + 2 * _TRIES  # flip, top, left, then (area, ratio) of each try


@dataclass(frozen=True)
class Augmentation:
    """What a crop is drawn from; the defaults are MAE's (arXiv:2111.06377, appendix A.1).

    Args:
        scale: Smallest and largest part of the picture's area, in (0, 1].
        ratio: Smallest and largest width / height, positive; drawn log-uniformly.
        hflip: Probability of a left-right flip, in [0, 1].
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"Augmentation: expected 0 < scale[0] <= scale[1] <= 1, got {self.scale}"
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"Augmentation: expected 0 < ratio[0] <= ratio[1], got {self.ratio}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"Augmentation: expected hflip in [0, 1], got {self.hflip}")


def philox(seed: int, stream: int, epoch: int, index: int) -> np.random.Philox:
    """The counter-based generator of one (seed, stream, epoch, index); each in [0, 2**64).

    Only ``random_raw`` is to be used: NumPy keeps its words the same for ever, not so what
    ``Generator`` makes of them.
    """
    key = np.array((seed, stream), np.uint64)  # NumPy would make floats of ints past 2**63
    return np.random.Philox(key=key, counter=np.array((0, epoch, index, 0), np.uint64))


def crop_box(
    height: int, width: int, augmentation: Augmentation, *, seed: int, epoch: int, index: int
) -> tuple[int, int, int, int, bool]:
    """Draw the crop of one sample, by the rule of torchvision's RandomResizedCrop.

    Ten times: area = height * width * U(scale), w / h = exp(U(log ratio)); the first box that fits
    is placed uniformly. If none fits, the largest central box with the nearest allowed ratio.

    Args:
        height, width: Of the picture, in pixels, at least 1.
        augmentation: The ranges.
        seed, epoch, index: What the draw is a function of; integers in [0, 2**64).

    Returns:
        (top, left, h, w, flip): the box lies inside the picture; h and w are at least 1.
    """
    words = philox(seed, _CROP_STREAM, epoch, index).random_raw(_WORDS)
    u = ((words >> np.uint64(11)) * 2.0**-53).tolist()  # in [0, 1)
    flip = u[0] < augmentation.hflip
    area = height * width
    low, high = augmentation.scale
    log_low, log_high = math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])
    for i in range(3, _WORDS, 2):
        target_area = area * (low + (high - low) * u[i])
        aspect = math.exp(log_low + (log_high - log_low) * u[i + 1])
        w = round(math.sqrt(target_area * aspect))
        h = round(math.sqrt(target_area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1)), h, w, flip
    h, w = height, width
    if width / height < augmentation.ratio[0]:
        h = min(height, max(1, round(width / augmentation.ratio[0])))
    elif width / height > augmentation.ratio[1]:
        w = min(width, max(1, round(height * augmentation.ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w, flip


def augment(
    img: Tensor,
    size: tuple[int, int],
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    index: int,
) -> Tensor:
    """Random resized crop and flip of one picture; see ``crop_box`` for the draw.

    Args:
        img: (C, H, W), uint8, any size from 1x1, any strides.
        size: (h, w) of the result.
        augmentation, seed, epoch, index: As in ``crop_box``.

    Returns:
        (C, h, w), uint8.
    """
    _, height, width = img.shape
    top, left, h, w, flip = crop_box(
        height, width, augmentation, seed=seed, epoch=epoch, index=index
    )
    crop = _resize(img[:, top : top + h, left : left + w], size)
    return crop.flip(-1) if flip else crop


def eval_transform(img: Tensor, size: tuple[int, int], crop_ratio: float = 0.875) -> Tensor:
    """Resize the short side to ``round(size / crop_ratio)`` and cut out the centre.

    For a size that is not square the picture is scaled, with its aspect kept, until it just covers
    ``round(h / crop_ratio)`` x ``round(w / crop_ratio)``. A picture that already is (h, w) is
    returned as it is.

    Args:
        img: (C, H, W), uint8.
        size: (h, w) of the result.
        crop_ratio: Part of the short side that is kept, in (0, 1]; 0.875 is 224 of 256.

    Returns:
        (C, h, w), uint8.

    Raises:
        ValueError: If ``crop_ratio`` is outside (0, 1].
    """
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"eval_transform: expected crop_ratio in (0, 1], got {crop_ratio}")
    h, w = size
    _, height, width = img.shape
    if (height, width) == (h, w):
        return img
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
        img = img[:, top : top + longest, left : left + longest]
        _, height, width = img.shape
    cover_h, cover_w = round(h / crop_ratio), round(w / crop_ratio)
    if cover_h * width >= cover_w * height:  # the height needs the larger factor
        full_h, full_w = cover_h, max(cover_w, width * cover_h // height)
    else:
        full_h, full_w = max(cover_h, height * cover_w // width), cover_w
    top, left = round((full_h - h) / 2), round((full_w - w) / 2)
    return _resize(img, (full_h, full_w))[:, top : top + h, left : left + w]


def _resize(img: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) uint8 -> (C, h, w) uint8."""
    if img.shape[1:] == size:
        return img
    return F.interpolate(img[None], size=size, mode="bicubic", antialias=True)[0]
