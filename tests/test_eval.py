"""Features, nearest neighbours, reconstruction pictures and charts."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import ImageChops

from fastmim import create_model
from fastmim.data import eval_batches, open_source
from fastmim.eval import (
    FeatureBank,
    extract_features,
    knn_accuracy,
    line_chart,
    linear_probe,
    pixel_features,
    reconstruct,
    reconstruction_picture,
)
from fastmim.eval.chart import _log_ticks, _ticks
from fastmim.eval.visualize import LEAK, _hide, _wrap
from fastmim.ops import gather_tokens, patchify
from fastmim.ops.reference import patch_target
from tests import accuracy


def small_model(channels: int = 3, img_size: tuple[int, int] = (16, 24), **kwargs):
    return create_model(
        "mae_vit_micro_patch4",
        img_size=img_size,
        in_chans=channels,
        depth=2,
        decoder_depth=1,
        pixel_mean=(0.45,) * channels,
        pixel_std=tuple(0.2 + 0.02 * c for c in range(channels)),
        **kwargs,
    )


def random_images(count: int, channels: int = 3, size: tuple[int, int] = (16, 24)):
    return torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8)


def batches(imgs, size: int, labels=None):
    for ids in torch.arange(len(imgs)).split(size):
        yield imgs[ids], None if labels is None else labels[ids], ids


def bank(features, labels) -> FeatureBank:
    return FeatureBank(features, labels, torch.arange(len(features)))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_those_of_the_encoder_in_order(pool):
    model, imgs, labels = small_model(), random_images(10), torch.arange(10) % 3
    got = extract_features(model, batches(imgs, 4, labels), pool=pool)
    with torch.no_grad():
        plain = model.encode(imgs)
        exact = copy.deepcopy(model).double().encode(imgs)
    plain, exact = (f.cls if pool == "cls" else f.patch_tokens.mean(1) for f in (plain, exact))
    accuracy.relative(got.features, plain, exact)
    assert got.features.dtype == torch.float32
    accuracy.exact(got.labels, labels)
    accuracy.exact(got.indices, torch.arange(10))


def test_features_do_not_depend_on_the_batch_size_and_repeat_exactly():
    model, imgs = small_model(), random_images(10)
    one, again, three = (extract_features(model, batches(imgs, n)).features for n in (10, 10, 3))
    exact = extract_features(copy.deepcopy(model).double(), batches(imgs, 10)).features.double()
    accuracy.exact(again, one)
    accuracy.relative(three, one, exact)


def test_extraction_leaves_flags_and_random_state_and_can_be_trained_on():
    model, imgs = small_model().train(), random_images(4)
    model.blocks[1].eval()  # a frozen part keeps its own flag
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    features = extract_features(model, batches(imgs, 2)).features
    assert [module.training for module in model.modules()] == flags
    accuracy.exact(torch.get_rng_state(), state)
    torch.nn.Linear(features.shape[1], 2)(features).sum().backward()
    with pytest.raises(ValueError, match="expected images"):
        extract_features(model, batches(random_images(2, size=(16, 16)), 2))
    assert [module.training for module in model.modules()] == flags


def test_autocast_computes_in_bfloat16_and_returns_float32():
    model, imgs = small_model(), random_images(4)
    features = extract_features(model, batches(imgs, 4), autocast=torch.bfloat16).features
    assert features.dtype == torch.float32
    assert not torch.equal(features, extract_features(model, batches(imgs, 4)).features)


def test_extraction_says_what_is_wrong():
    with pytest.raises(ValueError, match="at least one batch"):
        extract_features(small_model(), [])
    with pytest.raises(ValueError, match="'mean' or 'cls', got 'max'"):
        extract_features(small_model(), [], pool="max")


def test_pixel_features_see_neither_brightness_nor_contrast():
    imgs = random_images(1) // 4
    pair = torch.cat([imgs, imgs * 3 + 20])
    features = pixel_features(batches(pair, 1)).features
    assert torch.cosine_similarity(features[0], features[1], dim=0) > 1 - 1e-6


def test_pixel_neighbours_know_the_digits():
    source = open_source("digits")
    given = eval_batches(source, image_size=(32, 32), batch_size=256, limit=600)
    assert knn_accuracy(pixel_features(given)) > 0.9


def brute_force(neighbours, asked, k, temperature, leave_one_out):
    right = 0
    for i, query in enumerate(asked.features):
        similarity = [
            (float(torch.cosine_similarity(query, other, dim=0)), int(label))
            for j, (other, label) in enumerate(
                zip(neighbours.features, neighbours.labels, strict=True)
            )
            if not (leave_one_out and i == j)
        ]
        votes: dict[int, float] = {}
        for value, label in sorted(similarity, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(value / temperature)
        right += max(votes, key=votes.get) == int(asked.labels[i])
    return right / len(asked.features)


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0)])
def test_knn_is_the_brute_force_one(k, temperature, leave_one_out, monkeypatch):
    monkeypatch.setattr("fastmim.eval.knn._CHUNK", 1000)  # several chunks, the last one smaller
    centres = torch.randn(3, 8, dtype=torch.float64)
    labels = torch.tensor([4, 7, 100])[torch.arange(50) % 3]  # classes need not be 0, 1, 2
    features = centres[torch.arange(50) % 3] + torch.randn(50, 8, dtype=torch.float64)
    train = bank(features[:35], labels[:35])
    test = train if leave_one_out else bank(features[35:], labels[35:])
    got = knn_accuracy(train, None if leave_one_out else test, k=k, temperature=temperature)
    assert got == brute_force(train, test, k, temperature, leave_one_out)


def test_leave_one_out_excludes_the_image_itself():
    features, labels = torch.randn(40, 16), torch.arange(40)  # every image is its own class
    assert knn_accuracy(bank(features, labels), k=1) == 0.0
    assert knn_accuracy(bank(features, labels), bank(features, labels), k=1) == 1.0


def test_random_features_are_at_chance():
    labels = torch.arange(2000) % 10
    assert abs(knn_accuracy(bank(torch.randn(2000, 16), labels)) - 0.1) < 0.03  # 4.5 sigma


def test_a_small_temperature_does_not_overflow():
    labels = torch.arange(20) % 2
    features = torch.nn.functional.one_hot(labels).float() + 0.01 * torch.randn(20, 2)
    assert knn_accuracy(bank(features, labels), k=5, temperature=1e-6) == 1.0


def test_images_without_a_label_neither_vote_nor_count():
    features, labels = torch.randn(30, 4), torch.arange(30) % 2
    blank = torch.cat([labels, torch.full((10,), -1)])
    assert knn_accuracy(bank(torch.cat([features, torch.randn(10, 4)]), blank), k=3) == (
        knn_accuracy(bank(features, labels), k=3)
    )


def test_one_class_is_always_right():
    assert knn_accuracy(bank(torch.randn(5, 3), torch.zeros(5).long()), k=4) == 1.0


@pytest.mark.parametrize(
    ("features", "labels", "kwargs", "message"),
    [
        (torch.ones(4, 2), None, {}, "no labels; put the images into one sub-folder"),
        (torch.ones(4, 2), torch.full((4,), -1), {}, "no labels"),
        (torch.ones(4, 2), torch.zeros(4).long(), dict(k=4), r"k in \[1, 3\]"),
        (torch.ones(4, 2), torch.zeros(4).long(), dict(k=0), r"k in \[1, 3\]"),
        (torch.ones(4, 2), torch.zeros(4).long(), dict(temperature=0.0), "positive temperature"),
        (torch.ones(4, 2) / 0, torch.zeros(4).long(), dict(k=1), "not finite"),
    ],
)
def test_knn_says_what_is_wrong(features, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(bank(features, labels), **kwargs)


def test_knn_refuses_banks_of_different_width():
    labels = torch.zeros(4).long()
    with pytest.raises(ValueError, match="one width, got 2 and 3"):
        knn_accuracy(bank(torch.ones(4, 2), labels), bank(torch.ones(4, 3), labels), k=1)


def clusters(count: int, classes: int, spread: float, width: int = 8) -> FeatureBank:
    """Features around one centre a class, in units that differ by a factor of 1000."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % classes
    features = centres[labels] + spread * torch.randn(count, width)
    return bank(features * torch.logspace(-2, 1, width) + 5.0, 3 * labels + 2)


