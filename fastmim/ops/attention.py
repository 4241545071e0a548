"""Attention over packed qkv, as the qkv projection writes it, with a packed gradient."""

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._registry import Implementation, Native, Op, extension_problem

_FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The C++ kernel keeps the scores of a head in cache: at 785 tokens it is still 1.6 times as fast as
# PyTorch's (2 cores, AVX-512).
_NATIVE_TOKENS = 1024
_native = Native("attention")
_native_backward = Native("attention_backward")


def attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Self-attention: ``out = softmax(scale * q k^T) v`` for every image and head.

    Vaswani et al. (arXiv:1706.03762, sec. 3.2). No N x N matrix is kept for the backward pass.

    Args:
        qkv: (B, N, 3, H, D), floating point: the qkv projection's output, viewed. N >= 1.
        scale: Factor of the scores. Default: ``D ** -0.5``.

    Returns:
        (B, N, H, D), contiguous, dtype of ``qkv``. Scores and softmax are in float32 (float64 for
        float64).

    Raises:
        ValueError: If ``qkv`` is not (B, N, 3, H, D) of floating point.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(
            "attention: expected qkv (B, N, 3, H, D) of floating point, "
            f"got {tuple(qkv.shape)} of {qkv.dtype}"
        )
    return _attention(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale)[0]


def _native_serves(qkv: Tensor) -> bool:
    return (
        qkv.shape[1] <= _NATIVE_TOKENS
        and qkv.dtype != torch.float64
        and extension_problem() is None
    )


def _attention_cpu(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if _native_serves(qkv):
        return _native.load()(qkv, scale)
    return _flash_attention_cpu(qkv, scale)


def _attention_cpu_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    if _native_serves(qkv):
        return _native_backward.load()(grad, qkv, out, lse, scale)
    return _flash_attention_cpu_backward(grad, qkv, out, lse, scale)


def _flash_attention_cpu(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # PyTorch's kernel takes a last stride of 1 for granted; a copy only for unusual inputs.
    q, k, v = qkv.contiguous().permute(2, 0, 3, 1, 4)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _flash_attention_cpu_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    grad, qkv, out, lse = (t.contiguous() for t in (grad, qkv, out, lse))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, 0.0, False, scale=scale
    )
    return torch.stack([g.transpose(1, 2) for g in grads], dim=2)


def _flash_accepts(first: Tensor, *rest) -> str | None:
    # first: qkv in the forward pass, grad (B, N, H, D) in the backward pass
    if first.dtype not in _FLASH_DTYPES:
        return f"PyTorch's CPU attention does not take {first.dtype}"
    if first.numel() == 0:
        return "PyTorch's CPU attention does not take empty tensors"
    return None


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_attention(qkv, scale):
    b, n, _, h, d = qkv.shape
    return qkv.new_empty(b, n, h, d), qkv.new_empty(b, h, n, dtype=_lse_dtype(qkv.dtype))


def _fake_attention_backward(grad, qkv, out, lse, scale):
    return qkv.new_empty(qkv.shape)


def _save_for_attention(ctx, inputs, output):
    qkv, scale = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.scale = scale


def _attention_backward(ctx, grad, _):
    if grad is None:
        return None, None
    qkv, out, lse = ctx.saved_tensors
    return _backward(grad.contiguous(), qkv, out, lse, ctx.scale), None


def _make(b, n, h, d, device, dtype):
    return torch.randn(b, n, 3, h, d, device=device, dtype=dtype), d**-0.5


def _make_backward(b, n, h, d, device, dtype):
    qkv, scale = _make(b, n, h, d, device, dtype)
    out, lse = reference.attention(qkv, scale)
    return torch.randn(b, n, h, d, device=device, dtype=dtype), qkv, out, lse, scale


SHAPES = {
    "edge": dict(b=2, n=5, h=3, d=8),
    "edge_one_token": dict(b=1, n=1, h=1, d=16),
    "edge_empty": dict(b=0, n=4, h=2, d=8),
    "edge_encoder": dict(b=1, n=50, h=2, d=64),
    "edge_h14": dict(b=1, n=65, h=1, d=80),
    "edge_decoder": dict(b=1, n=197, h=1, d=32),
    "encoder_l": dict(b=256, n=50, h=16, d=64),
    "decoder": dict(b=256, n=197, h=16, d=32),
}

_attention = Op(
    "attention(Tensor qkv, float scale) -> (Tensor, Tensor)",
    fake=_fake_attention,
    implementations={
        "reference": reference.attention,
        "cpp": Implementation(_attention_cpu, accepts=_flash_accepts),
    },
    shapes=SHAPES,
    make=_make,
    setup_context=_save_for_attention,
    backward=_attention_backward,
)
_backward = Op(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    fake=_fake_attention_backward,
    implementations={
        "reference": reference.attention_backward,
        "cpp": Implementation(_attention_cpu_backward, accepts=_flash_accepts),
    },
    shapes=SHAPES,
    make=_make_backward,
)
