"""The decoder's input: visible tokens in their places, mask tokens elsewhere, plus positions."""

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._limits import refuse_types
from fastmim.ops._registry import Implementation, Native, Op
from fastmim.ops.masking import Masks, masks_from_noise
from fastmim.ops.patches import FLOATS


def restore_tokens(x: Tensor, mask_token: Tensor, masks: Masks, pos_embed: Tensor) -> Tensor:
    """Put visible tokens back and fill the holes: ``out = unshuffle([x, mask_token...]) + pos``.

    MAE (arXiv:2111.06377, sec. 3, "MAE decoder"). The cls token stays first.

    Args:
        x: (B, K + 1, D), floating point: cls token, then visible tokens in shuffle order.
        mask_token: (1, 1, D).
        masks: Where the tokens belong; ``masks.num_keep`` is K, ``ids_restore`` is (B, N).
        pos_embed: (1, N + 1, D) with the position of the cls token first. Its gradient is taken
            only if it requires one.

    Returns:
        (B, N + 1, D), contiguous, in the promoted dtype of ``x`` and ``pos_embed``.

    Raises:
        ValueError: If the sizes do not fit.
    """
    b, n = masks.ids_restore.shape
    width = x.shape[-1]
    if (
        tuple(x.shape) != (b, masks.num_keep + 1, width)
        or tuple(mask_token.shape) != (1, 1, width)
        or tuple(pos_embed.shape) != (1, n + 1, width)
    ):
        raise ValueError(
            f"restore_tokens: expected x ({b}, {masks.num_keep + 1}, D), mask_token (1, 1, D) and "
            f"pos_embed (1, {n + 1}, D), got {tuple(x.shape)}, {tuple(mask_token.shape)} and "
            f"{tuple(pos_embed.shape)}"
        )
    return _restore(x, mask_token, masks.ids_shuffle, masks.ids_restore, pos_embed)


def _fake_restore(x, mask_token, ids_shuffle, ids_restore, pos_embed):
    b, n = ids_restore.shape
    dtype = torch.promote_types(x.dtype, pos_embed.dtype)
    return x.new_empty(b, n + 1, x.shape[2], dtype=dtype)


def _fake_restore_backward(grad, ids_shuffle, num_visible):
    b, _, d = grad.shape
    return grad.new_empty(b, num_visible + 1, d), grad.new_empty(1, 1, d)


def _save_for_restore(ctx, inputs, output):
    x, mask_token, ids_shuffle, _, pos_embed = inputs
    ctx.save_for_backward(ids_shuffle)
    ctx.num_visible = x.shape[1] - 1
    ctx.dtypes = x.dtype, mask_token.dtype, pos_embed.dtype


def _restore_backward(ctx, grad):
    (ids_shuffle,) = ctx.saved_tensors
    x_dtype, mask_dtype, pos_dtype = ctx.dtypes
    grad_x, grad_mask = _backward(grad, ids_shuffle, ctx.num_visible)
    grad_pos = grad.sum(dim=0, keepdim=True).to(pos_dtype) if ctx.needs_input_grad[4] else None
    return grad_x.to(x_dtype), grad_mask.to(mask_dtype), None, None, grad_pos


def _native_restore_accepts(x, mask_token, ids_shuffle, ids_restore, pos_embed) -> str | None:
    dtypes = x.dtype, mask_token.dtype, pos_embed.dtype
    if any(d not in FLOATS for d in dtypes):
        return f"it takes no {dtypes} tensors"
    if (x.dtype == torch.float64) != (pos_embed.dtype == torch.float64):
        return "it takes float64 for both x and pos_embed or for neither"
    return None


def _native_restore_backward_accepts(grad, ids_shuffle, num_visible) -> str | None:
    return None if grad.dtype in FLOATS else f"it takes no {grad.dtype} gradient"


def _triton_restore_accepts(x, mask_token, ids_shuffle, ids_restore, pos_embed) -> str | None:
    return refuse_types(x, mask_token, pos_embed)


def _triton_restore_backward_accepts(grad, ids_shuffle, num_visible) -> str | None:
    return refuse_types(grad)


def _make(b, n, k, d, device, dtype):
    noise = torch.rand(b, n, device=device)
    masks = masks_from_noise(noise, k)
    return (
        torch.randn(b, k + 1, d, device=device, dtype=dtype),
        torch.randn(1, 1, d, device=device, dtype=dtype),
        masks.ids_shuffle,
        masks.ids_restore,
        torch.randn(1, n + 1, d, device=device, dtype=dtype),
    )


def _make_backward(b, n, k, d, device, dtype):
    ids_shuffle = torch.rand(b, n, device=device).argsort(dim=1)
    return torch.randn(b, n + 1, d, device=device, dtype=dtype), ids_shuffle, k


SHAPES = {
    "edge": dict(b=2, n=7, k=3, d=5),
    "edge_one_visible": dict(b=1, n=2, k=1, d=1),
    "edge_empty": dict(b=0, n=4, k=2, d=8),
    "edge_h14": dict(b=1, n=256, k=64, d=3),
    "edge_wide": dict(b=1, n=3, k=1, d=300),
    "edge_many_images": dict(b=18, n=4, k=2, d=3),
    "vit_b": dict(b=256, n=196, k=49, d=512),
    "vit_h14": dict(b=256, n=256, k=64, d=512),
}

_restore = Op(
    "restore_tokens(Tensor x, Tensor mask_token, Tensor ids_shuffle, Tensor ids_restore, "
    "Tensor pos_embed) -> Tensor",
    fake=_fake_restore,
    implementations={
        "reference": lambda x, mask_token, _, ids_restore, pos_embed: reference.restore_tokens(
            x, mask_token, ids_restore, pos_embed
        ),
        "triton": Implementation(
            "fastmim.kernels.restore:restore_tokens", accepts=_triton_restore_accepts
        ),
        "cpp": Implementation(Native("restore_tokens"), accepts=_native_restore_accepts),
    },
    shapes=SHAPES,
    make=_make,
    setup_context=_save_for_restore,
    backward=_restore_backward,
)
_backward = Op(
    "restore_tokens_backward(Tensor grad, Tensor ids_shuffle, SymInt num_visible) "
    "-> (Tensor, Tensor)",
    fake=_fake_restore_backward,
    implementations={
        "reference": reference.restore_tokens_backward,
        "triton": Implementation(
            "fastmim.kernels.restore:restore_tokens_backward",
            accepts=_triton_restore_backward_accepts,
        ),
        "cpp": Implementation(
            Native("restore_tokens_backward"), accepts=_native_restore_backward_accepts
        ),
    },
    shapes=SHAPES,
    make=_make_backward,
)
