"""Patch embedding of the visible patches only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.ops import gather_patches

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """Linear embedding of square patches: ``out = W flatten(patch) + b``.

    Parameters are those of a convolution with kernel = stride = patch size (``proj.weight``
    (D, C, p, p), ``proj.bias`` (D,)), as in ViT (arXiv:2010.11929) and MAE checkpoints, but only
    the patches asked for are cut out and multiplied.

    Args:
        img_size: Height and width in pixels, or one number for both.
        patch_size: p, side of a patch in pixels; must divide both.
        in_chans: C, channels.
        embed_dim: D.
        pixel_mean: Mean of each channel on the scale 0..1, used for uint8 images only. Default:
            ImageNet's if there are three channels.
        pixel_std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: If the patch size does not divide the image, or the statistics do not match
            the channels.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        pixel_mean: tuple[float, ...] | None = None,
        pixel_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        height, width = self.img_size
        if patch_size < 1 or min(height, width) < 1 or height % patch_size or width % patch_size:
            fits = patch_size * max(1, round(height / max(patch_size, 1)))
            raise ValueError(
                f"PatchEmbed: expected an image size divisible by the patch size, got "
                f"{height} x {width} pixels and patches of {patch_size}; for example {fits} fits"
            )
        self.patch_size = (patch_size, patch_size)  # a pair, as in timm
        self.in_chans = in_chans
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        if pixel_mean is None and pixel_std is None and in_chans == 3:
            pixel_mean, pixel_std = IMAGENET_MEAN, IMAGENET_STD
        self.set_pixel_normalization(pixel_mean, pixel_std)

    def set_pixel_normalization(
        self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> None:
        """Statistics with which uint8 images are normalised: ``(x / 255 - mean) / std``.

        Args:
            mean: C numbers on the scale 0..1; None together with ``std``: uint8 is then refused.
            std: C positive numbers.

        Raises:
            ValueError: If there are not C of each.
        """
        device = self.proj.weight.device
        scale = shift = None
        if mean is not None or std is not None:
            if mean is None or std is None or not len(mean) == len(std) == self.in_chans:
                raise ValueError(
                    f"set_pixel_normalization: expected {self.in_chans} means and standard "
                    f"deviations, got {mean} and {std}"
                )
            spread = torch.tensor(std, dtype=torch.float64)
            scale = (1 / (255 * spread)).to(device)
            shift = (-torch.tensor(mean, dtype=torch.float64) / spread).to(device)
        # Not saved: checkpoints keep the published keys.
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)

    def pixel_normalization(self, imgs: Tensor) -> dict[str, Tensor | None]:
        """``scale`` and ``shift`` for ``imgs``: none for floating-point images, taken as they are.

        Raises:
            ValueError: If the images do not have the size and channels of this model, or are uint8
                and no statistics are known.
        """
        expected = (self.in_chans, *self.img_size)
        if imgs.ndim != 4 or tuple(imgs.shape[1:]) != expected:
            raise ValueError(
                f"expected images (B, {', '.join(map(str, expected))}), got {tuple(imgs.shape)}; "
                "create the model with that img_size and in_chans, or resize the images"
            )
        if imgs.dtype != torch.uint8:
            return {"scale": None, "shift": None}
        if self.pixel_scale is None:
            raise ValueError(
                f"uint8 images with {self.in_chans} channels need a mean and a standard deviation: "
                "call set_pixel_normalization, or pass normalised floating-point images"
            )
        return {"scale": self.pixel_scale, "shift": self.pixel_shift}

    def forward(self, imgs: Tensor, ids: Tensor) -> Tensor:
        """Embed the patches ``ids``.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            ids: (B, K), int64, patch positions row-major.

        Returns:
            (B, K, D).
        """
        weight = self.proj.weight
        rows = gather_patches(
            imgs, ids, self.patch_size[0], dtype=weight.dtype, **self.pixel_normalization(imgs)
        )
        return F.linear(rows, weight.flatten(1), self.proj.bias)