def test_a_linear_probe_separates_what_is_separable():
    probe = linear_probe(clusters(600, 4, spread=0.05), clusters(200, 4, spread=0.05))
    assert probe.accuracy > 0.99
    assert linear_probe(clusters(600, 4, spread=0.05)).accuracy > 0.99  # a fifth of the bank


def test_a_linear_probe_of_random_labels_is_at_chance():
    features, labels = torch.randn(4000, 8), torch.randint(0, 10, (4000,))
    probe = linear_probe(bank(features[:2000], labels[:2000]), bank(features[2000:], labels[2000:]))
    assert abs(probe.accuracy - 0.1) < 0.03  # 4.5 sigma


def test_the_probe_reaches_what_logistic_regression_does():
    train, test = clusters(400, 5, spread=1.0), clusters(2000, 5, spread=1.0)
    weight = torch.zeros(9, 5, dtype=torch.float64, requires_grad=True)
    mean, scale = train.features.mean(0), train.features.std(0, correction=0)

    def logits(features):
        normalized = ((features - mean) / scale).double()
        return torch.nn.functional.pad(normalized, (0, 1), value=1.0) @ weight

    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits(train.features), (train.labels - 2) // 3)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = (logits(test.features).argmax(1) * 3 + 2 == test.labels).float().mean()
    assert 0.5 < best < 0.95
    assert abs(linear_probe(train, test).accuracy - best) < 0.02


