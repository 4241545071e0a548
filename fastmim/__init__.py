"""fastmim: masked image modelling for Vision Transformers, backed by kernels.

Names are imported when they are first used, so ``import fastmim`` alone does not import torch.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

_HOMES = {
    "DBOT": "fastmim.methods",
    "MAE": "fastmim.methods",
    "METHODS": "fastmim.methods",
    "MODELS": "fastmim.models",
    "OPS": "fastmim.ops",
    "RCMAE": "fastmim.methods",
    "SdAE": "fastmim.methods",
    "create_model": "fastmim.models",
    "use_backend": "fastmim.ops",
}
_MODULES = {"compat", "data", "eval", "info", "interop", "methods", "models", "nn", "ops", "train"}
__all__ = sorted(_HOMES)

try:
    __version__ = version("fastmim")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastmim.{name}")
    raise AttributeError(f"module 'fastmim' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
