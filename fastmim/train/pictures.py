"""loss.png and reconstruction.png of a run."""

from collections.abc import Callable
from pathlib import Path

import torch

from fastmim.data import Source, eval_batches
from fastmim.eval import line_chart, reconstruction_picture
from fastmim.methods import Method
from fastmim.ops import num_keep, sample_masks
from fastmim.train.build import networks
from fastmim.train.log import read_metrics


def write_loss_chart(folder: Path) -> Path:
    """loss.png from metrics.jsonl: every loss term against the step."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    names = [n for n in ("loss", "pixel", "consistency", "feature") if lines and n in lines[-1]]
    series = {
        name: (
            [line["step"] for line in lines],
            [float("nan") if line[name] is None else line[name] for line in lines],
        )
        for name in names
    }
    path = folder / "loss.png"
    line_chart(series, title=folder.name, x_label="optimizer step", y_label="loss").save(path)
    return path


def write_reconstructions(
    path: Path,
    method: Method,
    source: Source,
    *,
    count: int,
    mask_ratio: float,
    seed: int,
    crop_ratio: float,
    on_bad: Callable[[str, str], None] | None = None,
) -> Path:
    """Picture of some images: original, masked, student and teacher.

    Args:
        path: Where to write.
        method: Student and perhaps a teacher.
        source: The images.
        count: How many, evenly spaced over the source.
        mask_ratio: Fraction of patches removed.
        seed: Of the masks.
        crop_ratio: Crop size divided by the size to which the short side is resized.
        on_bad: Called with name and reason of each image that cannot be read and is left out.

    Raises:
        ValueError: If the method predicts no pixels, the images have other channels than the
            network, or none can be read.
    """
    student = method.student
    if method.target != "pixels":
        raise ValueError(
            f"write_reconstructions: {type(method).__name__} predicts {method.target} of a "
            "teacher, not pixels; there is no picture of these"
        )
    if source.channels != student.patch_embed.in_chans:
        raise ValueError(
            f"write_reconstructions: the images have {source.channels} channels, the network takes "
            f"{student.patch_embed.in_chans}"
        )
    batches = eval_batches(
        source,
        image_size=student.patch_embed.img_size,
        batch_size=count,
        crop_ratio=crop_ratio,
        limit=count,
        on_bad=on_bad,
    )
    found = next(batches, None)
    if found is None:
        raise ValueError(f"write_reconstructions: {count} images tried, none of them can be read")
    imgs, _, indices = found
    kept = num_keep(student.num_patches, mask_ratio)
    masks = sample_masks(seed, 0, indices, student.num_patches, kept)
    with torch.inference_mode():
        picture = reconstruction_picture(imgs, masks, networks(method))
    picture.save(path)
    return path
