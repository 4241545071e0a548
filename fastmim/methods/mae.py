"""MAE: masked autoencoders are scalable vision learners."""

from torch import Tensor

from fastmim.methods.base import Losses, Method
from fastmim.nn import MaskedAutoencoder
from fastmim.ops import Masks


class MAE(Method):
    """Masked autoencoder (He et al., CVPR 2022, arXiv:2111.06377).

    Args:
        autoencoder: The network that is trained.
        mask_ratio: Fraction of patches removed, in (0, 1).

    Raises:
        ValueError: If the ratio leaves no visible or no masked patch.
    """

    def __init__(self, autoencoder: MaskedAutoencoder, *, mask_ratio: float = 0.75) -> None:
        super().__init__(autoencoder, mask_ratio)

    def forward(
        self,
        imgs: Tensor,
        masks: Masks | None = None,
        *,
        draws: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Losses:
        masks = self.masks_for(imgs) if masks is None else masks
        pred = self.student.predict(imgs, masks, draws=draws)
        loss = self.student.loss(pred, imgs, masks)
        return Losses(loss.total, {"pixel": loss.pixel})
