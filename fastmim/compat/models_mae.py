"""MAE's ``models_mae``: ``MaskedAutoencoderViT`` and its factories (arXiv:2111.06377)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmim import ops
from fastmim.compat.factories import factory
from fastmim.nn import MaskedAutoencoder
from fastmim.ops import Masks, gather_tokens, num_keep, reference


class MaskedAutoencoderViT(MaskedAutoencoder):
    """:class:`fastmim.nn.MaskedAutoencoder` behind the interface of MAE's ``models_mae``.

    The state_dict is the same, key by key. :meth:`forward` is made of the methods below it, as in
    the original, so a subclass may override any of them. :meth:`forward_encoder` and
    :meth:`forward_decoder` take a mask ratio and ``ids_restore`` where the base class takes
    ``Masks``; :meth:`predict`, :meth:`encode` and :meth:`loss` are those of the base class.

    Args:
        img_size: Height and width in pixels, or one number for both.
        patch_size: p, side of a patch in pixels.
        in_chans: C, channels.
        embed_dim, depth, num_heads: Size of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: Size of the decoder.
        mlp_ratio: Hidden width of the MLPs divided by the width.
        norm_layer: Makes a normalisation for a width. The default has eps 1e-5; the factories pass
            1e-6.
        norm_pix_loss: Normalise the pixels of each target patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            norm_pix_loss=norm_pix_loss,
        )

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, *, ids_shuffle: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode, decode and compare.

        Args:
            imgs: (B, C, H, W), floating point and normalised, or uint8.
            mask_ratio: Fraction of patches removed, in (0, 1).
            ids_shuffle: (B, N), int64, order of the patches. Default: drawn from ``torch.rand``.

        Returns:
            The loss, a scalar; ``pred`` (B, N, p * p * C), every patch; ``mask`` (B, N), float32, 1
            where the patch is removed.

        Raises:
            ValueError: If the ratio leaves no visible or no masked patch.
        """
        num_keep(self.num_patches, mask_ratio)  # without a masked patch there is no loss
        latent, mask, ids_restore = self.forward_encoder(
            imgs, mask_ratio, **given(ids_shuffle=ids_shuffle)
        )
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    def forward_encoder(
        self, x: Tensor, mask_ratio: float, ids_shuffle: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latent of the visible patches.

        Args:
            x: Images (B, C, H, W).
            mask_ratio: Fraction of patches removed, in [0, 1); 0 encodes whole images.
            ids_shuffle: As in :meth:`forward`.

        Returns:
            Latent (B, K + 1, D), ``mask`` (B, N) and ``ids_restore`` (B, N).
        """
        # Masking the positions, not the tokens, tells which patches need embedding at all.
        positions = torch.arange(self.num_patches, device=x.device).expand(x.shape[0], -1)
        ids_keep, mask, ids_restore = self.random_masking(
            positions[..., None], mask_ratio, **given(ids_shuffle=ids_shuffle)
        )
        return self.encode_patches(x, ids_keep[..., 0]), mask, ids_restore

    def random_masking(
        self, x: Tensor, mask_ratio: float, ids_shuffle: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the tokens of smallest noise.

        Args:
            x: Tokens (B, N, D).
            mask_ratio: Fraction of tokens removed, in [0, 1).
            ids_shuffle: As in :meth:`forward`.

        Returns:
            Kept tokens (B, K, D) in shuffle order; ``mask`` (B, N), float32, 1 where removed;
            ``ids_restore`` (B, N).

        Raises:
            ValueError: If the ratio leaves no token.
        """
        b, n, _ = x.shape
        kept = n if mask_ratio == 0 else num_keep(n, mask_ratio)
        if ids_shuffle is None:
            ids_shuffle = torch.rand(b, n, device=x.device).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= kept).float()
        return gather_tokens(x, ids_shuffle[:, :kept]), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch from the latent of the visible ones.

        Args:
            x: Latent (B, K + 1, D).
            ids_restore: (B, N), int64, from :meth:`forward_encoder`.

        Returns:
            (B, N, p * p * C) in the order of the image, channel fastest within a patch.
        """
        masks = Masks(ids_restore.argsort(dim=1), ids_restore, x.shape[1] - 1)
        return super().forward_decoder(x, masks, full=True)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the removed patches: ``sum(mask * error) / sum(mask)``.

        Args:
            imgs: (B, C, H, W).
            pred: (B, N, p * p * C).
            mask: (B, N), 1 where the patch counts; rows may differ in their sums.
        """
        every = torch.arange(self.num_patches, device=imgs.device).expand(imgs.shape[0], -1)
        target = reference.patch_target(
            imgs,
            every,
            self.patch_size,
            self.norm_pix_loss,
            **self.patch_embed.pixel_normalization(imgs),
        )
        error = (pred - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def predict(
        self, imgs: Tensor, masks: Masks, *, full: bool = False, draws: Tensor | None = None
    ) -> Tensor:
        first, rest = self.split_draws(draws)
        latent = super().forward_encoder(imgs, masks, draws=first)
        return super().forward_decoder(latent, masks, full=full, draws=rest)

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, p * p * C), channel fastest."""
        return ops.patchify(imgs, self.patch_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p * p * C) to (B, C, H, W)."""
        return ops.unpatchify(x, self.patch_size, self.grid_size)


def given(**options: Tensor | None) -> dict[str, Tensor]:
    """The options that are not None: a subclass may override a method without taking them."""
    return {name: value for name, value in options.items() if value is not None}


mae_vit_base_patch16_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_base_patch16_dec512d8b")
mae_vit_large_patch16_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_large_patch16_dec512d8b")
mae_vit_huge_patch14_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_huge_patch14_dec512d8b")
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b