def test_the_learning_rate_is_chosen_without_the_test_images():
    train = clusters(300, 3, spread=1.0)
    test = clusters(100, 3, spread=1.0)
    probe = linear_probe(train, test)
    wrong = linear_probe(train, test._replace(labels=test.labels.roll(1)))
    noise = linear_probe(train, test._replace(features=torch.randn(100, 8)))
    assert probe[1:] == wrong[1:] == noise[1:]
    assert probe.accuracy > wrong.accuracy
    assert set(probe.held_out.values()) != {probe.accuracy}


def test_a_learning_rate_that_diverges_is_not_chosen():
    train = clusters(300, 3, spread=0.1)
    probe = linear_probe(train, train, lrs=(1e38, 0.1))
    assert probe.held_out[1e38] == 0.0
    assert probe.lr == 0.1
    assert probe.accuracy > 0.99


def test_the_probe_repeats_exactly_and_leaves_the_random_state():
    train, state = clusters(300, 3, spread=1.0), torch.get_rng_state()
    assert linear_probe(train) == linear_probe(train)
    assert linear_probe(train, seed=1) != linear_probe(train)
    accuracy.exact(torch.get_rng_state(), state)


def test_the_probe_leaves_images_without_a_label_out():
    train, test = clusters(300, 3, spread=1.0), clusters(100, 3, spread=1.0)
    blank = bank(
        torch.cat([train.features, torch.randn(40, 8)]),
        torch.cat([train.labels, torch.full((40,), -1)]),
    )
    assert linear_probe(blank, test) == linear_probe(train, test)


