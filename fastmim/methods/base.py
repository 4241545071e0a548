"""What every pre-training method is to the trainer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmim.nn import Encoder, MaskedAutoencoder
from fastmim.nn.teacher import Teacher
from fastmim.ops import Masks, num_keep


class Losses(NamedTuple):
    """Loss of a batch.

    Attributes:
        total: Scalar, the one that is minimised.
        terms: Name to detached scalar, for logs.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Clock(NamedTuple):
    """Where a run is.

    Attributes:
        step: Optimizer step, from 0.
        steps_per_epoch: Optimizer steps in a pass over the data.
        epochs: Of the whole run.
        micro_step: Micro-batch within the step.
        micro_steps: Micro-batches in a step.
    """

    step: int
    steps_per_epoch: int
    epochs: int
    micro_step: int = 0
    micro_steps: int = 1

    @property
    def progress(self) -> float:
        """Part of the run before this step, in [0, 1]."""
        return self.step / (self.steps_per_epoch * self.epochs)

    @property
    def epoch(self) -> int:
        """Of this step, from 0."""
        return self.step // self.steps_per_epoch


class Method(nn.Module, ABC):
    """A student, perhaps a teacher, and a loss. Knows no device, precision, logging or process.

    Args:
        autoencoder: The student.
        mask_ratio: Fraction of patches removed, in (0, 1).

    Attributes:
        target: What the student must predict, see :class:`fastmim.nn.MaskedAutoencoder`.
        student: The module that is trained.
        teacher: The module that gives targets, or None.
        teacher_follows: When an EMA teacher moves: never, or after every micro-batch, optimizer
            step or epoch.
        features_of: The network whose features are meant to be used.
        has_stages: Whether :meth:`begin_stage` can be called.
        mask_ratio: Fraction of patches removed.

    Raises:
        ValueError: If the ratio leaves no visible or no masked patch, or the student predicts
            something else.
    """

    target = "pixels"
    features_of: Literal["student", "teacher"] = "student"
    has_stages = False
    teacher_follows: Literal["never", "micro_step", "step", "epoch"] = "never"
    student: MaskedAutoencoder
    teacher: Teacher | None

    def __init__(self, autoencoder: MaskedAutoencoder, mask_ratio: float) -> None:
        super().__init__()
        num_keep(autoencoder.num_patches, mask_ratio)
        if autoencoder.target != self.target:
            raise ValueError(
                f"{type(self).__name__}: expected a network that predicts {self.target}, got one "
                f"that predicts {autoencoder.target}; create the model with target='{self.target}'"
            )
        self.student = autoencoder
        self.teacher = None
        self.mask_ratio = mask_ratio

    @abstractmethod
    def forward(
        self,
        imgs: Tensor,
        masks: Masks | None = None,
        *,
        draws: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Losses:
        """Loss of a batch.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            masks: For B images. Default: random ones of ``mask_ratio``.
            draws: (B, student.num_draws), for stochastic depth. Default: random.
            target: From :meth:`teach` for these images and masks. Default: made here.
        """

    @classmethod
    def student_options(cls, drop_path: float) -> dict:
        """Arguments of :class:`fastmim.nn.MaskedAutoencoder` that the method decides.

        Args:
            drop_path: Rate of stochastic depth.
        """
        return {"target": cls.target, "drop_path": drop_path}

    def teach(self, imgs: Tensor, masks: Masks) -> Tensor | None:
        """The teacher's part, to be called without gradient; None without a teacher."""
        return None

    def teacher_momentum(self, clock: Clock) -> float:
        """Momentum of an EMA teacher."""
        raise ValueError(f"{type(self).__name__} has no teacher that moves")

    def check_stages(self, count: int) -> None:
        """Refuse stages that could not begin, before any training.

        Args:
            count: Of the run, at least 1.
        """
        if count > 1 and not self.has_stages:
            self.begin_stage(1)  # says that there are none

    def begin_stage(self, stage: int) -> None:
        """Replace teacher and student where a stage begins; the last one must be trained.

        Args:
            stage: From 1.
        """
        raise ValueError(
            f"{type(self).__name__} is trained in one stage; leave recipe.stage_epochs out"
        )

    def best_encoder(self) -> Encoder:
        """The network whose features are meant to be used."""
        return self.teacher.module if self.features_of == "teacher" else self.student

    def masks_for(self, imgs: Tensor) -> Masks:
        """Random masks of ``mask_ratio``."""
        return self.student.random_masks(imgs.shape[0], self.mask_ratio, imgs.device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from the CPU's generator, seeded; no generator is changed afterwards.

    Args:
        seed: Less than 2**64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds those of GPUs too
        yield


def cosine_momentum(base: float, progress: float, final: float = 1.0) -> float:
    """Half a cosine: ``final - (final - base) * (1 + cos(pi * progress)) / 2``.

    Args:
        base: Momentum at the start, in [0, 1].
        progress: In [0, 1].
        final: Momentum at the end.
    """
    return final - (final - base) * 0.5 * (1.0 + math.cos(math.pi * progress))
