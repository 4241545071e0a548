"""Patch embedding of the visible patches only."""

import torch
from torch import Tensor, nn

from fastmim.ops import gather_patches, linear

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
        ValueError: If a size is not positive, the patch size does not divide the image, or the
            statistics do not match the channels.
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
        if not isinstance(patch_size, int) or min(patch_size, in_chans, *self.img_size) < 1:
            raise ValueError(
                "PatchEmbed: expected positive img_size, in_chans and a single patch_size, got "
                f"{self.img_size}, {in_chans} and {patch_size}"
            )
        height, width = self.img_size
        if height % patch_size or width % patch_size:
            fits = [max(1, round(side / patch_size)) * patch_size for side in self.img_size]
            raise ValueError(
                f"PatchEmbed: expected an image size divisible by the patch size, got "
                f"{height} x {width} pixels and patches of {patch_size}; {fits[0]} x {fits[1]} fits"
            )
        self.patch_size = (patch_size, patch_size)  # a pair, as in timm
        self.in_chans = in_chans
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        if pixel_mean is None and pixel_std is None and in_chans == 3:
            pixel_mean, pixel_std = IMAGENET_MEAN, IMAGENET_STD
        scale = shift = None
        if pixel_mean is not None or pixel_std is not None:
            if not len(pixel_mean or ()) == len(pixel_std or ()) == in_chans:
                raise ValueError(
                    f"PatchEmbed: expected pixel_mean and pixel_std of {in_chans} channels each, "
                    f"got {pixel_mean} and {pixel_std}"
                )
            spread = torch.tensor(pixel_std, dtype=torch.float64)
            centre = torch.tensor(pixel_mean, dtype=torch.float64)
            scale, shift = 1 / (255 * spread), -centre / spread
        # Not saved: checkpoints keep the published keys.
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)

    def pixel_normalization(self, imgs: Tensor) -> dict[str, Tensor | None]:
        """``scale`` and ``shift`` for ``imgs``: none for floating-point images, taken as they are.

        Raises:
            ValueError: If the images do not have the size and channels of this model, or are uint8
                and no statistics are known.
        """
        self.check_shape(imgs)
        return self._statistics(imgs)

    def check_shape(self, imgs: Tensor) -> None:
        """Refuse images that do not have the size and channels of this model.

        Raises:
            ValueError: Says what was expected.
        """
        expected = (self.in_chans, *self.img_size)
        if imgs.ndim != 4 or tuple(imgs.shape[1:]) != expected:
            raise ValueError(
                f"expected images (B, {', '.join(map(str, expected))}), got {tuple(imgs.shape)}; "
                "create the model with that img_size and in_chans, or resize the images"
            )

    def _statistics(self, imgs: Tensor) -> dict[str, Tensor | None]:
        if imgs.dtype != torch.uint8:
            return {"scale": None, "shift": None}
        if self.pixel_scale is None:
            raise ValueError(
                f"uint8 images with {self.in_chans} channels need a mean and a standard deviation: "
                "create the model with pixel_mean and pixel_std, or pass normalised floating-point "
                "images"
            )
        return {"scale": self.pixel_scale, "shift": self.pixel_shift}

    def normalized(self, imgs: Tensor) -> Tensor:
        """Images in floating point and normalised, for networks that take nothing else.

        Args:
            imgs: (B, C, H, W) of any size, uint8; or floating point and normalised, returned as
                they are.

        Raises:
            ValueError: If the images are uint8 and no statistics are known.
        """
        values = self._statistics(imgs)
        if values["scale"] is None:
            return imgs
        scale, shift = (v.to(self.proj.weight.dtype)[:, None, None] for v in values.values())
        return imgs * scale + shift

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
        return linear(rows, weight.flatten(1), self.proj.bias)
