"""Self-attention within packed sequences of various lengths, with a packed gradient."""

import torch
from torch import Tensor

from fastmim.ops import _attention_choice as choice
from fastmim.ops import _attention_libraries as libraries
from fastmim.ops import reference
from fastmim.ops._attention_libraries import Call
from fastmim.ops._registry import Native, Op, extension_problem
from fastmim.ops.attention import implementations, lse_dtype, varlen_call

_native, _native_backward = Native("attention_varlen"), Native("attention_varlen_backward")


def attention_varlen(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    *,
    validate: bool = False,
) -> Tensor:
    """Self-attention of each sequence: ``out = softmax(scale * q k^T) v`` for every head.

    The sequences lie behind one another; no token attends to another sequence, and nothing is
    padded. For crops of several sizes, or images that keep different numbers of patches.

    Args:
        qkv: (T, 3, H, D), floating point: the qkv projection's output, viewed.
        cu_seqlens: (B + 1,), int32, on the device of ``qkv``: the first row of each sequence, and
            T. It rises from 0; equal neighbours are an empty sequence.
        max_seqlen: Rows of the longest sequence, or more.
        scale: Factor of the scores. Default: ``D ** -0.5``.
        validate: Check the values of ``cu_seqlens`` on a GPU too, which waits for it. On a CPU they
            are always checked. Unchecked wrong values give wrong results; no memory outside the
            tensors is touched by fastmim's kernels, PyTorch's and xformers' do not promise that.

    Returns:
        (T, H, D), contiguous, dtype of ``qkv``. Scores and softmax are in float32 (float64 for
        float64).

    Raises:
        ValueError: If the shapes or dtypes do not fit, or ``cu_seqlens`` was checked and does not
            cut the rows into sequences of at most ``max_seqlen``.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(
            "attention_varlen: expected qkv (T, 3, H, D) of floating point, "
            f"got {tuple(qkv.shape)} of {qkv.dtype}"
        )
    if (
        cu_seqlens.ndim != 1
        or len(cu_seqlens) < 2
        or cu_seqlens.dtype != torch.int32
        or cu_seqlens.device != qkv.device
        or max_seqlen < 1
    ):
        raise ValueError(
            f"attention_varlen: expected cu_seqlens (B + 1,) of int32 on {qkv.device}, B >= 1, and "
            f"max_seqlen >= 1, got {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype} on "
            f"{cu_seqlens.device} and {max_seqlen}"
        )
    if validate:
        reference.sequences(cu_seqlens, max_seqlen, qkv.shape[0])
    return _varlen(qkv, cu_seqlens, max_seqlen, qkv.shape[-1] ** -0.5 if scale is None else scale)[
        0
    ]


def _call(qkv, cu_seqlens, max_seqlen, scale) -> Call:
    return varlen_call(qkv, max_seqlen, scale)


def _backward_call(grad, qkv, out, lse, cu_seqlens, max_seqlen, scale) -> Call:
    return varlen_call(qkv, max_seqlen, scale)


def _native_serves(qkv: Tensor) -> bool:
    return qkv.dtype != torch.float64 and extension_problem() is None


def _varlen_cpu(qkv, cu_seqlens, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    given = (qkv, cu_seqlens, max_seqlen, scale)
    return (_native.load() if _native_serves(qkv) else reference.attention_varlen)(*given)


def _varlen_cpu_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen: int, scale: float) -> Tensor:
    serves = _native_backward.load() if _native_serves(qkv) else reference.attention_varlen_backward
    return serves(grad, qkv, out, lse, cu_seqlens, max_seqlen, scale)


def _varlen_library(qkv, cu_seqlens, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    name = choice.library(varlen_call(qkv, max_seqlen, scale))
    return libraries.varlen(name, qkv, cu_seqlens, max_seqlen, scale)


def _varlen_library_backward(
    grad, qkv, out, lse, cu_seqlens, max_seqlen: int, scale: float
) -> Tensor:
    name = choice.library(varlen_call(qkv, max_seqlen, scale))
    return libraries.varlen_backward(name, grad, qkv, out, lse, cu_seqlens, max_seqlen, scale)


def _fake_varlen(qkv, cu_seqlens, max_seqlen, scale):
    t, _, h, d = qkv.shape
    return qkv.new_empty(t, h, d), qkv.new_empty(h, t, dtype=lse_dtype(qkv.dtype))


def _fake_varlen_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, scale):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, cu_seqlens, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, cu_seqlens)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _varlen_backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    return _backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers), None, None, None


def _make(lengths, h, d, device, dtype):
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    qkv = torch.randn(sum(lengths), 3, h, d, device=device, dtype=dtype)
    return qkv, starts.to(device), max(lengths), d**-0.5


def _make_backward(lengths, h, d, device, dtype):
    qkv, starts, longest, scale = _make(lengths, h, d, device, dtype)
    if qkv.is_meta:  # whose starts have no values
        kept = [torch.empty_like(t) for t in _fake_varlen(qkv, starts, longest, scale)]
    else:
        kept = reference.attention_varlen(qkv, starts, longest, scale)
    return torch.randn_like(kept[0]), qkv, *kept, starts, longest, scale


SHAPES = {
    "edge": dict(lengths=(3, 1, 5), h=2, d=8),
    "edge_one": dict(lengths=(4,), h=1, d=8),
    "edge_empty": dict(lengths=(0, 2, 0), h=1, d=8),
    "edge_nothing": dict(lengths=(0, 0), h=1, d=8),
    "edge_crops": dict(lengths=(50, 17), h=1, d=32),
    "edge_long": dict(lengths=(65, 1, 80), h=1, d=16),
    "crops": dict(lengths=(64, 50, 37, 17) * 64, h=16, d=64),
    "images": dict(lengths=(197, 65, 128, 50) * 64, h=16, d=64),
    "images_decoder": dict(lengths=(197, 65, 128, 50) * 64, h=16, d=32),
}

_varlen = Op(
    "attention_varlen(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale) "
    "-> (Tensor, Tensor)",
    fake=_fake_varlen,
    implementations=implementations(
        "attention_varlen", reference.attention_varlen, _varlen_cpu, _varlen_library, _call
    ),
    shapes=SHAPES,
    make=_make,
    override=choice.override,
    setup_context=_save,
    backward=_varlen_backward,
)
_backward = Op(
    "attention_varlen_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, SymInt max_seqlen, float scale) -> Tensor",
    fake=_fake_varlen_backward,
    implementations=implementations(
        "attention_varlen_backward",
        reference.attention_varlen_backward,
        _varlen_cpu_backward,
        _varlen_library_backward,
        _backward_call,
    ),
    shapes=SHAPES,
    make=_make_backward,
    override=choice.override,
)
