"""What every pre-training method is to the trainer."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from fastmim.nn import EMATeacher, MaskedAutoencoder
from fastmim.ops import Masks


class Losses(NamedTuple):
    """Loss of a batch.

    Attributes:
        total: Scalar, the one that is minimised.
        terms: Name to detached scalar, for logs.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Method(nn.Module, ABC):
    """A student, perhaps a teacher, and a loss. Knows no device, precision, logging or process.

    Attributes:
        student: The module that is trained.
        teacher: The module that follows it, or None.
        mask_ratio: Fraction of patches removed.
    """

    student: MaskedAutoencoder
    teacher: EMATeacher | None
    mask_ratio: float

    @abstractmethod
    def forward(self, imgs: Tensor, masks: Masks | None = None) -> Losses:
        """Loss of a batch.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            masks: For B images. Default: random ones of ``mask_ratio``.
        """

    def teacher_momentum(self, progress: float) -> float:
        """Momentum of the teacher when ``progress`` in [0, 1] of the run is done."""
        raise ValueError(f"{type(self).__name__} has no teacher")


def cosine_momentum(base: float, progress: float) -> float:
    """From ``base`` to 1 along half a cosine: ``1 - (1 - base) * (1 + cos(pi * progress)) / 2``.

    Args:
        base: Momentum at the start, in [0, 1].
        progress: In [0, 1].
    """
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * progress))
