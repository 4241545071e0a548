"""Linear probe: how well a linear classifier tells the classes from frozen features."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.eval.features import FeatureBank, check_widths, labelled

# Of the mean cross-entropy, for features of unit variance. Three a decade: features of few strong
# directions, such as pixels, diverge above the first; those of a trained network need the last.
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
_MOMENTUM = 0.9
_BATCH = 1024
_STEPS_PER_EPOCH = 32  # at least, of few images


class LinearProbe(NamedTuple):
    """What a linear classifier reaches.

    Attributes:
        accuracy: Fraction of the queries that are classified correctly, in [0, 1].
        lr: The learning rate that was best on the held-out images of the bank.
        held_out: Accuracy on these of every learning rate.
    """

    accuracy: float
    lr: float
    held_out: dict[float, float]


def linear_probe(
    bank: FeatureBank,
    queries: FeatureBank | None = None,
    *,
    lrs: tuple[float, ...] = LEARNING_RATES,
    epochs: int = 90,
    held_out: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier on the features of a bank and count what it gets right.

    As MAE probes (arXiv:2111.06377, appendix A.2): features normalised by mean and variance of the
    training images without learnt scale, no weight decay, momentum, a cosine schedule, 90 epochs;
    without augmentation, as the features are computed once, and with SGD in place of LARS, whose
    rate this chooses: all rates are trained at once on a part of the bank and compared on the rest
    of it, then the best is trained on all of it. Queries decide nothing. Repeated, the result is
    the same.

    Args:
        bank: Of the training images. Computed where its features are.
        queries: Of the test images. Default: a fifth of the bank, which then is not trained on.
        lrs: Learning rates to choose from.
        epochs: Passes over the training images.
        held_out: Part of the training images on which the rates are compared, in (0, 1).
        seed: Of the parts and of the order.

    Raises:
        ValueError: If labels are missing or of one class only, the images are too few, the widths
            differ, features are not finite, or an option is out of range.
    """
    if not lrs or min(lrs) <= 0 or epochs < 1 or not 0 < held_out < 1:
        raise ValueError(
            "linear_probe: expected positive lrs, at least 1 epoch and held_out in (0, 1), got "
            f"{lrs}, {epochs} and {held_out}"
        )
    order = torch.Generator().manual_seed(seed)
    features, labels = labelled("linear_probe", "bank", bank)
    if queries is None:
        (features, labels), (asked, answers) = _split(features, labels, 0.2, order)
    else:
        asked, answers = labelled("linear_probe", "queries", queries)
        check_widths("linear_probe", features, asked)
        asked, answers = asked.to(features.device), answers.to(features.device)
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"linear_probe: expected images of at least 2 classes, got {len(classes)}")
    train, rest = _split(features, labels, held_out, order)
    classifiers = _train(*train, classes, lrs, epochs, order)
    accuracies = dict(zip(lrs, classifiers.accuracies(*rest), strict=True))
    lr = max(accuracies, key=accuracies.get)  # of equal ones the smallest
    best = _train(features, labels, classes, (lr,), epochs, order)
    return LinearProbe(best.accuracies(asked, answers)[0], lr, accuracies)


class _Classifiers(NamedTuple):
    """One linear classifier for each learning rate."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (D, L * C)
    bias: Tensor  # (L * C,)
    classes: Tensor  # (C,)

    def normalized(self, features: Tensor) -> Tensor:
        """(n, D), as MAE's BatchNorm without affine has them."""
        return (features - self.mean) * self.scale

    def logits(self, inputs: Tensor) -> Tensor:
        """(n, L, C) of normalised features."""
        scores = torch.addmm(self.bias, inputs, self.weight)
        return scores.unflatten(1, (-1, len(self.classes)))

    def accuracies(self, features: Tensor, labels: Tensor) -> list[float]:
        """Of each learning rate."""
        right = 0
        for part, answers in zip(features.split(_BATCH), labels.split(_BATCH), strict=True):
            logits = self.logits(self.normalized(part))
            voted = self.classes[logits.nan_to_num().argmax(dim=2)]
            # A rate that diverged has logits that are not finite: it is right nowhere.
            found = (voted == answers[:, None]) & logits.isfinite().all(dim=2)
            right = right + found.sum(dim=0)
        return (right.double() / len(labels)).tolist()


def _split(
    features: Tensor, labels: Tensor, part: float, order: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rest and a random part, each with at least one image."""
    count = len(labels)
    if count < 2:
        raise ValueError(
            f"linear_probe: {count} labelled images cannot be split into images to train and to "
            "test on; use more"
        )
    ids = torch.randperm(count, generator=order).to(labels.device)
    size = min(max(1, round(part * count)), count - 1)
    test, train = ids[:size], ids[size:]
    return (features[train], labels[train]), (features[test], labels[test])


def _train(
    features: Tensor,
    labels: Tensor,
    classes: Tensor,
    lrs: tuple[float, ...],
    epochs: int,
    order: torch.Generator,
) -> _Classifiers:
    """SGD with momentum on the mean cross-entropy, of all learning rates side by side."""
    count, width = features.shape
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    kinds = len(classes)
    weight, bias = (features.new_zeros(*rows, len(lrs) * kinds) for rows in ((width,), ()))
    trained = _Classifiers(mean, (variance + 1e-6).rsqrt(), weight, bias, classes)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor(lrs, device=weight.device).repeat_interleave(kinds)
    targets = torch.searchsorted(classes, labels)
    batch = max(1, min(_BATCH, count // _STEPS_PER_EPOCH))
    steps = math.ceil(count / batch)
    for epoch in range(epochs):
        ids = torch.randperm(count, generator=order).to(labels.device)
        for step, chosen in enumerate(ids.split(batch)):
            progress = (epoch * steps + step) / (epochs * steps)
            decayed = rates * (0.5 * (1 + math.cos(math.pi * progress)))
            inputs = trained.normalized(features[chosen])
            gradient = trained.logits(inputs).softmax(dim=2)  # (b, L, C)
            gradient -= F.one_hot(targets[chosen], kinds)[:, None]
            gradient = gradient.flatten(1) / len(chosen)
            for value, speed, new in zip(
                (weight, bias), speeds, (inputs.T @ gradient, gradient.sum(dim=0)), strict=True
            ):
                speed.mul_(_MOMENTUM).add_(new)
                value -= decayed * speed
    return trained
