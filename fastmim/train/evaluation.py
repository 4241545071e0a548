"""kNN accuracy during a run and at its end."""

import torch

from fastmim.data import Source, eval_batches, open_source
from fastmim.eval import FeatureBank, extract_features, knn_accuracy, pixel_features
from fastmim.methods import Method
from fastmim.nn import Encoder
from fastmim.train.build import build_autoencoder
from fastmim.train.config import Evaluation, Recipe

_BATCH = 256


class KNNEvaluation:
    """kNN classification of one network's features; see :class:`fastmim.train.config.Evaluation`.

    Args:
        config: Where the labelled images are, and how many neighbours vote.
        source: The training images: the bank if the configuration names no other.
        image_size: Height and width that the network sees.

    Raises:
        ValueError: If accuracy is asked for during the run and there are no labels, or the bank's
            images have other channels than the training images.
    """

    def __init__(self, config: Evaluation, source: Source, image_size: tuple[int, int]) -> None:
        self.config = config
        self.image_size = image_size
        self.mean, self.std = source.mean, source.std
        self.bank = source if config.bank is None else open_source(config.bank)
        self.queries = None if config.queries is None else open_source(config.queries)
        for name, images in (("bank", self.bank), ("queries", self.queries)):
            if images is not None and images.channels != source.channels:
                raise ValueError(
                    f"evaluation.{name}: its images have {images.channels} channels, the training "
                    f"images {source.channels}"
                )
        if config.knn_every and not self.possible:
            raise ValueError(
                "evaluation.knn_every: kNN accuracy needs labels, and "
                f"{self.bank.describe()} has none; name labelled images with evaluation.bank, or "
                "set evaluation.knn_every to 0"
            )

    @property
    def possible(self) -> bool:
        """Whether there are labels."""
        sources = [self.bank] if self.queries is None else [self.bank, self.queries]
        return all(s.labels is not None for s in sources)

    def describe(self) -> str:
        """One line on what is searched and what is classified."""
        bank = min(len(self.bank), self.config.limit or len(self.bank))
        if self.queries is None:
            return f"k = {self.config.k}, each of {bank} images against all others"
        return f"k = {self.config.k}, {len(self.queries)} images against {bank}"

    def accuracy(self, encoder: Encoder | None) -> float:
        """Accuracy in [0, 1] of the encoder's mean patch token; of raw pixels without one."""
        bank = self._features(encoder, self.bank, self.config.limit or None)
        queries = None if self.queries is None else self._features(encoder, self.queries, None)
        return knn_accuracy(bank, queries, k=self.config.k, temperature=self.config.temperature)

    def _features(self, encoder: Encoder | None, source: Source, limit: int | None) -> FeatureBank:
        batches = eval_batches(
            source,
            image_size=self.image_size,
            batch_size=_BATCH,
            crop_ratio=self.config.crop_ratio,
            limit=limit,
        )
        if encoder is None:
            return pixel_features(batches)
        with torch.inference_mode():
            return extract_features(encoder, batches)


def compare(evaluation: KNNEvaluation, method: Method, recipe: Recipe) -> dict[str, float]:
    """kNN accuracy of teacher, student, the same network before training, and raw pixels.

    Args:
        evaluation: What is searched and classified.
        method: Trained.
        recipe: That it was trained with; the untrained network is built from it.
    """
    embed = method.student.patch_embed
    untrained = build_autoencoder(recipe, embed.in_chans, evaluation.mean, evaluation.std)
    found = {}
    if method.teacher is not None:
        found["teacher"] = evaluation.accuracy(method.teacher.module)
    found["student"] = evaluation.accuracy(method.student)
    found["untrained network"] = evaluation.accuracy(untrained)
    found["raw pixels"] = evaluation.accuracy(None)
    return found
