"""Accuracy of the features, by neighbours or a linear classifier, during a run and after it."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from fastmim.data import Source, eval_batches, open_source
from fastmim.eval import (
    FeatureBank,
    extract_features,
    knn_accuracy,
    linear_probe,
    pixel_features,
)
from fastmim.methods import Method
from fastmim.nn import Encoder
from fastmim.train.build import networks, untrained_network
from fastmim.train.config import Evaluation

_BATCH = 256
_PIXEL_SIDE = 64  # longest side of the images whose pixels are features: 10 000 take 0.5 GiB


class FeatureEvaluation(ABC):
    """Labelled images, and how good features of them are; see :class:`KNNEvaluation`.

    Args:
        config: Where the labelled images are; see :class:`fastmim.train.config.Evaluation`.
        source: The bank if the configuration names none.
        image_size: Height and width of the images that the student sees, to which those are shrunk
            whose raw pixels are compared. Each network sees images of its own size.
        channels: That the networks see.
        workers: Processes that load images; 0: this one.
        on_bad: Called with name and reason of each image that cannot be read and is left out.

    Attributes:
        title: Of the accuracy.
        obstacle: Why there can be no accuracy, such as images without labels; None if there can.

    Raises:
        ValueError: If the images have other channels than the network.
    """

    title: str

    def __init__(
        self,
        config: Evaluation,
        source: Source,
        *,
        image_size: tuple[int, int],
        channels: int,
        workers: int = 0,
        on_bad: Callable[[str, str], None] | None = None,
    ) -> None:
        self.config = config
        self.image_size = image_size
        self.workers = workers
        self.on_bad = on_bad
        self.bank = source if config.bank is None else open_source(config.bank)
        self.queries = None if config.queries is None else open_source(config.queries)
        for name, images in (("bank", self.bank), ("queries", self.queries)):
            if images is not None and images.channels != channels:
                raise ValueError(
                    f"eval.{name}: the images have {images.channels} channels, the network "
                    f"takes {channels}"
                )
        self.obstacle = self._without_labels() or self._find_obstacle()

    def _without_labels(self) -> str | None:
        for images in (self.bank, self.queries):
            if images is not None and not _labelled(images):
                return f"there are no labels in {images.describe()}; name labelled images"
        return None

    @abstractmethod
    def _find_obstacle(self) -> str | None:
        """Why labelled images are not enough."""

    @abstractmethod
    def describe(self) -> str:
        """One line on what is compared with what."""

    @abstractmethod
    def accuracy_of(self, bank: FeatureBank, queries: FeatureBank | None) -> float:
        """Accuracy in [0, 1] of features."""

    def accuracy(self, encoder: Encoder | None) -> float:
        """Accuracy in [0, 1] of the encoder's features; of raw pixels without one."""
        return self.accuracy_of(*self.features(encoder))

    def features(self, encoder: Encoder | None) -> tuple[FeatureBank, FeatureBank | None]:
        """Those of the bank and of the queries, if there are any."""
        bank = self._features(encoder, self.bank, self.config.limit or None)
        return bank, None if self.queries is None else self._features(encoder, self.queries, None)

    def _features(self, encoder: Encoder | None, source: Source, limit: int | None) -> FeatureBank:
        batches = eval_batches(
            source,
            image_size=self.pixel_size if encoder is None else encoder.patch_embed.img_size,
            batch_size=_BATCH,
            crop_ratio=self.config.crop_ratio,
            limit=limit,
            workers=self.workers,
            on_bad=self.on_bad,
        )
        if encoder is None:
            return pixel_features(batches)
        return extract_features(encoder, batches, pool=self.config.pool)

    @property
    def searched(self) -> int:
        """Images of the bank that are used."""
        return min(len(self.bank), self.config.limit or len(self.bank))

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Height and width of the images whose raw pixels are compared."""
        shrink = min(1.0, _PIXEL_SIDE / max(self.image_size))
        height, width = self.image_size
        return max(1, round(shrink * height)), max(1, round(shrink * width))


class KNNEvaluation(FeatureEvaluation):
    """kNN classification of one network's features; see :func:`fastmim.eval.knn_accuracy`.

    Raises:
        ValueError: If accuracy is asked for during the run and there is an obstacle, or the images
            have other channels than the network.
    """

    title = "kNN accuracy"

    def __init__(self, config: Evaluation, source: Source, **options) -> None:
        super().__init__(config, source, **options)
        if config.knn_every and self.obstacle:
            raise ValueError(
                f"eval.knn_every: kNN accuracy cannot be measured: {self.obstacle}, or set "
                "eval.knn_every to 0"
            )

    def _find_obstacle(self) -> str | None:
        neighbours = min(_labelled(self.bank), self.searched)
        neighbours -= self.queries is None  # an image is no neighbour of itself
        if self.config.k > neighbours:
            return (
                f"eval.k is {self.config.k}, and there are {neighbours} labelled neighbours; "
                "use a smaller k or more images"
            )
        return None

    def describe(self) -> str:
        if self.queries is None:
            return f"k = {self.config.k}, each of {self.searched} images against all others"
        return f"k = {self.config.k}, {len(self.queries)} images against {self.searched}"

    def accuracy_of(self, bank: FeatureBank, queries: FeatureBank | None) -> float:
        return knn_accuracy(bank, queries, k=self.config.k, temperature=self.config.temperature)


class LinearEvaluation(FeatureEvaluation):
    """Linear probe of one network's features; see :func:`fastmim.eval.linear_probe`."""

    title = "linear probe"

    def _find_obstacle(self) -> str | None:
        if len(self.bank.labels[self.bank.labels >= 0].unique()) < 2:
            return f"all labels in {self.bank.describe()} are of one class; name other images"
        return None

    def describe(self) -> str:
        if self.queries is None:
            return f"trained on four fifths of {self.searched} images, tested on the others"
        return f"trained on {self.searched} images, tested on {len(self.queries)}"

    def accuracy_of(self, bank: FeatureBank, queries: FeatureBank | None) -> float:
        return linear_probe(bank, queries).accuracy


def _labelled(source: Source) -> int:
    return 0 if source.labels is None else int((source.labels >= 0).sum())


def encoders_of(method: Method, identity: dict) -> dict[str, Encoder]:
    """Teacher, student, and the same network before training.

    Args:
        method: Trained.
        identity: Of its run, from which the untrained network is built.
    """
    named = reversed(networks(method).items())
    encoders = {name: network for name, network in named if isinstance(network, Encoder)}
    device = method.student.patch_embed.proj.weight.device
    return {**encoders, "untrained network": untrained_network(identity).to(device)}


def compare(evaluation: FeatureEvaluation, encoders: dict[str, Encoder]) -> dict[str, float]:
    """Accuracy of networks by name, and of raw pixels.

    Args:
        evaluation: Of what images, and how.
        encoders: From :func:`encoders_of` or :func:`fastmim.train.build.published_encoders`.
    """
    height, width = evaluation.pixel_size
    return {
        **{name: evaluation.accuracy(encoder) for name, encoder in encoders.items()},
        f"raw pixels, {height} x {width}": evaluation.accuracy(None),
    }