@pytest.mark.parametrize(
    ("features", "labels", "kwargs", "message"),
    [
        (torch.ones(4, 2), None, {}, "no labels; put the images into one sub-folder"),
        (torch.ones(4, 2), torch.full((4,), -1), {}, "no labels"),
        (torch.ones(4, 2), torch.ones(4).long(), {}, "at least 2 classes, got 1"),
        (torch.ones(1, 2), torch.ones(1).long(), {}, "1 labelled images cannot be split"),
        (torch.ones(4, 2) / 0, torch.arange(4), {}, "not finite"),
        (torch.ones(4, 2), torch.arange(4), dict(lrs=()), "positive lrs"),
        (torch.ones(4, 2), torch.arange(4), dict(lrs=(0.0,)), "positive lrs"),
        (torch.ones(4, 2), torch.arange(4), dict(epochs=0), "at least 1 epoch"),
        (torch.ones(4, 2), torch.arange(4), dict(held_out=1.0), r"held_out in \(0, 1\)"),
    ],
)
def test_the_probe_says_what_is_wrong(features, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(bank(features, labels), **kwargs)


def test_the_probe_refuses_banks_of_different_width():
    labels = torch.arange(4)
    with pytest.raises(ValueError, match="linear_probe: expected bank and queries of one width"):
        linear_probe(bank(torch.ones(4, 2), labels), bank(torch.ones(4, 3), labels))


def perfect_prediction(model, imgs, masks):
    normalization = model.patch_embed.pixel_normalization(imgs)
    return patch_target(
        imgs, masks.ids_masked, model.patch_size, model.norm_pix_loss, **normalization
    )


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_prediction_gives_back_the_image(norm_pix, channels, dtype):
    model = small_model(channels, norm_pix_loss=norm_pix)
    imgs = random_images(3, channels)
    imgs[1] = 7  # no contrast at all
    masks = model.random_masks(3, 0.75, torch.device("cpu"))
    pred = perfect_prediction(model, imgs, masks).to(dtype)
    accuracy.exact(reconstruct(model, imgs, masks, pred=pred), imgs)


def test_norm_pix_is_undone_with_the_statistics_of_the_true_patch():
    model = small_model(norm_pix_loss=True)
    imgs = random_images(2)
    masks = model.random_masks(2, 0.5, torch.device("cpu"))
    nothing = torch.zeros(2, model.num_patches - masks.num_keep, 48)
    shown = patchify(reconstruct(model, imgs, masks, pred=nothing), 4).double()
    normalization = model.patch_embed.pixel_normalization(imgs)
    scale, shift = (v.repeat(16) for v in normalization.values())
    mean = (patchify(imgs, 4) * scale + shift).mean(-1, keepdim=True)
    expected = ((mean - shift) / scale).round().clamp(0, 255)
    accuracy.exact(*(gather_tokens(x, masks.ids_masked) for x in (shown, expected)))


def test_visible_patches_are_pasted_and_masked_ones_come_from_the_model():
    model, imgs = small_model(), random_images(2)
    masks = model.random_masks(2, 0.75, torch.device("cpu"))
    model.train()
    before = patchify(imgs, 4)
    after = patchify(reconstruct(model, imgs, masks), 4)
    assert model.training
    accuracy.exact((before != after).any(-1), masks.mask)


def test_masked_patches_alone_are_hidden_in_the_masked_column():
    model, imgs = small_model(), random_images(2)
    masks = model.random_masks(2, 0.75, torch.device("cpu"))
    changed = (patchify(imgs, 4) != patchify(_hide(imgs, masks, model), 4)).any(-1)
    accuracy.exact(changed, masks.mask)


def test_a_diverged_model_shows_black_and_not_an_error():
    model, imgs = small_model(), random_images(1)
    masks = model.random_masks(1, 0.75, torch.device("cpu"))
    pred = torch.full((1, model.num_patches - masks.num_keep, 48), torch.nan)
    shown = patchify(reconstruct(model, imgs, masks, pred=pred), 4)
    assert not gather_tokens(shown.float(), masks.ids_masked).any()


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(1, torch.float32), (2, torch.float64), (3, torch.float32), (4, torch.float32)],
)
def test_the_picture_has_a_row_an_image_and_a_column_a_model(channels, dtype):
    model, imgs = small_model(channels).to(dtype), random_images(3, channels)
    masks = model.random_masks(3, 0.75, torch.device("cpu"))
    one = reconstruction_picture(imgs, masks, {"student": model})
    two = reconstruction_picture(imgs, masks, {"student": model, "teacher": model})
    fewer = reconstruction_picture(
        imgs[:2], model.random_masks(2, 0.75, torch.device("cpu")), {"student": model}
    )
    assert one.height - fewer.height == 128 + 8  # 16 pixels are shown as 128
    assert two.width - one.width == 192 + 8
    shown = np.asarray(one)[one.height - fewer.height :]
    pixel = imgs[2, :3, 15, 0].tolist() if channels >= 3 else imgs[2, :1, 15, 0].tolist() * 3
    bottom_left = np.flatnonzero((shown[:, 8] != 255).any(-1)).max()  # last row of the last image
    assert shown[bottom_left, 8].tolist() == pixel


def test_the_caption_tells_the_leak_if_and_only_if_there_is_one():
    imgs = random_images(1)
    plain, leaking = small_model(), small_model(norm_pix_loss=True)
    masks = plain.random_masks(1, 0.75, torch.device("cpu"))
    heights = [
        reconstruction_picture(imgs, masks, models).height
        for models in ({"a": plain}, {"a": leaking}, {"a": plain, "b": leaking})
    ]
    assert heights[0] < heights[1]
    assert heights[0] < heights[2]


