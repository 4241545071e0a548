"""fastmim: masked image modelling for Vision Transformers, backed by kernels."""

from importlib.metadata import PackageNotFoundError, version

from fastmim.methods import MAE, METHODS, RCMAE
from fastmim.models import MODELS, create_model
from fastmim.ops import OPS, use_backend

try:
    __version__ = version("fastmim")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = ["MAE", "METHODS", "MODELS", "OPS", "RCMAE", "create_model", "use_backend"]
