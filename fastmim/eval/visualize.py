"""Reconstruction pictures that undo norm_pix correctly and say what they borrow from the original.

With norm_pix a model predicts each patch less its mean and divided by its standard deviation. Mean
and deviation are not predicted: a picture takes them from the original, which leaks brightness and
contrast of the hidden patches. The caption of :func:`reconstruction_picture` says so.
"""

import math
from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmim.eval.features import evaluation_mode
from fastmim.nn import MaskedAutoencoder
from fastmim.ops import Masks, gather_tokens, patchify, scatter_tokens, unpatchify

LEAK = "patch mean and contrast are taken from the original: norm_pix predicts neither"

_HIDDEN = 128  # grey level of masked patches
_GAP = 8  # pixels between pictures
_FONT_SIZE = 14
_SMALLEST = 128  # pixels; the shorter side of an image is shown at least this long


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder, imgs: Tensor, masks: Masks, *, pred: Tensor | None = None
) -> Tensor:
    """Images with the masked patches replaced by the model's prediction.

    ``x = (pred * sqrt(var + 1e-6) + mean - shift) / scale``: undoes norm_pix (MAE,
    arXiv:2111.06377, sec. 3) with the statistics of the true patch, then the pixel normalisation.
    Visible patches are the original ones.

    Args:
        model: Tells patch size, ``norm_pix_loss`` and pixel normalisation, and predicts.
        imgs: (B, C, H, W), uint8.
        masks: For B images of N patches.
        pred: (B, N - K, p * p * C) in the order of ``masks.ids_masked``. Default: the model's.

    Returns:
        (B, C, H, W), uint8, on the CPU. Predictions that are not a number are black.

    Raises:
        ValueError: If the images are not uint8, or do not fit the model or the masks.
    """
    _check(imgs, masks, model)
    if pred is None:
        device = next(model.parameters()).device
        with evaluation_mode(model):
            pred = model.predict(imgs.to(device), _on(device, masks))
    normalization = model.patch_embed.pixel_normalization(imgs)
    # Float64 on the CPU: exact enough that a perfect prediction gives back the original.
    scale, shift = (values.cpu().double() for values in normalization.values())
    imgs, masks, pred = imgs.cpu(), _on(torch.device("cpu"), masks), pred.cpu().double()
    original = patchify(imgs, model.patch_size).double()  # (B, N, p * p * C), channel fastest
    per_value = model.patch_size**2
    scale, shift = scale.repeat(per_value), shift.repeat(per_value)
    if model.norm_pix_loss:
        true = gather_tokens(original, masks.ids_masked) * scale + shift
        variance, mean = torch.var_mean(true, dim=-1, keepdim=True)  # unbiased
        pred = pred * (variance + 1e-6).sqrt() + mean
    levels = ((pred - shift) / scale).nan_to_num(0.0).round().clamp(0, 255)
    hidden = masks.mask[:, :, None]
    patches = torch.where(
        hidden, scatter_tokens(levels, masks.ids_masked, model.num_patches), original
    )
    return unpatchify(patches, model.patch_size, model.grid_size).to(torch.uint8)


def reconstruction_picture(
    imgs: Tensor,
    masks: Masks,
    predictions: Mapping[str, MaskedAutoencoder],
    *,
    scale: int | None = None,
) -> Image.Image:
    """One row per image: original, masked, and what :func:`reconstruct` makes of each model.

    Visible patches are pasted as they are. If a model was trained with norm_pix, a caption says
    what is taken from the original.

    Args:
        imgs: (B, C, H, W), uint8, B at least 1. Of more than three channels the first three are
            shown as red, green and blue; of two the first one, grey.
        masks: For B images of N patches.
        predictions: Column title to model, such as ``{"student": ..., "teacher": ...}``.
        scale: Pixels shown for a pixel. Default: as many as make the shorter side 128 pixels.

    Raises:
        ValueError: If there are no images or no models, ``scale`` is less than 1, or the images
            are not uint8 or do not fit a model or the masks.
    """
    if not len(imgs) or not predictions:
        raise ValueError(
            f"reconstruction_picture: expected images and models, got {len(imgs)} and "
            f"{len(predictions)}"
        )
    first = next(iter(predictions.values()))
    _check(imgs, masks, first)
    if scale is None:
        scale = math.ceil(_SMALLEST / min(imgs.shape[2:]))
    if scale < 1:
        raise ValueError(f"reconstruction_picture: expected scale of at least 1, got {scale}")
    columns = {"original": imgs.cpu(), "masked": _hide(imgs.cpu(), masks, first)}
    for title, model in predictions.items():
        columns[title] = reconstruct(model, imgs, masks)
    borrowed = [title for title, model in predictions.items() if model.norm_pix_loss]
    caption = LEAK if borrowed else ""
    if 0 < len(borrowed) < len(predictions):
        caption = f"{LEAK} ({', '.join(borrowed)})"
    return _grid(columns, caption, scale)


def _check(imgs: Tensor, masks: Masks, model: MaskedAutoencoder) -> None:
    if imgs.dtype != torch.uint8:
        raise ValueError(f"reconstruct: expected uint8 images, got {imgs.dtype}")
    model.patch_embed.pixel_normalization(imgs)  # refuses what does not fit the model
    expected = (len(imgs), model.num_patches)
    if tuple(masks.ids_shuffle.shape) != expected:
        raise ValueError(
            f"reconstruct: expected masks of {expected} (images, patches), got "
            f"{tuple(masks.ids_shuffle.shape)}; draw them for this model and batch"
        )


def _on(device: torch.device, masks: Masks) -> Masks:
    return Masks(masks.ids_shuffle.to(device), masks.ids_restore.to(device), masks.num_keep)


def _hide(imgs: Tensor, masks: Masks, model: MaskedAutoencoder) -> Tensor:
    """Images with the masked patches in grey."""
    hidden = masks.mask.cpu()[:, :, None]
    patches = patchify(imgs, model.patch_size).masked_fill(hidden, _HIDDEN)
    return unpatchify(patches, model.patch_size, model.grid_size)


def _grid(columns: Mapping[str, Tensor], caption: str, scale: int) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    line = round(1.5 * _FONT_SIZE)
    count, _, height, width = columns["original"].shape
    height, width = height * scale, width * scale
    pitch = _GAP + max(width, *(math.ceil(font.getlength(title)) for title in columns))
    total = _GAP + pitch * len(columns)
    text = _wrap(caption, font, total - 2 * _GAP)
    top = _GAP + line
    bottom = top + count * (height + _GAP)
    picture = Image.new("RGB", (total, bottom + line * len(text)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, imgs) in enumerate(columns.items()):
        left = _GAP + i * pitch
        middle = left + (pitch - _GAP) / 2
        draw.text((middle, _GAP + line / 2), title, fill="black", font=font, anchor="mm")
        for row, img in enumerate(imgs):
            tile = _to_pillow(img).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (round(middle - width / 2), top + row * (height + _GAP)))
    for row, words in enumerate(text):
        middle = bottom + line * row + line / 2 - _GAP / 2
        draw.text((_GAP, middle), words, fill=(96, 96, 96), font=font, anchor="lm")
    return picture


def _to_pillow(img: Tensor) -> Image.Image:
    shown = img[:3] if img.shape[0] >= 3 else img[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines no wider than ``width`` pixels, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
