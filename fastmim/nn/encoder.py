"""The ViT encoder: what pre-training is for, and what downstream tasks keep."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmim.nn.layers import Block, Blocks, Residual, add_norm
from fastmim.nn.patch_embed import PatchEmbed
from fastmim.nn.pos_embed import sincos_pos_embed
from fastmim.ops import Masks

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # MAE, RC-MAE, dBOT and SdAE all use this eps


class Features(NamedTuple):
    """Encoder output for whole images.

    Attributes:
        cls: (B, D), the cls token after the final norm.
        patch_tokens: (B, N, D), patches row-major, after the final norm.
    """

    cls: Tensor
    patch_tokens: Tensor


class Encoder(nn.Module):
    """ViT (arXiv:2010.11929) over any subset of the patches, with fixed sine-cosine positions.

    A subclass calls :meth:`initialize_weights` once all its parameters exist; for an encoder alone
    there is :meth:`fresh_encoder`.

    Args:
        img_size: Height and width in pixels, or one number for both.
        patch_size: p, side of a patch in pixels.
        in_chans: C, channels.
        embed_dim: D, width of a token.
        depth: Blocks.
        num_heads: Heads of each block.
        mlp_ratio: Hidden width of the MLP divided by D.
        norm_layer: Makes a normalisation for a width.
        drop_path: Stochastic depth of the last block, see :class:`fastmim.nn.Blocks`.
        memory: What blocks keep for the backward pass: standard, lean, recompute_mlp or checkpoint,
            see :class:`fastmim.nn.Block`.
        residual_dtype: Of the residual stream. Default: that of the tokens, float32 in training.
        pixel_mean: For uint8 images, see :class:`fastmim.nn.PatchEmbed`.
        pixel_std: Likewise.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        drop_path: float = 0.0,
        memory: str = "standard",
        residual_dtype: torch.dtype | None = None,
        pixel_mean: tuple[float, ...] | None = None,
        pixel_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self._options = dict(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            drop_path=drop_path,
            memory=memory,
            residual_dtype=residual_dtype,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(
            sincos_pos_embed(embed_dim, self.grid_size), requires_grad=False
        )
        self.blocks = Blocks(
            (Block(embed_dim, num_heads, mlp_ratio, norm_layer, memory) for _ in range(depth)),
            drop_path,
            residual_dtype,
        )
        self.norm = norm_layer(embed_dim)

    @property
    def embed_dim(self) -> int:
        """D, width of a token."""
        return self.patch_embed.proj.out_channels

    @property
    def num_patches(self) -> int:
        """N, patches per image."""
        return self.patch_embed.num_patches

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_embed.patch_size[0]

    @property
    def options(self) -> dict:
        """Arguments, as plain values, that make an encoder into which the weights of this fit."""
        names = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
        names += ("mlp_ratio", "pixel_mean", "pixel_std")
        return {name: self._options[name] for name in names}

    def initialize_weights(self) -> None:
        """MAE's initialisation; the bias of the patch embedding keeps the convolution's default."""
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_initialize_layer)

    @torch.no_grad()
    def initialize_as_timm(self) -> None:
        """A plain ViT's weights: truncated normal matrices and position table, biases 0."""
        self.initialize_weights()
        self.patch_embed.proj.reset_parameters()
        for tensor in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(tensor, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def fresh_encoder(self, **changes) -> "Encoder":
        """An encoder of this kind, without decoder, with initial weights, on the CPU.

        Args:
            **changes: Arguments of :class:`Encoder` that shall differ.
        """
        encoder = Encoder(**{**self._options, **changes})
        encoder.initialize_weights()
        return encoder

    def encode_patches(
        self,
        imgs: Tensor,
        ids: Tensor,
        *,
        folds: int = 1,
        draws: Tensor | None = None,
        final_norm: bool = True,
    ) -> Tensor:
        """Encode the patches ``ids``; each attends to those of its fold and to a cls token only.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            ids: (B, K), int64, patch positions row-major.
            folds: F, parts into which the K patches are cut, in their order; must divide K.
            draws: (B * F, blocks.num_draws), see :class:`fastmim.nn.Blocks`.
            final_norm: Normalise the output of the last block.

        Returns:
            (B * F, K / F + 1, D): cls token first, then the patches in the order of ``ids``; the
            folds of an image follow one another.
        """
        tokens = self.patch_embed(imgs, ids) + self.pos_embed[0, 1:][ids]
        tokens = tokens.reshape(folds * tokens.shape[0], -1, tokens.shape[2])
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        stream = self.blocks(Residual(torch.cat([cls_token, tokens], dim=1)), draws=draws)
        return add_norm(self.norm, stream)[0] if final_norm else stream.total()

    def encode_image(self, imgs: Tensor, *, final_norm: bool = True) -> Tensor:
        """Encode whole images: every patch is seen.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            final_norm: Normalise the output of the last block.

        Returns:
            (B, N + 1, D): cls token first, then the patches row-major.
        """
        every = torch.arange(self.num_patches, device=imgs.device).expand(imgs.shape[0], -1)
        return self.encode_patches(imgs, every, final_norm=final_norm)

    def forward_encoder(self, imgs: Tensor, masks: Masks, *, draws: Tensor | None = None) -> Tensor:
        """Latent of the visible patches (MAE, arXiv:2111.06377, sec. 3).

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
            masks: For B images of N patches.
            draws: (B, blocks.num_draws), see :class:`fastmim.nn.Blocks`.

        Returns:
            (B, K + 1, D), visible patches in shuffle order.

        Raises:
            ValueError: If the masks are not for B images of N patches.
        """
        expected = (imgs.shape[0], self.num_patches)
        if tuple(masks.ids_shuffle.shape) != expected:
            raise ValueError(
                f"forward_encoder: expected masks for {expected} (images, patches), got "
                f"{tuple(masks.ids_shuffle.shape)}"
            )
        return self.encode_patches(imgs, masks.ids_keep, draws=draws)

    def encode(self, imgs: Tensor) -> Features:
        """Features of whole images: every patch is seen, nothing is random.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised.
        """
        latent = self.encode_image(imgs)
        return Features(latent[:, 0], latent[:, 1:])


def _initialize_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.reset_parameters()
