"""The augment operator: the loader's crops, PyTorch's pixels."""

import pytest
import torch
import torch.nn.functional as F

from fastmim.data import Augmentation, crop_box
from fastmim.data import augment as augment_one
from fastmim.ops import OPS, augment, use_backend

BACKENDS = OPS["crop_resize"].backends
RANGES = [
    Augmentation(),
    Augmentation(scale=(0.08, 0.3), ratio=(0.5, 2.5), hflip=0.2),
    Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=1.0),
]


def usable(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("fastmim.kernels", reason="a checkout has no fastmim.kernels; install")
    reason = OPS["crop_resize"].unavailable(backend, torch.device(device))
    if reason:
        pytest.skip(reason)


def signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("size", [(375, 500), (64, 64), (3, 500), (500, 3), (1, 1)])
def test_boxes_are_those_of_the_loader(size, ranges, device):
    ids = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, *range(1000, 1060)]
    for seed, epoch in [(0, 0), (2**64 - 1, 1), (2**63, 2**32), (12345, 2**63 - 1)]:
        boxes = OPS["sample_crops"](
            torch.tensor(ids, device=device),
            signed(seed),
            epoch,
            *size,
            *ranges.scale,
            *ranges.ratio,
            ranges.hflip,
        )
        drawn = [crop_box(*size, ranges, seed=seed, epoch=epoch, index=i) for i in ids]
        assert boxes.tolist() == [[int(value) for value in box] for box in drawn]


def interpolated(imgs, boxes, size):
    """PyTorch's pixels, crop by crop."""
    pixels = []
    for img, (top, left, h, w, flip) in zip(imgs.cpu(), boxes.tolist(), strict=True):
        crop = img[None, :, top : top + h, left : left + w]
        pixels.append(F.interpolate(crop, size=size, mode="bicubic", antialias=True)[0])
        if flip:
            pixels[-1] = pixels[-1].flip(-1)
    return torch.stack(pixels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 40, 50, 0),  # smaller
        (3, 7, 9, 8, 1),  # larger
        (5, 2, 33, 10, 1),  # smaller one way, larger the other
        (39, 49, 1, 1, 0),  # one pixel
        (0, 13, 40, 1, 1),
        (8, 9, 16, 24, 0),  # as it is
    ],
)
def test_pixels_are_within_one_level_of_interpolate(backend, box, device):
    usable(backend, device)
    imgs = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8, device=device)
    imgs[1] = torch.where(imgs[1] < 128, 0, 255)  # overshoots at every edge
    boxes = torch.tensor([box, (1, 1, 30, 30, 1)], dtype=torch.int32, device=device)
    with use_backend(backend):
        got = OPS["crop_resize"](imgs, boxes, 16, 24, None, None, torch.uint8).cpu()
    assert (got.int() - interpolated(imgs, boxes, (16, 24)).int()).abs().max() <= 1
    if box[2:4] == (16, 24):
        assert torch.equal(got[0], imgs[0, :, 8:24, 9:33].cpu())


@pytest.mark.parametrize("size", [(1, 1), (33, 7), (8, 130)])
@pytest.mark.parametrize("pictures", [(1, 1), (2, 90), (130, 3)])
def test_triton_gives_the_pixels_of_the_reference(size, pictures, device):
    usable("triton", device)
    imgs = torch.randint(256, (2, 1, *pictures), dtype=torch.uint8, device=device)
    call = dict(seed=3, epoch=0, size=size)
    with use_backend("reference"):
        expected = augment(imgs, torch.arange(2, device=device), **call)
    boxes = OPS["sample_crops"](
        torch.arange(2, device=device), 3, 0, *pictures, 0.2, 1.0, 3 / 4, 4 / 3, 0.5
    )
    with use_backend("triton"):
        got = OPS["crop_resize"](imgs, boxes, *size, None, None, torch.uint8)
    assert torch.equal(got, expected)


def test_a_batch_is_augmented_as_the_loader_would(device):
    imgs = torch.randint(256, (6, 3, 60, 80), dtype=torch.uint8, device=device)
    ids = torch.tensor([0, 7, 2**40, 3, 3, 9], device=device)
    got = augment(imgs, ids, seed=5, epoch=2, size=(24, 32)).cpu()
    for img, index, pixels in zip(imgs.cpu(), ids.tolist(), got, strict=True):
        one = augment_one(img, (24, 32), Augmentation(), seed=5, epoch=2, index=index)
        assert (pixels.int() - one.int()).abs().max() <= 1


def test_pixels_are_normalised_in_float32(device):
    imgs = torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8, device=device)
    ids, call = torch.arange(2, device=device), dict(seed=0, epoch=0, size=(8, 8))
    scale, shift = torch.rand(2, 3, device=device)
    pixels = augment(imgs, ids, **call)
    got = augment(imgs, ids, **call, scale=scale, shift=shift)
    assert pixels.dtype == torch.uint8
    assert torch.equal(got, pixels.float() * scale[:, None, None] + shift[:, None, None])
    half = augment(imgs, ids, **call, scale=scale, shift=shift, dtype=torch.bfloat16)
    assert torch.equal(half, got.bfloat16())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"imgs": torch.zeros(2, 3, 8, 8)}, r"expected imgs \(B, C, H, W\) of uint8"),
        ({"imgs": torch.zeros(2, 3, 0, 8, dtype=torch.uint8)}, "expected imgs"),
        ({"size": (0, 4)}, "a size of at least"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"expected sample_ids \(2,\) of int64"),
        ({"sample_ids": torch.zeros(2, dtype=torch.int32)}, "of torch.int32"),
        ({"area": (0.0, 1.0)}, r"expected 0 < area\[0\]"),
        ({"ratio": (2.0, 1.0)}, r"expected 0 < ratio\[0\]"),
        ({"hflip": float("nan")}, r"expected hflip in \[0, 1\], got nan"),
        ({"scale": torch.zeros(2)}, r"expected scale \(C,\) for 3 channels"),
        ({"scale": torch.ones(3), "dtype": torch.uint8}, "uint8 without scale and shift"),
        ({"dtype": torch.int64}, "or floating point, got torch.int64"),
        ({"seed": -1}, r"expected seed in \[0, 2\*\*64\)"),
        ({"epoch": 2**63}, r"got 0 and 9223372036854775808"),
    ],
)
def test_wrong_calls_are_refused(change, said):
    call = dict(
        imgs=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        sample_ids=torch.arange(2),
        seed=0,
        epoch=0,
        size=(4, 4),
    )
    with pytest.raises(ValueError, match=f"augment: .*{said}"):
        augment(**{**call, **change})
