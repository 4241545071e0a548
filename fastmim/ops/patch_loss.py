"""Reconstruction loss on the masked patches, plus the teacher's consistency term if any."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._limits import refuse_rows
from fastmim.ops._registry import Implementation, Native, Op
from fastmim.ops.gather import random_ids
from fastmim.ops.patches import FLOATS, check_ids, check_images, check_pixels, random_images
from fastmim.ops.scale import scale as scale_by


class PatchLoss(NamedTuple):
    """Terms of :func:`patch_loss`, each a scalar; only ``total`` carries a gradient."""

    total: Tensor
    pixel: Tensor
    consistency: Tensor


def patch_loss(
    pred: Tensor,
    imgs: Tensor,
    ids: Tensor,
    patch_size: int,
    *,
    norm_pix: bool,
    teacher_pred: Tensor | None = None,
    gamma: float = 1.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> PatchLoss:
    """``total = mean((pred - target)^2) + gamma * mean((pred - teacher_pred)^2)`` over the rows.

    MAE (arXiv:2111.06377, sec. 3): ``target`` are the pixels of the masked patches, normalised per
    patch with the unbiased variance and eps 1e-6 inside the root if ``norm_pix``. RC-MAE
    (arXiv:2210.02077, sec. 3) adds the distance to the teacher's prediction, un-normalised.

    The gradient of ``pred`` is made in the forward pass but for a factor, which the backward pass
    applies before it rounds to the dtype of ``pred``: it reads and writes the gradient once more.
    No target is kept.

    Args:
        pred: (B, M, p * p * C), floating point: predictions for ``ids``, channel fastest.
        imgs: (B, C, H, W), uint8 or floating point.
        ids: (B, M), int64, patch positions, usually ``masks.ids_masked``; values are not checked.
        patch_size: p, side of a patch in pixels.
        norm_pix: Normalise each target patch, which must hold at least two values.
        teacher_pred: (B, M, p * p * C) or None; gets no gradient.
        gamma: Weight of the consistency term.
        scale: (C,) factor per channel of ``imgs``, as in :func:`fastmim.ops.gather_patches`.
        shift: (C,) summand per channel.

    Returns:
        Scalars in float32 (float64 for float64). No rows give a loss of 0.

    Raises:
        ValueError: If the sizes do not fit.
    """
    check_images("patch_loss", imgs, patch_size)
    check_pixels("patch_loss", imgs, scale, shift)
    check_ids("patch_loss", ids, imgs)
    expected = (*ids.shape, imgs.shape[1] * patch_size * patch_size)
    for name, rows in (("pred", pred), ("teacher_pred", teacher_pred)):
        if rows is not None and tuple(rows.shape) != expected:
            raise ValueError(
                f"patch_loss: expected {name} {expected} for ids {tuple(ids.shape)} and images "
                f"{tuple(imgs.shape)}, got {tuple(rows.shape)}"
            )
    if norm_pix and expected[2] < 2:
        raise ValueError("patch_loss: a patch of a single value cannot be normalised")
    if teacher_pred is not None:
        teacher_pred = teacher_pred.detach()
    total, pixel, consistency, _ = _patch_loss(
        pred, imgs, ids, patch_size, norm_pix, teacher_pred, gamma, scale, shift
    )
    return PatchLoss(total, pixel, consistency)


def _native_patch_loss_accepts(pred, imgs, ids, p, norm_pix, teacher_pred, *rest) -> str | None:
    if pred.dtype not in FLOATS or (imgs.dtype != torch.uint8 and imgs.dtype not in FLOATS):
        return f"it takes no {pred.dtype} predictions for {imgs.dtype} images"
    if teacher_pred is not None and teacher_pred.dtype != pred.dtype:
        return f"it takes no {pred.dtype} pred beside a {teacher_pred.dtype} teacher_pred"
    return None


def _fake_patch_loss(pred, imgs, ids, patch_size, norm_pix, teacher_pred, gamma, scale, shift):
    double = torch.float64 in (pred.dtype, imgs.dtype)
    terms = [pred.new_empty((), dtype=torch.float64 if double else torch.float32) for _ in range(3)]
    return (*terms, pred.new_empty(pred.shape))


def _save_for_patch_loss(ctx, inputs, output):
    _, pixel, consistency, direction = output
    ctx.save_for_backward(direction)
    ctx.mark_non_differentiable(pixel, consistency, direction)
    ctx.set_materialize_grads(False)


def _patch_loss_backward(ctx, grad, *_):
    grad_pred = None
    if grad is not None:
        (direction,) = ctx.saved_tensors
        grad_pred = scale_by(direction, grad * (2 / max(direction.numel(), 1)))
    return (grad_pred, *(None,) * 8)


def _make(b, m, c, h, w, p, teacher, norm_pix, uint8, device, dtype):
    size = c * p * p
    return (
        torch.randn(b, m, size, device=device, dtype=dtype),
        random_images((b, c, h * p, w * p), uint8, device, dtype),
        random_ids(b, h * w, m, device),
        p,
        norm_pix,
        torch.randn(b, m, size, device=device, dtype=dtype) if teacher else None,
        0.5,
        torch.rand(c, device=device, dtype=torch.float64) + 0.5,
        torch.rand(c, device=device, dtype=torch.float64),
    )


def _shape(b, m, c, h, w, p, teacher=True, norm_pix=True, uint8=False):
    return dict(b=b, m=m, c=c, h=h, w=w, p=p, teacher=teacher, norm_pix=norm_pix, uint8=uint8)


def _triton_patch_loss_accepts(
    pred, imgs, ids, patch_size, norm_pix, teacher_pred, gamma, scale, shift
) -> str | None:
    pixels = None if imgs.dtype == torch.uint8 else imgs
    reason = refuse_rows(pred, pixels, teacher_pred, scale, shift)
    if reason is not None:
        return reason
    channel, row, column = imgs.stride()[1:]
    span = (imgs.shape[1] - 1) * channel + (patch_size - 1) * (row + column)
    if max(span, ids.numel()) >= 2**31:
        return "its kernel counts rows, and offsets within a patch, in 32 bits"
    return None


_patch_loss = Op(
    "patch_loss(Tensor pred, Tensor imgs, Tensor ids, int patch_size, bool norm_pix, "
    "Tensor? teacher_pred, float gamma, Tensor? scale, Tensor? shift) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_patch_loss,
    implementations={
        "reference": reference.patch_loss,
        "triton": Implementation(
            "fastmim.kernels.patch_loss:patch_loss", accepts=_triton_patch_loss_accepts
        ),
        "cpp": Implementation(Native("patch_loss"), accepts=_native_patch_loss_accepts),
    },
    shapes={
        "edge": _shape(2, 5, 3, 3, 4, 2),
        "edge_no_teacher": _shape(2, 5, 3, 3, 4, 2, teacher=False),
        "edge_pixels": _shape(1, 3, 1, 2, 2, 3, teacher=False, norm_pix=False),
        "edge_pixels_teacher": _shape(1, 3, 5, 2, 2, 2, norm_pix=False),
        "edge_bytes": _shape(2, 2, 3, 2, 2, 4, uint8=True),
        "edge_h14": _shape(1, 2, 3, 2, 2, 14, uint8=True),
        "edge_long_row": _shape(1, 1, 3, 1, 2, 32, teacher=False),
        "edge_empty": _shape(0, 2, 3, 2, 2, 2),
        "vit_b": _shape(256, 147, 3, 14, 14, 16),
        "vit_b_no_teacher": _shape(256, 147, 3, 14, 14, 16, teacher=False),
        "vit_b_uint8": _shape(256, 147, 3, 14, 14, 16, uint8=True),
        "vit_h14_uint8": _shape(256, 192, 3, 16, 16, 14, teacher=False, uint8=True),
        "patch_32": _shape(256, 37, 3, 7, 7, 32),
    },
    make=_make,
    setup_context=_save_for_patch_loss,
    backward=_patch_loss_backward,
)
