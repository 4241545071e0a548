"""RC-MAE: the student must also match the reconstruction of its own moving average."""

import math

import torch
from torch import Tensor

from fastmim.methods.base import Losses, Method, cosine_momentum
from fastmim.nn import EMATeacher, MaskedAutoencoder
from fastmim.ops import Masks, num_keep


class RCMAE(Method):
    """Reconstruction-consistent MAE (Lee et al., ICLR 2023, arXiv:2210.02077).

    Args:
        autoencoder: The student; the teacher starts as its copy, encoder and decoder.
        mask_ratio: Fraction of patches removed, in (0, 1).
        gamma: Weight of the consistency term.
        momentum: Of the teacher at the start of the run, in [0, 1].

    Raises:
        ValueError: If the ratio leaves no visible or no masked patch, or momentum is not in [0, 1].
    """

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        *,
        mask_ratio: float = 0.75,
        gamma: float = 1.0,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        num_keep(autoencoder.num_patches, mask_ratio)
        if not 0.0 <= momentum <= 1.0 or not math.isfinite(gamma):
            raise ValueError(
                f"RCMAE: expected momentum in [0, 1] and a finite gamma, got {momentum} and {gamma}"
            )
        self.student = autoencoder
        self.teacher = EMATeacher(autoencoder)
        self.mask_ratio = mask_ratio
        self.gamma = gamma
        self.momentum = momentum

    def forward(self, imgs: Tensor, masks: Masks | None = None) -> Losses:
        if masks is None:
            masks = self.student.random_masks(imgs.shape[0], self.mask_ratio, imgs.device)
        with torch.no_grad():
            teacher_pred = self.teacher.module.predict(imgs, masks)  # the same visible patches
        pred = self.student.predict(imgs, masks)
        loss = self.student.loss(pred, imgs, masks, teacher_pred=teacher_pred, gamma=self.gamma)
        return Losses(loss.total, {"pixel": loss.pixel, "consistency": loss.consistency})

    def teacher_momentum(self, progress: float) -> float:
        return cosine_momentum(self.momentum, progress)

    def update_teacher(self, momentum: float | None = None) -> None:
        """Move the teacher towards the student; for loops that do not use ``adamw_ema_``.

        Args:
            momentum: In [0, 1]. Default: the momentum given at construction.
        """
        self.teacher.update_(self.student, self.momentum if momentum is None else momentum)
