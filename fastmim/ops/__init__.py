"""Every operator of the library; one module per operator."""

from fastmim.ops._registry import OPS, use_backend
from fastmim.ops.attention import attention, attention_queries
from fastmim.ops.attention_varlen import attention_varlen
from fastmim.ops.augment import augment
from fastmim.ops.feature_loss import feature_loss
from fastmim.ops.gather import gather_tokens, scatter_tokens
from fastmim.ops.linear import linear
from fastmim.ops.masking import (
    Masks,
    masks_from_noise,
    masks_from_shuffle,
    num_keep,
    sample_masks,
    sample_uniforms,
)
from fastmim.ops.mlp import bias_gelu, bias_gelu_linear
from fastmim.ops.norm import Normalized, norm, norm_linear
from fastmim.ops.optim import adamw_ema_, ema_update_, join_storage, split_storage
from fastmim.ops.patch_loss import PatchLoss, patch_loss
from fastmim.ops.patches import gather_patches, patchify, unpatchify
from fastmim.ops.restore import restore_tokens

__all__ = [
    "OPS",
    "Masks",
    "Normalized",
    "PatchLoss",
    "adamw_ema_",
    "attention",
    "attention_queries",
    "attention_varlen",
    "augment",
    "bias_gelu",
    "bias_gelu_linear",
    "ema_update_",
    "feature_loss",
    "gather_patches",
    "gather_tokens",
    "join_storage",
    "linear",
    "masks_from_noise",
    "masks_from_shuffle",
    "norm",
    "norm_linear",
    "num_keep",
    "patch_loss",
    "patchify",
    "restore_tokens",
    "sample_masks",
    "sample_uniforms",
    "scatter_tokens",
    "split_storage",
    "unpatchify",
    "use_backend",
]
