"""RC-MAE: the student must also match the reconstruction of its own moving average."""

import math
from typing import Literal

import torch
from torch import Tensor

from fastmim.methods.base import Clock, Losses, Method, cosine_momentum
from fastmim.nn import EMATeacher, MaskedAutoencoder
from fastmim.ops import Masks


class RCMAE(Method):
    """Reconstruction-consistent MAE (Lee et al., ICLR 2023, arXiv:2210.02077).

    Args:
        autoencoder: The student; the teacher starts as its copy, encoder and decoder.
        mask_ratio: Fraction of patches removed, in (0, 1).
        gamma: Weight of the consistency term.
        momentum: Of the teacher at the start of the run, in [0, 1].
        momentum_schedule: ``cosine`` to 1 over the run, after every step. ``official``: what the
            released code does, after every micro-batch and restarted every epoch.

    Raises:
        ValueError: If the ratio leaves no visible or no masked patch, or momentum is not in [0, 1].
    """

    features_of = "teacher"

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        *,
        mask_ratio: float = 0.75,
        gamma: float = 1.0,
        momentum: float = 0.996,
        momentum_schedule: Literal["cosine", "official"] = "cosine",
    ) -> None:
        super().__init__(autoencoder, mask_ratio)
        if not 0.0 <= momentum <= 1.0 or not math.isfinite(gamma):
            raise ValueError(
                f"RCMAE: expected momentum in [0, 1] and a finite gamma, got {momentum} and {gamma}"
            )
        self.teacher = EMATeacher(autoencoder)
        self.gamma = gamma
        self.momentum = momentum
        self.teacher_follows = "micro_step" if momentum_schedule == "official" else "step"

    def forward(
        self,
        imgs: Tensor,
        masks: Masks | None = None,
        *,
        draws: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Losses:
        masks = self.masks_for(imgs) if masks is None else masks
        if target is None:
            with torch.no_grad():
                target = self.teach(imgs, masks)
        pred = self.student.predict(imgs, masks, draws=draws)
        loss = self.student.loss(pred, imgs, masks, teacher_pred=target, gamma=self.gamma)
        return Losses(loss.total, {"pixel": loss.pixel, "consistency": loss.consistency})

    def teach(self, imgs: Tensor, masks: Masks) -> Tensor:
        """(B, N - K, p * p * C): the teacher's prediction from the same visible patches."""
        return self.teacher.module.predict(imgs, masks)

    def teacher_momentum(self, clock: Clock) -> float:
        progress = clock.progress
        if self.teacher_follows == "micro_step":
            # As released: the table of the whole run, read at the iteration within the epoch.
            within = clock.step % clock.steps_per_epoch * clock.micro_steps + clock.micro_step
            progress = within / (clock.steps_per_epoch * clock.epochs * clock.micro_steps)
        return cosine_momentum(self.momentum, progress)

    def update_teacher(self, momentum: float | None = None) -> None:
        """Move the teacher towards the student; for loops that do not use ``adamw_ema_``.

        Args:
            momentum: In [0, 1]. Default: the momentum given at construction.
        """
        self.teacher.update_(self.student, self.momentum if momentum is None else momentum)
