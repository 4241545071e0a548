"""Masks: the generator's published vectors, the documented algorithm bit for bit, the refusals."""

import math

import pytest
import torch

from fastmim.ops import (
    OPS,
    masks_from_noise,
    masks_from_shuffle,
    num_keep,
    reference,
    sample_masks,
    sample_uniforms,
    use_backend,
)
from tests import accuracy

WORD = 2**32


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011) in unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            second // WORD ^ c1 ^ k0,
            second % WORD,
            first // WORD ^ c3 ^ k1,
            first % WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def ids_restore(seed: int, epoch: int, sample_id: int, num_patches: int) -> list[int]:
    """The documented algorithm for one image."""
    key = [seed % WORD, seed // WORD % WORD]
    words = [
        philox([i // 4, epoch, sample_id % WORD, sample_id // WORD], key)[i % 4]
        for i in range(num_patches)
    ]
    order = sorted(range(num_patches), key=lambda i: (words[i], i))
    return [order.index(i) for i in range(num_patches)]


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD - 1] * 4, [WORD - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_gives_the_published_words(counter, key, output):
    expected = [int(word, 16) for word in output.split()]
    assert philox(counter, key) == expected
    words = reference.philox([torch.tensor([c]) for c in counter], tuple(key))
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("backend", OPS["sample_masks"].backends)
@pytest.mark.parametrize("num_patches", [2, 7, 16, 196, 257])
@pytest.mark.parametrize(
    ("seed", "epoch"), [(0, 0), (1, 799), (2**40 + 17, 3), (-1, WORD - 1), (2**64 + 5, 1)]
)
def test_masks_are_the_documented_algorithm_to_the_bit(seed, epoch, num_patches, backend, device):
    reason = OPS["sample_masks"].unavailable(backend, torch.device(device))
    if reason:
        pytest.skip(reason)
    if backend == "triton":
        pytest.importorskip("fastmim.kernels", reason="a checkout has no fastmim.kernels; install")
    sample_ids = [0, 1, 1_281_166, WORD - 1, WORD, 2**62 + 12345]
    with use_backend(backend):
        masks = sample_masks(seed, epoch, torch.tensor(sample_ids, device=device), num_patches, 1)
    expected = [ids_restore(seed, epoch, i, num_patches) for i in sample_ids]
    assert masks.ids_restore.tolist() == expected
    assert masks.ids_shuffle.gather(1, masks.ids_restore).tolist() == [
        list(range(num_patches)) for _ in sample_ids
    ]


def test_mask_depends_on_its_sample_only(device):
    ids = torch.randint(0, 2**40, (32,), device=device)
    whole = sample_masks(3, 1, ids, 49, 12)
    order = torch.randperm(32, device=device)
    shuffled = sample_masks(3, 1, ids[order], 49, 12)
    accuracy.exact(shuffled.ids_shuffle, whole.ids_shuffle[order])
    for rank in range(4):  # a rank of four sees every fourth sample
        part = sample_masks(3, 1, ids[rank::4], 49, 12)
        accuracy.exact(part.ids_shuffle, whole.ids_shuffle[rank::4])


@pytest.mark.parametrize("change", ["seed", "epoch", "sample"])
def test_every_input_changes_the_mask(change, device):
    first = dict(seed=5, epoch=2, sample=7)
    second = {**first, change: first[change] + 1}
    rows = [
        sample_masks(v["seed"], v["epoch"], torch.tensor([v["sample"]], device=device), 196, 49)
        for v in (first, second)
    ]
    common = (~rows[0].mask & ~rows[1].mask).sum()
    assert common < 49 / 2  # 12 of 49 are expected by chance


def test_every_patch_is_kept_equally_often(device):
    samples, patches, kept = 20_000, 64, 16
    masks = sample_masks(0, 0, torch.arange(samples, device=device), patches, kept)
    counts = (~masks.mask).sum(dim=0).double()
    share = kept / patches
    expected = samples * share
    # Pearson's statistic of draws without replacement, 63 degrees of freedom
    statistic = (counts - expected).square().sum() / (expected * (1 - share))
    statistic *= (patches - 1) / patches
    assert abs(statistic - (patches - 1)) < 4 * math.sqrt(2 * (patches - 1))


def test_neighbouring_samples_are_independent(device):
    masks = sample_masks(0, 0, torch.arange(4001, device=device), 64, 16)
    kept = (~masks.mask).double()
    together = (kept[1:] * kept[:-1]).sum(dim=1)  # hypergeometric: mean 4, variance 2.286
    mean, variance = 16 * 16 / 64, 16 * (16 / 64) * (48 / 64) * (48 / 63)
    assert abs(together.mean() - mean) < 4 * math.sqrt(variance / 4000)
    assert abs(together.var() / variance - 1) < 4 * math.sqrt(2 / 4000)


def test_masks_from_noise_and_shuffle_are_the_authors(golden_file):
    recorded = golden_file("mae_pix")
    for masks in (
        masks_from_noise(recorded["noise"], 4),
        masks_from_shuffle(recorded["ids_shuffle"], 4),
    ):
        accuracy.exact(masks.ids_shuffle, recorded["ids_shuffle"])
        accuracy.exact(masks.ids_restore, recorded["ids_restore"])
        accuracy.exact(masks.ids_keep, recorded["ids_keep"])
        accuracy.exact(masks.ids_masked, recorded["ids_mask"])
        accuracy.exact(masks.mask.float(), recorded["mask"])


def test_num_keep_is_the_published_formula():
    for patches in (4, 16, 49, 64, 100, 196, 256, 784):
        for percent in range(1, 100):
            ratio = percent / 100
            expected = int(patches * (1 - ratio))
            if 1 <= expected < patches:
                assert num_keep(patches, ratio) == expected
            else:
                with pytest.raises(ValueError, match=f"of {patches} patches keeps {expected}"):
                    num_keep(patches, ratio)
    assert num_keep(100, 0.9) == 9  # rounding of 1 - 0.9, kept as published
    assert (num_keep(196, 0.75), num_keep(256, 0.75)) == (49, 64)


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_ratio_outside_the_open_interval_is_refused(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio: expected a number in \(0, 1\), got"):
        num_keep(196, ratio)


def test_ratio_that_keeps_nothing_is_refused_with_one_that_works():
    with pytest.raises(ValueError, match=r"keeps 0 visible.*choose a ratio from 0.0312 to 0.9062"):
        num_keep(16, 0.99)


@pytest.mark.parametrize("kept", [0, 16, 17, -1])
def test_keeping_all_or_none_is_refused(kept):
    noise = torch.rand(2, 16)
    message = rf"expected num_keep in \[1, 16\), got {kept} of 16 patches"
    with pytest.raises(ValueError, match=f"^masks_from_noise: {message}"):
        masks_from_noise(noise, kept)
    with pytest.raises(ValueError, match=f"^masks_from_shuffle: {message}"):
        masks_from_shuffle(noise.argsort(dim=1), kept)
    with pytest.raises(ValueError, match=f"^sample_masks: {message}"):
        sample_masks(0, 0, torch.arange(2), 16, kept)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_masks(0, 0, torch.zeros(2), 16, 4), "sample_ids .* got .* torch.float32"),
        (lambda: sample_masks(0, 0, torch.zeros(2, 2, dtype=torch.int64), 16, 4), "sample_ids"),
        (lambda: sample_masks(0, WORD, torch.arange(2), 16, 4), r"epoch in \[0, 2\*\*32\)"),
        (lambda: sample_masks(0, -1, torch.arange(2), 16, 4), "epoch"),
        (lambda: masks_from_noise(torch.rand(16), 4), r"expected noise \(B, N\), got \(16,\)"),
        (lambda: masks_from_shuffle(torch.rand(2, 16), 4), "int64, got .* torch.float32"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_uniform_numbers_depend_on_seed_epoch_and_sample_only():
    ids = torch.tensor([3, 2**40, 7])
    drawn = sample_uniforms(5, 2, ids, 10)
    assert (drawn.shape, drawn.dtype) == ((3, 10), torch.float32)
    accuracy.exact(sample_uniforms(5, 2, ids.flip(0), 10).flip(0), drawn)
    accuracy.exact(sample_uniforms(5, 2, ids, 7), drawn[:, :7])
    for other in (sample_uniforms(6, 2, ids, 10), sample_uniforms(5, 3, ids, 10)):
        assert not (other == drawn).any()
    many = sample_uniforms(0, 0, torch.arange(20000), 3)
    assert ((many >= 0) & (many < 1)).all()
    accuracy.sampled(many, torch.full((3,), 0.5))
    accuracy.sampled(many.square(), torch.full((3,), 1 / 3))
    masks = sample_masks(0, 0, torch.arange(20000), 4, 1)  # of the same counter words but one
    first = many[masks.ids_keep[:, 0] == 0]
    accuracy.sampled(first, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="sample_uniforms: expected sample_ids"):
        sample_uniforms(0, 0, torch.zeros(2, 2), 3)
