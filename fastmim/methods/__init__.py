"""Pre-training methods, one paper per file."""

from fastmim.methods.base import Losses, Method, cosine_momentum
from fastmim.methods.mae import MAE
from fastmim.methods.rc_mae import RCMAE

METHODS: dict[str, type[Method]] = {"mae": MAE, "rc_mae": RCMAE}

__all__ = ["MAE", "METHODS", "RCMAE", "Losses", "Method", "cosine_momentum"]
