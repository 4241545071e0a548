"""Weighted k-nearest-neighbour classification: how good features are before any fine-tuning."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.eval.features import FeatureBank, check_widths, labelled

_CHUNK = 2**24  # similarities held at a time: 64 MiB


def knn_accuracy(
    bank: FeatureBank,
    queries: FeatureBank | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Fraction of queries whose neighbours vote for their class.

    DINO (arXiv:2104.14294, sec. 4.1, after Wu et al., arXiv:1805.01978): each of the ``k`` nearest
    by cosine similarity votes for its class with weight ``exp(similarity / temperature)``. The
    features are taken as they are; a common mean is not removed.

    Args:
        bank: The neighbours, usually of the training images. Computed where its features are.
        queries: What is classified, usually of the validation images. Default: each image of the
            bank in turn, by the others (leave-one-out).
        k: Neighbours.
        temperature: Positive; the smaller, the more the nearest decide.

    Returns:
        In [0, 1]. Images with label -1 neither vote nor count. Of classes with equal votes that of
        the nearest neighbour wins.

    Raises:
        ValueError: If labels are missing, ``k`` is not in [1, neighbours], the widths differ, or
            features are not finite.
    """
    if not temperature > 0:
        raise ValueError(f"knn_accuracy: expected a positive temperature, got {temperature}")
    leave_one_out = queries is None
    vectors, labels = _unit_vectors("bank", bank)
    if leave_one_out:
        asked, answers = vectors, labels
    else:
        asked, answers = _unit_vectors("queries", queries)
        check_widths("knn_accuracy", vectors, asked)
    neighbours = len(vectors) - leave_one_out
    if not 1 <= k <= neighbours:
        raise ValueError(
            f"knn_accuracy: expected k in [1, {neighbours}], the labelled neighbours there are, "
            f"got {k}; use a smaller k or more images"
        )
    right = 0
    rows = max(1, _CHUNK // max(len(vectors), k * k))
    for start in range(0, len(asked), rows):
        similarity = asked[start : start + rows].to(vectors.device) @ vectors.T
        if leave_one_out:
            similarity.diagonal(start).fill_(-torch.inf)
        voted = _vote(similarity, labels, k, temperature)
        right += int((voted == answers[start : start + rows].to(voted.device)).sum())
    return right / len(asked)


def _vote(similarity: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """Classes (q,) for similarities (q, n) to images of the classes ``labels`` (n,)."""
    nearest, ids = similarity.topk(k, dim=1)
    classes = labels[ids]  # (q, k), nearest first
    weights = ((nearest - nearest[:, :1]) / temperature).exp()  # a common factor: no overflow
    # The votes for each neighbour's class: no scatter, so deterministic on a GPU too.
    same = classes[:, :, None] == classes[:, None, :]  # (q, k, k)
    votes = torch.where(same, weights[:, None, :], 0.0).sum(dim=2)
    return classes.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0]


def _unit_vectors(name: str, bank: FeatureBank) -> tuple[Tensor, Tensor]:
    features, labels = labelled("knn_accuracy", name, bank)
    return F.normalize(features, dim=1), labels