def test_long_captions_are_wrapped():
    class Font:
        def getlength(self, text: str) -> int:
            return len(text)

    lines = _wrap(LEAK, Font(), 30)
    assert " ".join(lines) == LEAK
    assert max(map(len, lines)) <= 30


def test_reconstruction_says_what_is_wrong():
    model, imgs = small_model(), random_images(2)
    masks = model.random_masks(2, 0.75, torch.device("cpu"))
    with pytest.raises(ValueError, match="expected uint8 images"):
        reconstruct(model, imgs.float(), masks)
    with pytest.raises(ValueError, match="expected masks of"):
        reconstruct(model, imgs[:1], masks)
    with pytest.raises(ValueError, match="expected images and models, got 2 and 0"):
        reconstruction_picture(imgs, masks, {})
    with pytest.raises(ValueError, match="scale"):
        reconstruction_picture(imgs, masks, {"student": model}, scale=0)


def chart(series, **kwargs):
    return line_chart(series, title="title", x_label="step", y_label="loss", **kwargs)


def coloured(image) -> int:
    """Pixels that are not grey, so neither paper nor axes nor text."""
    pixels = np.asarray(image).astype(int)
    return int((pixels.max(-1) - pixels.min(-1) > 40).sum())


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([0, 1, 2], [1.0, 0.5, 0.25]),
        ([7], [3.0]),
        ([0, 1, 2], [3.0, 3.0, 3.0]),
        ([0, 1, 2, 3, 4], [1.0, math.nan, 2.0, math.inf, 3.0]),
        ([0, 1], [1e-300, 1e300]),
        ([0, 1], [1e6, 1e6 + 1e-9]),
        ([1e9, 1e9 + 1], [1e-12, 2e-12]),
        ([3, 1, 2], [1, 2, 3]),
    ],
)
def test_charts_of_edge_cases_show_a_curve(x, y, log_y):
    empty = coloured(chart({"loss": ([], [])}, log_y=log_y))
    image = chart({"loss": (x, y)}, log_y=log_y)
    assert image.size == (900, 540)
    assert coloured(image) > empty


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([1], [math.nan])}])
def test_charts_without_data_say_so(series):
    assert chart(series).size == (900, 540)


def test_values_that_are_not_positive_leave_a_gap_on_a_log_axis():
    gap = chart({"a": ([0, 1, 2, 3, 4], [1, 2, -1, 2, 1])}, log_y=True)
    same = chart({"a": ([0, 1, 2, 3, 4], [1, 2, math.nan, 2, 1])}, log_y=True)
    assert ImageChops.difference(gap, same).getbbox() is None


def test_thinning_keeps_the_spike():
    x = np.arange(300_000)
    y = np.zeros(len(x))
    spike = y.copy()
    spike[123_457] = 1.0
    with_spike, flat = (chart({"a": (x, v), "b": ([0, 1], [0, 1])}) for v in (spike, y))
    assert coloured(with_spike) > coloured(flat) + 300  # a line as high as the chart


def test_charts_of_many_series_and_long_names():
    chart(
        {f"series with a long name {i}": ([0, 1], [i, i + 1]) for i in range(20)}, size=(400, 400)
    )
    with pytest.raises(ValueError, match="one length for 'a'"):
        chart({"a": ([1, 2], [1])})
    with pytest.raises(ValueError, match="at least"):
        chart({}, size=(10, 10))


def test_ticks_are_round_and_distinct():
    assert [text for _, text in _ticks(0, 200_000, 5)] == [
        "0",
        "50,000",
        "100,000",
        "150,000",
        "200,000",
    ]
    assert [text for _, text in _ticks(0.1, 0.35, 3)] == ["0.1", "0.2", "0.3"]
    assert [text for _, text in _log_ticks(-3.1, 0.2, 7)] == ["0.001", "0.01", "0.1", "1"]
    rng = np.random.default_rng(0)
    for low, span in rng.normal(size=(300, 2)):
        low, span = low * 10.0 ** rng.integers(-9, 9), abs(span) * 10.0 ** rng.integers(-9, 9)
        if span < 1e-9 * abs(low):
            continue
        texts = [text for _, text in _ticks(low, low + span, 6)]
        assert len(set(texts)) == len(texts) <= 7
