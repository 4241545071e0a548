"""Masked autoencoder: ViT encoder over the visible patches, small decoder over all of them."""

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.nn.encoder import LAYER_NORM, Encoder
from fastmim.nn.layers import Block, Blocks, Linear, Residual, add_norm
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
    """MAE's autoencoder (He et al., CVPR 2022, arXiv:2111.06377, sec. 3), for any target.

    Parameter names and shapes are those of the released checkpoints, of dBOT and SdAE too.

    Args:
        target: What is predicted. ``pixels`` of each patch; ``features`` of each patch, as SdAE
            does (arXiv:2208.00449); ``tokens``: features of the patches and of the cls token, by a
            head that is called ``decoder_predp``, as dBOT does (arXiv:2209.03917).
        target_dim: Width of the predicted features. Default: that of the encoder.
        decoder_embed_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder, at least 1.
        decoder_num_heads: Heads of each block of the decoder.
        norm_pix_loss: Normalise the pixels of each target patch.
        mlp_ratio: Hidden width of the MLPs divided by the width, in encoder and decoder.
        norm_layer: Makes a normalisation for a width, in encoder and decoder.
        decoder_drop_path: Stochastic depth of the decoder's last block, see
            :class:`fastmim.nn.Blocks`; ``drop_path`` is the encoder's.
        memory: As in :class:`fastmim.nn.Encoder`, of encoder and decoder.
        residual_dtype: Likewise.
        **encoder: Arguments of :class:`fastmim.nn.Encoder`.
    """

    def __init__(
        self,
        *,
        target: Literal["pixels", "features", "tokens"] = "pixels",
        target_dim: int | None = None,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        decoder_drop_path: float = 0.0,
        memory: str = "standard",
        residual_dtype: torch.dtype | None = None,
        **encoder,
    ) -> None:
        if decoder_depth < 1:
            raise ValueError(
                f"MaskedAutoencoder: expected decoder_depth of at least 1, got {decoder_depth}"
            )
        if target not in ("pixels", "features", "tokens"):
            raise ValueError(
                f"MaskedAutoencoder: expected target pixels, features or tokens, got '{target}'"
            )
        unknown = [n for n in encoder if n not in inspect.signature(Encoder).parameters]
        if unknown:
            raise TypeError(f"MaskedAutoencoder: unknown arguments {', '.join(unknown)}")
        super().__init__(
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            memory=memory,
            residual_dtype=residual_dtype,
            **encoder,
        )
        self._decoder_options = dict(
            target=target,
            target_dim=target_dim,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            norm_pix_loss=norm_pix_loss,
            decoder_drop_path=decoder_drop_path,
        )
        self.target = target
        self.norm_pix_loss = norm_pix_loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_pos_embed(decoder_embed_dim, self.grid_size), requires_grad=False
        )
        self.decoder_embed = Linear(self.embed_dim, decoder_embed_dim)
        self.decoder_blocks = Blocks(
            (
                Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer, memory)
                for _ in range(decoder_depth)
            ),
            decoder_drop_path,
            residual_dtype,
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        values = self.patch_size**2 * self.patch_embed.in_chans
        if target == "pixels" and norm_pix_loss and values < 2:
            raise ValueError(
                "MaskedAutoencoder: norm_pix_loss needs patches of at least two values; "
                f"got {self.patch_size} x {self.patch_size} x {self.patch_embed.in_chans}"
            )
        if target != "pixels":
            values = self.embed_dim if target_dim is None else target_dim
        head = Linear(decoder_embed_dim, values)
        setattr(self, "decoder_predp" if target == "tokens" else "decoder_pred", head)
        self.initialize_weights()

    @property
    def head(self) -> Linear:
        """The last layer, from the decoder's width to that of the target."""
        return self.decoder_predp if self.target == "tokens" else self.decoder_pred

    @property
    def num_draws(self) -> int:
        """Uniform numbers an image needs for stochastic depth, encoder first; 0 without it."""
        return self.blocks.num_draws + self.decoder_blocks.num_draws

    def fresh(self, **changes) -> "MaskedAutoencoder":
        """A network of this kind with initial weights, on the CPU.

        Args:
            **changes: Arguments of :class:`MaskedAutoencoder` that shall differ.
        """
        return MaskedAutoencoder(**{**self._options, **self._decoder_options, **changes})

    def resize_head(self, width: int) -> None:
        """Replace the last layer by one with initial weights for another number of features.

        Args:
            width: Features of the target.
        """
        old = self.head
        head = Linear(old.in_features, width).to(old.weight.device, old.weight.dtype)
        nn.init.xavier_uniform_(head.weight)
        nn.init.zeros_(head.bias)
        setattr(self, "decoder_predp" if self.target == "tokens" else "decoder_pred", head)
        self._decoder_options["target_dim"] = width

    def random_masks(self, batch_size: int, mask_ratio: float, device: torch.device) -> Masks:
        """Masks from torch's global generator, for loops that do not use ``sample_masks``.

        Args:
            batch_size: B.
            mask_ratio: Fraction of patches removed, in (0, 1).
            device: Where the masks shall be.
        """
        noise = torch.rand(batch_size, self.num_patches, device=device)
        return masks_from_noise(noise, num_keep(self.num_patches, mask_ratio))

    def forward_decoder(
        self, latent: Tensor, masks: Masks, *, full: bool = False, draws: Tensor | None = None
    ) -> Tensor:
        """Predict the target from the latent of the visible patches.

        Args:
            latent: (B, K + 1, D).
            masks: For B images of N patches.
            full: Predict every patch, not the masked ones only.
            draws: (B, decoder_blocks.num_draws), see :class:`fastmim.nn.Blocks`.

        Returns:
            (B, N - K, p * p * C) in the order of ``masks.ids_masked``; if ``full``,
            (B, N, p * p * C) in the order of the image. Channel fastest within a patch. Features
            are ``target_dim`` wide; of ``tokens``, that of the cls token stands before the others.
        """
        x = self.decoder_embed(latent)
        stream = Residual(restore_tokens(x, self.mask_token, masks, self.decoder_pos_embed))
        with_cls = self.target == "tokens"
        ids = None
        if not full:  # only what is predicted needs the last block's MLP
            ids = masks.ids_masked + 1
            ids = F.pad(ids, (1, 0)) if with_cls else ids  # the cls token is at position 0
        stream = self.decoder_blocks(stream, ids=ids, draws=draws)
        tokens = add_norm(self.decoder_norm, stream)[0]
        return self.head(tokens[:, 1:] if full and not with_cls else tokens)

    def predict(
        self, imgs: Tensor, masks: Masks, *, full: bool = False, draws: Tensor | None = None
    ) -> Tensor:
        """Encode the visible patches and decode: see :meth:`forward_decoder` for the result.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            masks: For B images of N patches.
            full: Predict every patch, not the masked ones only.
            draws: (B, num_draws), in [0, 1), for stochastic depth. Default: drawn from torch's
                global generator. Unused outside training mode.
        """
        first, rest = self.split_draws(draws)
        latent = self.forward_encoder(imgs, masks, draws=first)
        return self.forward_decoder(latent, masks, full=full, draws=rest)

    def split_draws(self, draws: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Those of the encoder and those of the decoder.

        Raises:
            ValueError: If they are not (B, num_draws).
        """
        if draws is None:
            return None, None
        if draws.ndim != 2 or draws.shape[1] != self.num_draws:
            raise ValueError(
                f"predict: expected draws (B, {self.num_draws}), got {tuple(draws.shape)}"
            )
        return draws[:, : self.blocks.num_draws], draws[:, self.blocks.num_draws :]

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

        Raises:
            ValueError: If this network predicts features.
        """
        if self.target != "pixels":
            raise ValueError(
                f"MaskedAutoencoder: this network predicts {self.target} of a teacher, not pixels; "
                "wrap it in fastmim.DBOT or fastmim.SdAE for a loss"
            )
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
