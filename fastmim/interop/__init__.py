"""Checkpoints of the authors, of timm and of Hugging Face, in and out."""

from fastmim.interop.choose import Choice
from fastmim.interop.convert import convert
from fastmim.interop.describe import Description
from fastmim.interop.load import load_into, load_weights

__all__ = ["Choice", "Description", "convert", "load_into", "load_weights"]
