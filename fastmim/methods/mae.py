"""MAE: masked autoencoders are scalable vision learners."""

from torch import Tensor

from fastmim.methods.base import Losses, Method
from fastmim.nn import MaskedAutoencoder
from fastmim.ops import Masks, num_keep


class MAE(Method):
    """Masked autoencoder (He et al., CVPR 2022, arXiv:2111.06377).

    Args:
        autoencoder: The network that is trained.
        mask_ratio: Fraction of patches removed, in (0, 1).

    Raises:
        ValueError: If the ratio leaves no visible or no masked patch.
    """

    def __init__(self, autoencoder: MaskedAutoencoder, *, mask_ratio: float = 0.75) -> None:
        super().__init__()
        num_keep(autoencoder.num_patches, mask_ratio)
        self.student = autoencoder
        self.teacher = None
        self.mask_ratio = mask_ratio

    def forward(self, imgs: Tensor, masks: Masks | None = None) -> Losses:
        if masks is None:
            masks = self.student.random_masks(imgs.shape[0], self.mask_ratio, imgs.device)
        pred = self.student.predict(imgs, masks)
        loss = self.student.loss(pred, imgs, masks)
        return Losses(loss.total, {"pixel": loss.pixel})
