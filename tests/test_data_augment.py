"""Crops: torchvision's distribution, Pillow's pixels, decided by (seed, epoch, index) alone."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import Augmentation, augment, crop_box, eval_transform


def photo(height, width, channels=3):
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c)) * 60 + np.cos(y / (4 + c)) * 50 + 128 for c in range(channels)]
    noisy = np.stack(waves) + rng.normal(0, 10, (channels, height, width))
    return torch.from_numpy(np.clip(noisy, 0, 255).astype(np.uint8))


def torchvision_box(height, width, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop.get_params of torchvision, by Python's generator: (top, left, h, w)."""
    for _ in range(10):
        target_area = height * width * rng.uniform(*scale)
        aspect_ratio = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, round(width / min(ratio))
    elif in_ratio > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(100, 100), (60, 130), (300, 90)])
def test_boxes_are_distributed_as_torchvisions(size):
    rng = random.Random(0)
    count = 4000
    ours = np.array(
        [crop_box(*size, Augmentation(), seed=3, epoch=1, index=i) for i in range(count)]
    )
    theirs = np.array([torchvision_box(*size, rng) for _ in range(count)])
    limit = 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov, 0.1 %
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        at = np.union1d(a, b)
        gap = np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")
        assert np.abs(gap).max() / count < limit
    assert abs(ours[:, 4].mean() - 0.5) < 0.03


def test_box_is_a_function_of_its_three_keys():
    draw = {"seed": 1, "epoch": 2, "index": 3}
    box = crop_box(500, 400, Augmentation(), **draw)
    crop_box(77, 99, Augmentation(), seed=9, epoch=9, index=9)
    assert crop_box(500, 400, Augmentation(), **draw) == box
    for key in draw:
        assert crop_box(500, 400, Augmentation(), **{**draw, key: 7})[:4] != box[:4]
    draw = {"epoch": 2**40, "index": 2**40}
    large = {crop_box(500, 400, Augmentation(), seed=2**64 - i, **draw) for i in range(1, 20)}
    assert len(large) == 19


def test_boxes_stay_what_they_are():
    # recorded here with NumPy 2.4; a change would break the resume of every run
    boxes = [crop_box(375, 500, Augmentation(), seed=0, epoch=0, index=i) for i in range(3)]
    assert boxes == RECORDED


RECORDED = [
    (47, 100, 313, 352, False),
    (25, 273, 238, 182, True),
    (15, 183, 313, 241, False),
]


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (2, 3), (3000, 20)])
def test_tiny_and_extreme_pictures(size):
    img = photo(*size)
    for index in range(20):
        top, left, h, w, _ = crop_box(*size, Augmentation(), seed=0, epoch=0, index=index)
        assert 0 <= top <= top + h <= size[0]
        assert 0 <= left <= left + w <= size[1]
        assert min(h, w) >= 1
        out = augment(img, (32, 48), Augmentation(), seed=0, epoch=0, index=index)
        assert out.shape == (3, 32, 48)
    assert eval_transform(img, (32, 48)).shape == (3, 32, 48)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_pillows(channels):
    img = photo(130, 170, channels)
    for index in range(12):
        draw = {"seed": 5, "epoch": 0, "index": index}
        top, left, h, w, flip = crop_box(130, 170, Augmentation(), **draw)
        array = img[:, top : top + h, left : left + w].permute(1, 2, 0).numpy()
        image = Image.fromarray(array.squeeze() if channels == 1 else array)
        expected = np.asarray(image.resize((48, 40), Image.Resampling.BICUBIC)).astype(int)
        if flip:
            expected = expected[:, ::-1]
        ours = augment(img, (40, 48), Augmentation(), **draw)
        assert ours.dtype == torch.uint8
        difference = ours.permute(1, 2, 0).squeeze().numpy() - expected
        assert np.abs(difference).max() <= 1


def test_channel_last_pictures_give_the_same_pixels():
    img = photo(90, 70)
    last = img.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    draw = {"seed": 0, "epoch": 0, "index": 0}
    a, b = (augment(x, (32, 32), Augmentation(), **draw).int() for x in (img, last))
    assert (a - b).abs().max() <= 1


def test_flip_only():
    img = photo(32, 32)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    draw = {"seed": 0, "epoch": 0, "index": 0}
    assert torch.equal(augment(img, (32, 32), Augmentation(**whole, hflip=0.0), **draw), img)
    flipped = augment(img, (32, 32), Augmentation(**whole, hflip=1.0), **draw)
    assert torch.equal(flipped, img.flip(-1))


def test_eval_transform_is_resize_and_centre_crop():
    img = photo(120, 200)
    image = Image.fromarray(img.permute(1, 2, 0).numpy())
    # short side 120 -> 64, long side int(64 * 200 / 120) = 106; centre 56 of each
    resized = np.asarray(image.resize((106, 64), Image.Resampling.BICUBIC)).astype(int)
    ours = eval_transform(img, (56, 56)).permute(1, 2, 0).numpy()
    assert np.abs(ours - resized[4:60, 25:81]).max() <= 1
    tall = eval_transform(img.transpose(1, 2), (56, 56))
    assert (tall.transpose(1, 2).permute(1, 2, 0).numpy() - resized[4:60, 25:81]).max() <= 1


def test_eval_transform_keeps_a_picture_of_the_wanted_size():
    img = photo(32, 48)
    assert torch.equal(eval_transform(img, (32, 48)), img)
    assert eval_transform(img, (48, 32), 1.0).shape == (3, 48, 32)


def test_eval_transform_of_a_strip_needs_little_memory():
    strip = torch.zeros(3, 2, 400_000, dtype=torch.uint8)  # resized whole: 256 x 51 200 000
    assert eval_transform(strip, (224, 224)).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale\[0\].*got \(0.0, 1.0\)"),
        ({"scale": (0.5, 1.5)}, "got"),
        ({"scale": (0.9, 0.5)}, "got"),
        ({"ratio": (-1.0, 1.0)}, r"ratio\[0\]"),
        ({"ratio": (2.0, 1.0)}, r"ratio\[0\]"),
        ({"hflip": 1.5}, "hflip in"),
        ({"hflip": float("nan")}, "hflip in"),
    ],
)
def test_impossible_augmentations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_impossible_crop_ratio_is_refused():
    with pytest.raises(ValueError, match=r"crop_ratio in \(0, 1\], got 1.5"):
        eval_transform(photo(9, 9), (4, 4), 1.5)
