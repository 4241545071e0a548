"""dBOT's ``MaskedAutoencoderViT`` and its factories (arXiv:2209.03917)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.compat import models_mae
from fastmim.compat.factories import factory
from fastmim.compat.models_mae import given
from fastmim.nn import Encoder, MaskedAutoencoder
from fastmim.ops import num_keep, reference


class MaskedAutoencoderViT(models_mae.MaskedAutoencoderViT):
    """Student, or teacher if ``decoder_depth`` is 0: then there is an encoder only.

    The helper methods take and return what MAE's do; predictions and masks include the cls token.

    Args:
        img_size, patch_size, in_chans: As MAE's, and so on up to ``norm_layer``.
        norm_feature_loss: Normalise the teacher's features of each token.
        drop_path_rate: Stochastic depth of the last block, of encoder and decoder.
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
        norm_feature_loss: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        encoder = dict(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            drop_path=drop_path_rate,
        )
        if decoder_depth:
            MaskedAutoencoder.__init__(
                self,
                target="tokens",
                decoder_embed_dim=decoder_embed_dim,
                decoder_depth=decoder_depth,
                decoder_num_heads=decoder_num_heads,
                decoder_drop_path=drop_path_rate,
                **encoder,
            )
        else:
            Encoder.__init__(self, **encoder)
            self.initialize_weights()
        self.norm_feature_loss = norm_feature_loss

    def forward(
        self,
        samples: Tensor,
        teacher: nn.Module,
        mask_ratio: float = 0.75,
        tlayernorm: int = 0,
        *,
        ids_shuffle: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode, decode and compare with the teacher's features of the whole images.

        Args:
            samples: Images (B, C, H, W), floating point and normalised, or uint8.
            teacher: A model of this module, or one wrapped in another that has it as ``module``.
            mask_ratio: Fraction of patches removed, in (0, 1).
            tlayernorm: 1: features after the teacher's final norm.
            ids_shuffle: (B, N), int64, order of the patches. Default: drawn from ``torch.rand``.

        Returns:
            The loss, a scalar; ``pred`` (B, N + 1, D); ``mask`` (B, N + 1), float32, 1 where the
            patch is removed and for the cls token.

        Raises:
            ValueError: If the ratio leaves no visible or no masked patch.
        """
        num_keep(self.num_patches, mask_ratio)
        with torch.no_grad():
            encoder = getattr(teacher, "module", teacher)
            target = encoder.encode_image(samples, final_norm=bool(tlayernorm))
        latent, mask, ids_restore = self.forward_encoder(
            samples, mask_ratio, **given(ids_shuffle=ids_shuffle)
        )
        pred = self.forward_decoder(latent, ids_restore)
        mask = F.pad(mask, (1, 0), value=1.0)
        return self.forward_loss(target, pred, mask), pred, mask

    def forward_loss(self, target: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Smooth L1 (beta 2) of the tokens that count: ``sum(mask * error) / sum(mask)``.

        Args:
            target: (B, N + 1, D), features of the teacher.
            pred: (B, N + 1, D).
            mask: (B, N + 1), 1 where the token counts; rows may differ in their sums.
        """
        target = reference.feature_target(target, None, self.norm_feature_loss, None, None)
        error = F.smooth_l1_loss(pred.to(target.dtype), target, beta=2.0, reduction="none")
        return (error.mean(dim=-1) * mask).sum() / mask.sum()


mae_vit_base_patch16_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_base_patch16_dec512d8b")
mae_vit_large_patch16_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_large_patch16_dec512d8b")
mae_vit_huge_patch14_dec512d8b = factory(MaskedAutoencoderViT, "mae_vit_huge_patch14_dec512d8b")
mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b
