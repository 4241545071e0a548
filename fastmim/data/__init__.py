"""Image sources, decoding, crops and the pre-training loader: tensors and files, no model."""

from fastmim.data.augment import Augmentation, augment, crop_box, eval_transform
from fastmim.data.decode import BadImage, decode_image
from fastmim.data.loader import Batch, PretrainLoader, StepSampler, TooManyBadImages, eval_batches
from fastmim.data.sources import DigitsSource, FolderSource, ParquetSource, Source, open_source

__all__ = [
    "Augmentation",
    "BadImage",
    "Batch",
    "DigitsSource",
    "FolderSource",
    "ParquetSource",
    "PretrainLoader",
    "Source",
    "StepSampler",
    "TooManyBadImages",
    "augment",
    "crop_box",
    "decode_image",
    "eval_batches",
    "eval_transform",
    "open_source",
]
