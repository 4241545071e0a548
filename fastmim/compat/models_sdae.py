"""SdAE's ``MaskedAutoencoderViT``, its factories, and the teacher (arXiv:2208.00449)."""

from collections.abc import Callable

from torch import Tensor, nn

from fastmim.compat import models_mae
from fastmim.compat.factories import factory
from fastmim.compat.models_mae import given
from fastmim.nn import Encoder, MaskedAutoencoder
from fastmim.ops import Masks, num_keep


class MaskedAutoencoderViT(models_mae.MaskedAutoencoderViT):
    """The student; it has no loss of its own.

    Args:
        img_size, patch_size, in_chans: As MAE's, and so on up to ``norm_layer``.
        drop_path: Stochastic depth of the encoder's last block.
        norm_pix_loss: Taken and unused, as in the original.
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
        drop_path: float = 0.0,
        norm_pix_loss: bool = False,
    ) -> None:
        MaskedAutoencoder.__init__(
            self,
            target="features",
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
            drop_path=drop_path,
            norm_pix_loss=norm_pix_loss,
        )

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, *, ids_shuffle: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode and decode.

        Args:
            imgs: (B, C, H, W), floating point and normalised, or uint8.
            mask_ratio: Fraction of patches removed, in (0, 1).
            ids_shuffle: (B, N), int64, order of the patches. Default: drawn from ``torch.rand``.

        Returns:
            ``pred`` (B, N, D), every patch; ``mask`` (B, N), float32, 1 where the patch is removed;
            ``ids_unkeep`` (B, N - K), int64, the removed patches in shuffle order.

        Raises:
            ValueError: If the ratio leaves no visible or no masked patch.
        """
        kept = num_keep(self.num_patches, mask_ratio)
        latent, mask, ids_restore = self.forward_encoder(
            imgs, mask_ratio, **given(ids_shuffle=ids_shuffle)
        )
        pred = self.forward_decoder(latent, ids_restore)
        return pred, mask, Masks(ids_restore.argsort(dim=1), ids_restore, kept).ids_masked


class VisionTransformer(Encoder):
    """The teacher: a ViT without head, with random weights as timm draws them.

    Args:
        **kwargs: Arguments of :class:`fastmim.nn.Encoder`.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.initialize_as_timm()

    def forward(
        self,
        imgs: Tensor,
        ids_unkeep: Tensor,
        shrink_num: int | None = None,
        ncrop_loss: int | None = None,
    ) -> Tensor:
        """Tokens without cls token, not normalised per token.

        Args:
            imgs: (B, C, H, W), floating point and normalised, or uint8.
            ids_unkeep: (B, M), int64, masked patches, from the student.
            shrink_num: How many of these are seen, cut to a multiple of ``ncrop_loss``. Default:
                all patches of the image are seen, masked or not.
            ncrop_loss: Folds F into which they are cut. Default: 1.

        Returns:
            (B * F, S / F, D) of S patches; (B, N, D) without ``shrink_num``.
        """
        if shrink_num is None:
            return self.encode_image(imgs)[:, 1:]
        folds = ncrop_loss or 1
        seen = ids_unkeep[:, : shrink_num // folds * folds]
        return self.encode_patches(imgs, seen, folds=folds)[:, 1:]


mae_vit_small_patch16 = factory(MaskedAutoencoderViT, "mae_vit_small_patch16")
mae_vit_base_patch16_dec512d2b = factory(MaskedAutoencoderViT, "mae_vit_base_patch16_dec512d2b")
mae_vit_base_patch16_dec512d4b = factory(MaskedAutoencoderViT, "mae_vit_base_patch16_dec512d4b")
mae_vit_base_patch16_dec512d6b = factory(MaskedAutoencoderViT, "mae_vit_base_patch16_dec512d6b")
mae_vit_base_patch16_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_base_patch16_dec512d8b")
mae_vit_large_patch16_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_large_patch16_dec512d8b")
mae_vit_huge_patch14_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_huge_patch14_dec512d8b")
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b

vit_small_patch16, vit_base_patch16, vit_large_patch16, vit_huge_patch14 = (
    factory(
        VisionTransformer,
        f"vit_{size}",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        patch_size=int(size[-2:]),
    )
    for size, width, depth, heads in (
        ("small_patch16", 384, 12, 6),
        ("base_patch16", 768, 12, 12),
        ("large_patch16", 1024, 24, 16),
        ("huge_patch14", 1280, 32, 16),
    )
)
