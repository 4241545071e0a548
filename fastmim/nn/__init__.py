"""Thin modules over the operators; parameter names exactly as in published checkpoints."""

from fastmim.nn.autoencoder import MaskedAutoencoder, Reconstruction
from fastmim.nn.encoder import Encoder, Features
from fastmim.nn.layers import Attention, Block, Blocks, Mlp
from fastmim.nn.patch_embed import PatchEmbed
from fastmim.nn.pos_embed import resize_pos_embed, sincos_pos_embed
from fastmim.nn.teacher import EMATeacher, FrozenTeacher

__all__ = [
    "Attention",
    "Block",
    "Blocks",
    "EMATeacher",
    "Encoder",
    "Features",
    "FrozenTeacher",
    "MaskedAutoencoder",
    "Mlp",
    "PatchEmbed",
    "Reconstruction",
    "resize_pos_embed",
    "sincos_pos_embed",
]
