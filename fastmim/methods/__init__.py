"""Pre-training methods, one paper per file."""

from fastmim.methods.base import Clock, Losses, Method, cosine_momentum, seeded
from fastmim.methods.dbot import DBOT
from fastmim.methods.mae import MAE
from fastmim.methods.rc_mae import RCMAE
from fastmim.methods.sdae import SdAE

METHODS: dict[str, type[Method]] = {"mae": MAE, "rc_mae": RCMAE, "dbot": DBOT, "sdae": SdAE}

__all__ = [
    "DBOT",
    "MAE",
    "METHODS",
    "RCMAE",
    "Clock",
    "Losses",
    "Method",
    "SdAE",
    "cosine_momentum",
    "seeded",
]
