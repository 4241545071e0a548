"""Images to rows of patches: only the visible ones, ready for the embedding matrix."""

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._limits import refuse_types
from fastmim.ops._registry import Implementation, Native, Op
from fastmim.ops.gather import random_ids, scatter_tokens


def check_images(function: str, imgs: Tensor, patch_size: int) -> None:
    """Refuse what cannot be cut into square patches.

    Raises:
        ValueError: If ``patch_size`` is not positive, or ``imgs`` not (B, C, H, W) with H and W
            multiples of it.
    """
    if patch_size < 1:
        raise ValueError(f"{function}: expected a patch size of at least 1, got {patch_size}")
    if imgs.ndim != 4 or imgs.shape[2] % patch_size or imgs.shape[3] % patch_size:
        raise ValueError(
            f"{function}: expected images (B, C, H, W) with H and W divisible by the patch size "
            f"{patch_size}, got {tuple(imgs.shape)}"
        )


def check_pixels(function: str, imgs: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    """Refuse pixels that are neither uint8 nor floating point, and a misshapen normalisation.

    Raises:
        ValueError: On either.
    """
    if imgs.dtype != torch.uint8 and not imgs.is_floating_point():
        raise ValueError(f"{function}: expected uint8 or floating-point images, got {imgs.dtype}")
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None and value.shape != (imgs.shape[1],):
            raise ValueError(
                f"{function}: expected {name} (C,) for {imgs.shape[1]} channels, "
                f"got {tuple(value.shape)}"
            )


def check_ids(function: str, ids: Tensor, imgs: Tensor) -> None:
    """Refuse positions that are not one row of int64 per image.

    Raises:
        ValueError: If so.
    """
    if ids.ndim != 2 or ids.shape[0] != imgs.shape[0] or ids.dtype != torch.int64:
        raise ValueError(
            f"{function}: expected ids (B, K) of int64 for {imgs.shape[0]} images, "
            f"got {tuple(ids.shape)} of {ids.dtype}"
        )


def gather_patches(
    imgs: Tensor,
    ids: Tensor,
    patch_size: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cut out the patches named by ``ids``, as rows of the patch-embedding product.

    ``out[b, k] = flatten(scale * imgs[b, :, patch ids[b, k]] + shift)``, channel by channel.
    MAE (arXiv:2111.06377, sec. 3) embeds visible patches only; cutting first saves the embedding of
    the others. Values stand in the order of the embedding weight: (channel, row, column).

    Args:
        imgs: (B, C, H, W), uint8 or floating point; H and W multiples of ``patch_size``.
        ids: (B, K), int64, patch positions row-major in [0, H * W / patch_size**2); values are not
            checked.
        patch_size: p, side of a patch in pixels.
        scale: (C,) factor per channel; with uint8 images usually ``1 / (255 * std)``.
        shift: (C,) summand per channel; with uint8 images usually ``-mean / std``.
        dtype: Floating-point type of the result. Default: that of ``imgs``, float32 for uint8.

    Returns:
        (B, K, C * p * p), contiguous. The arithmetic is done in float32 (float64 for float64).

    Raises:
        ValueError: If the sizes do not fit or ``imgs`` holds integers other than uint8.
    """
    check_images("gather_patches", imgs, patch_size)
    check_pixels("gather_patches", imgs, scale, shift)
    check_ids("gather_patches", ids, imgs)
    if dtype is None:
        dtype = imgs.dtype if imgs.is_floating_point() else torch.float32
    return _gather_patches(imgs, ids, patch_size, scale, shift, dtype)


def random_images(shape: tuple[int, ...], uint8: bool, device, dtype: torch.dtype) -> Tensor:
    """Images of ``dtype``, or of bytes, for the ``make`` of operators."""
    if uint8:
        return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    return torch.randn(shape, device=device, dtype=dtype)


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) to (B, N, p * p * C), patches row-major, channel fastest within a patch.

    Args:
        imgs: (B, C, H, W), any dtype; H and W multiples of ``patch_size``.
        patch_size: p, side of a patch in pixels.

    Raises:
        ValueError: If H or W is no multiple of ``patch_size``.
    """
    check_images("patchify", imgs, patch_size)
    b, c, height, width = imgs.shape
    p = patch_size
    blocks = imgs.reshape(b, c, height // p, p, width // p, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`patchify`: (B, N, p * p * C) to (B, C, H, W).

    Args:
        patches: (B, N, p * p * C), any dtype.
        patch_size: p, side of a patch in pixels.
        grid_size: Rows and columns of patches; their product is N.

    Raises:
        ValueError: If the grid does not hold N patches or P is no multiple of p * p.
    """
    rows, columns = grid_size
    p = patch_size
    if patches.ndim != 3 or patches.shape[1] != rows * columns or patches.shape[2] % (p * p):
        raise ValueError(
            f"unpatchify: expected patches (B, {rows * columns}, {p * p} * C) for a grid of "
            f"{rows} x {columns}, got {tuple(patches.shape)}"
        )
    b = patches.shape[0]
    blocks = patches.reshape(b, rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return blocks.reshape(b, -1, rows * p, columns * p)


# The types that compiled code knows; PyTorch's 8-bit floats are not among them.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _native_gather_patches_accepts(imgs, ids, patch_size, scale, shift, dtype) -> str | None:
    if (imgs.dtype != torch.uint8 and imgs.dtype not in FLOATS) or dtype not in FLOATS:
        return f"it takes no {imgs.dtype} images to {dtype} rows"
    return None


def _triton_gather_patches_accepts(imgs, ids, patch_size, scale, shift, dtype) -> str | None:
    return refuse_types(None if imgs.dtype == torch.uint8 else imgs, scale, shift, dtype)


def _fake_gather_patches(imgs, ids, patch_size, scale, shift, dtype):
    size = imgs.shape[1] * patch_size * patch_size
    return imgs.new_empty(ids.shape[0], ids.shape[1], size, dtype=dtype)


def _save_for_gather_patches(ctx, inputs, output):
    imgs, ids, patch_size, scale, _, _ = inputs
    ctx.save_for_backward(ids, scale)
    ctx.patch_size = patch_size
    ctx.imgs_shape = imgs.shape
    ctx.imgs_dtype = imgs.dtype


def _gather_patches_backward(ctx, grad):
    if not ctx.needs_input_grad[0]:
        return None, None, None, None, None, None
    ids, scale = ctx.saved_tensors
    b, c, height, width = ctx.imgs_shape
    p = ctx.patch_size
    rows, columns = height // p, width // p
    if scale is not None:
        grad = (grad.unflatten(2, (c, p * p)) * scale.to(grad.dtype)[:, None]).flatten(2)
    whole = scatter_tokens(grad, ids, rows * columns).reshape(b, rows, columns, c, p, p)
    imgs_grad = whole.permute(0, 3, 1, 4, 2, 5).reshape(ctx.imgs_shape)
    return imgs_grad.to(ctx.imgs_dtype), None, None, None, None, None


_gather_patches = Op(
    "gather_patches(Tensor imgs, Tensor ids, int patch_size, Tensor? scale, Tensor? shift, "
    "ScalarType dtype) -> Tensor",
    fake=_fake_gather_patches,
    implementations={
        "reference": reference.gather_patches,
        "triton": Implementation(
            "fastmim.kernels.patches:gather_patches", accepts=_triton_gather_patches_accepts
        ),
        "cpp": Implementation(Native("gather_patches"), accepts=_native_gather_patches_accepts),
    },
    shapes={
        "edge": dict(b=2, c=3, h=3, w=4, p=2, k=5),
        "edge_one_channel": dict(b=1, c=1, h=2, w=2, p=3, k=2),
        "edge_five_channels": dict(b=2, c=5, h=1, w=3, p=4, k=1),
        "edge_bytes": dict(b=2, c=3, h=2, w=3, p=4, k=3, uint8=True),
        "edge_h14": dict(b=1, c=3, h=2, w=2, p=14, k=2, uint8=True),
        "edge_many_rows": dict(b=1, c=9, h=1, w=2, p=16, k=2),
        "edge_empty": dict(b=0, c=3, h=2, w=2, p=2, k=2),
        "edge_keep_none": dict(b=2, c=3, h=2, w=2, p=2, k=0),
        "digits": dict(b=256, c=1, h=8, w=8, p=4, k=16),
        "vit_b": dict(b=256, c=3, h=14, w=14, p=16, k=49),
        "vit_b_uint8": dict(b=256, c=3, h=14, w=14, p=16, k=49, uint8=True),
        "vit_h14_uint8": dict(b=256, c=3, h=16, w=16, p=14, k=64, uint8=True),
    },
    make=lambda b, c, h, w, p, k, device, dtype, uint8=False: (
        random_images((b, c, h * p, w * p), uint8, device, dtype),
        random_ids(b, h * w, k, device),
        p,
        torch.rand(c, device=device, dtype=torch.float64) + 0.5,
        torch.rand(c, device=device, dtype=torch.float64),
        dtype,
    ),
    setup_context=_save_for_gather_patches,
    backward=_gather_patches_backward,
)
