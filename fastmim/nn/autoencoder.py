"""Masked autoencoder: ViT encoder over the visible patches, small decoder over all of them."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmim.nn.encoder import LAYER_NORM, Encoder
from fastmim.nn.layers import Block, Linear, Residual, add_norm
from fastmim.nn.pos_embed import sincos_pos_embed
from fastmim.ops import (
    Masks,
    gather_tokens,
    masks_from_noise,
    num_keep,
    patch_loss,
    restore_tokens,
)
from fastmim.ops.patch_loss import PatchLoss


class Reconstruction(NamedTuple):
    """Result of :class:`MaskedAutoencoder`.

    Attributes:
        loss: Scalar, mean squared error over the masked patches.
        pred: (B, N - K, p * p * C), predictions in the order of ``masks.ids_masked``; or
            (B, N, p * p * C) in the order of the image, if the full prediction was asked for.
        mask: (B, N), bool, True where the patch is masked.
        ids_keep: (B, K), int64, visible patches.
        masks: The masks used.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_keep: Tensor
    masks: Masks


class MaskedAutoencoder(Encoder):
    """MAE's autoencoder (He et al., CVPR 2022, arXiv:2111.06377, sec. 3).

    Parameter names, shapes and order are those of the released checkpoints.

    Args:
        decoder_embed_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder, at least 1.
        decoder_num_heads: Heads of each block of the decoder.
        norm_pix_loss: Normalise the pixels of each target patch.
        mlp_ratio: Hidden width of the MLPs divided by the width, in encoder and decoder.
        norm_layer: Makes a normalisation for a width, in encoder and decoder.
        **encoder: Arguments of :class:`fastmim.nn.Encoder`.
    """

    def __init__(
        self,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        **encoder,
    ) -> None:
        if decoder_depth < 1:
            raise ValueError(
                f"MaskedAutoencoder: expected decoder_depth of at least 1, got {decoder_depth}"
            )
        unknown = [n for n in encoder if n not in inspect.signature(Encoder).parameters]
        if unknown:
            raise TypeError(f"MaskedAutoencoder: unknown arguments {', '.join(unknown)}")
        super().__init__(mlp_ratio=mlp_ratio, norm_layer=norm_layer, **encoder)
        self.norm_pix_loss = norm_pix_loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_pos_embed(decoder_embed_dim, self.grid_size), requires_grad=False
        )
        self.decoder_embed = Linear(self.norm.weight.shape[0], decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        values = self.patch_size**2 * self.patch_embed.in_chans
        if norm_pix_loss and values < 2:
            raise ValueError(
                "MaskedAutoencoder: norm_pix_loss needs patches of at least two values; "
                f"got {self.patch_size} x {self.patch_size} x {self.patch_embed.in_chans}"
            )
        self.decoder_pred = Linear(decoder_embed_dim, values)
        self.initialize_weights()

    def random_masks(self, batch_size: int, mask_ratio: float, device: torch.device) -> Masks:
        """Masks from torch's global generator, for loops that do not use ``sample_masks``.

        Args:
            batch_size: B.
            mask_ratio: Fraction of patches removed, in (0, 1).
            device: Where the masks shall be.
        """
        noise = torch.rand(batch_size, self.num_patches, device=device)
        return masks_from_noise(noise, num_keep(self.num_patches, mask_ratio))

    def forward_decoder(self, latent: Tensor, masks: Masks, *, full: bool = False) -> Tensor:
        """Predict pixels from the latent of the visible patches.

        Args:
            latent: (B, K + 1, D).
            masks: For B images of N patches.
            full: Predict every patch, not the masked ones only.

        Returns:
            (B, N - K, p * p * C) in the order of ``masks.ids_masked``; if ``full``,
            (B, N, p * p * C) in the order of the image. Channel fastest within a patch.
        """
        x = self.decoder_embed(latent)
        stream = Residual(restore_tokens(x, self.mask_token, masks, self.decoder_pos_embed))
        *blocks, last = self.decoder_blocks
        for block in blocks:
            stream = block(stream)
        # Only masked tokens are predicted, so only these need the last block's MLP.
        stream = last(stream, None if full else masks.ids_masked + 1)
        tokens = add_norm(self.decoder_norm, stream)[0]
        return self.decoder_pred(tokens[:, 1:] if full else tokens)

    def predict(self, imgs: Tensor, masks: Masks, *, full: bool = False) -> Tensor:
        """Encode the visible patches and decode: see :meth:`forward_decoder` for the result.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            masks: For B images of N patches.
            full: Predict every patch, not the masked ones only.
        """
        return self.forward_decoder(self.forward_encoder(imgs, masks), masks, full=full)

    def loss(
        self,
        pred: Tensor,
        imgs: Tensor,
        masks: Masks,
        *,
        teacher_pred: Tensor | None = None,
        gamma: float = 1.0,
    ) -> PatchLoss:
        """Loss of the masked patches' predictions, see :func:`fastmim.ops.patch_loss`.

        Args:
            pred: (B, N - K, p * p * C) in the order of ``masks.ids_masked``.
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            masks: For B images of N patches.
            teacher_pred: Like ``pred``, or None.
            gamma: Weight of the distance to ``teacher_pred``.
        """
        return patch_loss(
            pred,
            imgs,
            masks.ids_masked,
            self.patch_size,
            norm_pix=self.norm_pix_loss,
            teacher_pred=teacher_pred,
            gamma=gamma,
            **self.patch_embed.pixel_normalization(imgs),
        )

    def forward(
        self,
        imgs: Tensor,
        masks: Masks | None = None,
        *,
        mask_ratio: float = 0.75,
        return_full_pred: bool = False,
    ) -> Reconstruction:
        """Mask, encode, decode and compare.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            masks: For B images of N patches. Default: random ones of ``mask_ratio``.
            mask_ratio: Fraction of patches removed if no masks are given.
            return_full_pred: Predict every patch, for pictures; costs the head on all N.
        """
        if masks is None:
            masks = self.random_masks(imgs.shape[0], mask_ratio, imgs.device)
        pred = self.predict(imgs, masks, full=return_full_pred)
        masked = gather_tokens(pred, masks.ids_masked) if return_full_pred else pred
        loss = self.loss(masked, imgs, masks).total
        return Reconstruction(loss, pred, masks.mask, masks.ids_keep, masks)
