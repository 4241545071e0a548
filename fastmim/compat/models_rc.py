"""RC-MAE's ``models_rc``: ``MaskedAutoencoderViT`` and its factories (arXiv:2210.02077)."""

from collections.abc import Callable

from torch import Tensor, nn

from fastmim.compat import models_mae
from fastmim.compat.factories import factory
from fastmim.compat.models_mae import given
from fastmim.ops import num_keep


class MaskedAutoencoderViT(models_mae.MaskedAutoencoderViT):
    """MAE's class, which can be given its masks and can leave out the loss.

    The helper methods return what MAE's return; ``ids_shuffle`` comes from :meth:`forward`.

    Args:
        img_size, patch_size, in_chans: As MAE's, and so on up to ``norm_pix_loss``.
        compute_loss: True for a student; False for a teacher, whose forward returns ``pred`` only.
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
        compute_loss: bool = True,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            mlp_ratio,
            norm_layer,
            norm_pix_loss,
        )
        self.compute_loss = compute_loss

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, ids_shuffle: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mask, encode, decode and, for a student, compare.

        Args:
            imgs: (B, C, H, W), floating point and normalised, or uint8.
            mask_ratio: Fraction of patches removed, in (0, 1); without a loss 0 is allowed.
            ids_shuffle: (B, N), int64, order of the patches, to give a teacher the student's masks.
                Default: drawn from ``torch.rand``.

        Returns:
            ``pred`` (B, N, p * p * C) if ``compute_loss`` is False. Otherwise the loss, a scalar;
            ``pred``; ``mask`` (B, N), float32, 1 where the patch is removed; ``ids_shuffle``.

        Raises:
            ValueError: If the ratio leaves no visible patch, or no masked one for the loss.
        """
        if self.compute_loss:
            num_keep(self.num_patches, mask_ratio)
        latent, mask, ids_restore = self.forward_encoder(
            imgs, mask_ratio, **given(ids_shuffle=ids_shuffle)
        )
        pred = self.forward_decoder(latent, ids_restore)
        if not self.compute_loss:
            return pred
        loss = self.forward_loss(imgs, pred, mask)
        return loss, pred, mask, ids_restore.argsort(dim=1)


rc_vit_tiny_patch16_dec128d2b = factory(MaskedAutoencoderViT, "rc_vit_tiny_patch16_dec128d2b")
rc_vit_small_patch16_dec256d4b = factory(MaskedAutoencoderViT, "rc_vit_small_patch16_dec256d4b")
rc_vit_small_patch16_dec512d8b = factory(MaskedAutoencoderViT, "rc_vit_small_patch16_dec512d8b")
rc_vit_base_patch16_dec512d8b = factory(MaskedAutoencoderViT, "rc_vit_base_patch16_dec512d8b")
rc_vit_large_patch16_dec512d8b = factory(MaskedAutoencoderViT, "rc_vit_large_patch16_dec512d8b")
rc_vit_huge_patch14_dec512d8b = factory(MaskedAutoencoderViT, "rc_vit_huge_patch14_dec512d8b")
rc_vit_tiny_patch16 = rc_vit_tiny_patch16_dec128d2b
rc_vit_small_patch16 = rc_vit_small_patch16_dec256d4b
rc_vit_base_patch16 = rc_vit_base_patch16_dec512d8b
rc_vit_large_patch16 = rc_vit_large_patch16_dec512d8b
rc_vit_huge_patch14 = rc_vit_huge_patch14_dec512d8b
