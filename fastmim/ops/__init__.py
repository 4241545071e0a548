"""Every operator of the library; one module per operator."""

from fastmim.ops._registry import OPS, use_backend
from fastmim.ops.attention import attention
from fastmim.ops.gather import gather_tokens, scatter_tokens
from fastmim.ops.masking import Masks, masks_from_noise, masks_from_shuffle, num_keep, sample_masks
from fastmim.ops.optim import adamw_ema_, ema_update_, join_storage, split_storage
from fastmim.ops.patch_loss import PatchLoss, patch_loss
from fastmim.ops.patches import gather_patches, patchify, unpatchify
from fastmim.ops.restore import restore_tokens

__all__ = [
    "OPS",
    "Masks",
    "PatchLoss",
    "adamw_ema_",
    "attention",
    "ema_update_",
    "gather_patches",
    "gather_tokens",
    "join_storage",
    "masks_from_noise",
    "masks_from_shuffle",
    "num_keep",
    "patch_loss",
    "patchify",
    "restore_tokens",
    "sample_masks",
    "scatter_tokens",
    "split_storage",
    "unpatchify",
    "use_backend",
]
