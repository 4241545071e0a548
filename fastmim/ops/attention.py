"""Attention over packed qkv, as the qkv projection writes it, with a packed gradient.

On a GPU ``auto`` follows :data:`GPU_TABLE`: our Triton kernels for the short sequences of masked
image modelling, PyTorch's attention for everything else. FASTMIM_ATTENTION asks for one of them.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.ops import _attention_libraries as libraries
from fastmim.ops import reference
from fastmim.ops._registry import (
    Implementation,
    Native,
    Op,
    compute_capability,
    extension_problem,
    forced_backend,
)

_FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The C++ kernel keeps the scores of a head in cache: at 785 tokens it is still 1.6 times as fast as
# PyTorch's (2 cores, AVX-512).
_NATIVE_TOKENS = 1024
# Of the Triton kernels: up to which number of tokens, by padded head dim, the scores (forward) or
# gradients (backward) fit in registers; see docs/kernels.md.
_TRITON_TOKENS = {16: 272, 32: 272, 64: 208, 128: 80}
_TRITON_TOKENS_BACKWARD = {16: 272, 32: 272, 64: 80, 128: 80}
_TRITON_DTYPES = (torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """What ``auto`` takes on a GPU for shapes up to these, if it can serve them.

    Attributes:
        tokens: N, at most.
        head_dim: D, at most.
        backend: "triton", or "cuda" for PyTorch's kernels.
        evidence: "measured" and where, or "predicted" and by what.
    """

    tokens: int
    head_dim: int
    backend: str
    evidence: str


# The first row that covers N and D counts. A row without a measurement says so.
GPU_TABLE = (
    Choice(64, 128, "triton", "predicted by a roofline model at (50, 64): 2.2 and 4.5 times flash"),
    Choice(80, 80, "triton", "predicted by a roofline model at (65, 80): 1.8 and 4.0 times flash"),
    Choice(
        208, 64, "triton", "predicted by a roofline model at (197, 32): 1.4 and 1.8 times flash"
    ),
    Choice(272, 32, "triton", "predicted by a roofline model at (257, 32): 1.9 times flash"),
)
_ASKED = {  # FASTMIM_ATTENTION to the backend, and to the library where that is a choice
    "triton": ("triton", None),
    "sdpa": ("cuda", None),
    "flash": ("cuda", "flash"),
    "cudnn": ("cuda", "cudnn"),
    "efficient": ("cuda", "efficient"),
    "xformers": ("cuda", "xformers"),
    "reference": ("reference", None),
}


def _parse(asked: str | None) -> str | None:
    if asked in (None, "", "auto"):
        return None
    if asked not in _ASKED:
        raise ValueError(
            f"unknown attention '{asked}'; FASTMIM_ATTENTION takes auto, {', '.join(_ASKED)}"
        )
    return asked


_asked = _parse(os.environ.get("FASTMIM_ATTENTION"))
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


def _qkv(first: Tensor, *rest) -> Tensor:
    """Of the arguments of the forward pass, (qkv, ...), or the backward pass, (grad, qkv, ...)."""
    return first if first.ndim == 5 else rest[0]


def _triton_accepts(*args) -> str | None:
    qkv, scale = _qkv(*args), args[-1]
    if qkv.dtype not in _TRITON_DTYPES:
        return f"it takes float16 and bfloat16, tiles of wider types do not fit; not {qkv.dtype}"
    backward = args[0].ndim == 4
    n, d = qkv.shape[1], qkv.shape[-1]
    limits = _TRITON_TOKENS_BACKWARD if backward else _TRITON_TOKENS
    most = next((tokens for head_dim, tokens in limits.items() if d <= head_dim), 0)
    if not (1 <= n <= most and d >= 1):
        return f"{n} tokens of head dim {d} do not fit in its registers"
    capability = compute_capability(qkv.device)
    if backward and n > 64 and d > 64 and capability and capability[0] not in (9, 10):
        return f"{n} tokens of head dim {d} do not fit in the registers of this GPU"
    if not scale > 0:
        return f"it needs a positive scale, not {scale}"
    return None


def _library() -> str | None:
    return None if _asked is None else _ASKED[_asked][1]


def _library_accepts(*args) -> str | None:
    qkv = _qkv(*args)
    reason = libraries.refuses(_library(), qkv)
    if reason is None and _asked is None and forced_backend() is None:
        choice = gpu_choice(qkv.shape[1], qkv.shape[-1])
        if choice.backend == "triton" and _triton_accepts(*args) is None:
            return f"auto takes triton here: {choice.evidence}"
    return reason


def gpu_choice(tokens: int, head_dim: int) -> Choice:
    """What ``auto`` takes on a GPU for this shape, and why.

    Args:
        tokens: N.
        head_dim: D.

    Returns:
        The row of :data:`GPU_TABLE`; without one, PyTorch's kernels.
    """
    for choice in GPU_TABLE:
        if tokens <= choice.tokens and head_dim <= choice.head_dim:
            return choice
    return Choice(tokens, head_dim, "cuda", "not in the table")


def _attention_library(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return libraries.attention(_library(), qkv, scale)


def _attention_library_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    return libraries.attention_backward(_library(), grad, qkv, out, lse, scale)


def _override() -> tuple[str, str] | None:
    """The backend asked for by FASTMIM_ATTENTION, and the words for it."""
    return None if _asked is None else (_ASKED[_asked][0], f"FASTMIM_ATTENTION={_asked}")


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
    "edge_two_chunks": dict(b=1, n=80, h=1, d=48),
    "edge_decoder_h14": dict(b=1, n=257, h=1, d=32),
    "encoder_l": dict(b=256, n=50, h=16, d=64),
    "encoder_h16": dict(b=256, n=50, h=16, d=80),
    "encoder_h14": dict(b=256, n=65, h=16, d=80),
    "encoder_l14": dict(b=256, n=65, h=16, d=64),
    "decoder": dict(b=256, n=197, h=16, d=32),
    "decoder_h14": dict(b=256, n=257, h=16, d=32),
    "image_l": dict(b=256, n=197, h=16, d=64),
}

_attention = Op(
    "attention(Tensor qkv, float scale) -> (Tensor, Tensor)",
    fake=_fake_attention,
    implementations={
        "reference": reference.attention,
        "cpp": Implementation(_attention_cpu, accepts=_flash_accepts),
        "triton": Implementation("fastmim.kernels.attention:attention", accepts=_triton_accepts),
        "cuda": Implementation(_attention_library, accepts=_library_accepts),
    },
    shapes=SHAPES,
    make=_make,
    override=_override,
    setup_context=_save_for_attention,
    backward=_attention_backward,
)
_backward = Op(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    fake=_fake_attention_backward,
    implementations={
        "reference": reference.attention_backward,
        "cpp": Implementation(_attention_cpu_backward, accepts=_flash_accepts),
        "triton": Implementation(
            "fastmim.kernels.attention:attention_backward", accepts=_triton_accepts
        ),
        "cuda": Implementation(_attention_library_backward, accepts=_library_accepts),
    },
    shapes=SHAPES,
    make=_make_backward,
    override=_override,
)
