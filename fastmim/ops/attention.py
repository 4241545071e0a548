"""Attention over projections as they are written, packed, with packed gradients.

``attention`` is self-attention over packed queries, keys and values; ``attention_queries`` computes
it for some queries alone. On a GPU ``auto`` follows a committed table, see
:mod:`fastmim.ops._attention_choice`: our Triton kernels for the short sequences of masked image
modelling, PyTorch's attention for everything else. FASTMIM_ATTENTION asks for one of them.
"""

import torch
from torch import Tensor

from fastmim.ops import _attention_choice as choice
from fastmim.ops import _attention_libraries as libraries
from fastmim.ops import reference
from fastmim.ops._attention_choice import use_attention
from fastmim.ops._attention_libraries import Call
from fastmim.ops._registry import Implementation, Native, Op, extension_problem

_FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The C++ kernel keeps the scores of a head in cache: at 785 tokens it is still 1.6 times as fast as
# PyTorch's (2 cores, AVX-512).
_NATIVE_TOKENS = 1024
_native = {
    name: Native(name)
    for name in (
        "attention",
        "attention_backward",
        "attention_queries",
        "attention_queries_backward",
    )
}
aten = torch.ops.aten

__all__ = ["attention", "attention_backends", "attention_queries", "use_attention"]


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


def attention_queries(q: Tensor, kv: Tensor, scale: float | None = None) -> Tensor:
    """Attention of some queries: ``out = softmax(scale * q k^T) v`` for every image and head.

    For the last block of a decoder, whose loss reads the masked patches alone: as many rows of
    :func:`attention`, equal to them, for the cost of these rows.

    Args:
        q: (B, M, H, D), floating point: the projection to queries, viewed.
        kv: (B, N, 2, H, D) in the dtype of ``q``: that to keys and values, viewed. N >= 1.
        scale: Factor of the scores. Default: ``D ** -0.5``.

    Returns:
        (B, M, H, D), contiguous, dtype of ``q``. Scores and softmax are in float32 (float64 for
        float64).

    Raises:
        ValueError: If the shapes do not fit, or the dtypes differ or are not of floating point.
    """
    if (
        q.ndim != 4
        or kv.ndim != 5
        or (kv.shape[0], *kv.shape[2:]) != (q.shape[0], 2, *q.shape[2:])
        or q.dtype != kv.dtype
        or not q.is_floating_point()
    ):
        raise ValueError(
            "attention_queries: expected q (B, M, H, D) and kv (B, N, 2, H, D) of one "
            f"floating-point dtype, got {tuple(q.shape)} of {q.dtype} and {tuple(kv.shape)} of "
            f"{kv.dtype}"
        )
    return _attention_queries(q, kv, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def attention_backends(*given: Tensor, max_seqlen: int | None = None) -> dict[str, str | None]:
    """For each word of FASTMIM_ATTENTION, why it cannot serve a call; None if it can.

    Args:
        given: qkv of :func:`attention` or of :func:`fastmim.ops.attention_varlen`; or q and kv of
            :func:`attention_queries`.
        max_seqlen: Of ``attention_varlen``.
    """
    q, kv = given[0], given[-1]
    if max_seqlen is None:
        call = _queries_call(q if len(given) == 2 else q[:, :, 0], kv, 1.0)
    else:
        call = varlen_call(q, max_seqlen, 1.0)
    reasons: dict[str, str | None] = {"auto": None}
    for word, (backend, _) in choice.WORDS.items():
        problem = _attention.unavailable(backend, q.device)
        reasons[word] = problem or choice.refuses(word, call)
    return reasons


def varlen_call(qkv: Tensor, max_seqlen: int, scale: float) -> Call:
    """What decides about a pack (T, 3, H, D) of sequences."""
    return Call(
        *(max_seqlen, max_seqlen, qkv.shape[-1], qkv.dtype, qkv.device, scale),
        varlen=True,
        empty=qkv.numel() == 0,
    )


# Of the arguments of each operator, what decides who serves it.
def _queries_call(q, kv, scale) -> Call:
    return Call(
        *(q.shape[1], kv.shape[1], q.shape[-1], q.dtype, q.device, scale),
        varlen=False,
        empty=q.numel() == 0 or kv.numel() == 0,
    )


def _packed_call(qkv, scale) -> Call:
    return _queries_call(qkv[:, :, 0], qkv, scale)


def _packed_backward_call(grad, qkv, out, lse, scale) -> Call:
    return _packed_call(qkv, scale)


def _queries_backward_call(grad, q, kv, out, lse, scale) -> Call:
    return _queries_call(q, kv, scale)


def _cpu_refuses(call: Call) -> str | None:
    if call.dtype not in _FLASH_DTYPES:
        return f"PyTorch's CPU attention does not take {call.dtype}"
    if call.empty:
        return "PyTorch's CPU attention does not take empty tensors"
    return None


def _native_serves(q: Tensor, kv: Tensor) -> bool:
    return (
        max(q.shape[1], kv.shape[1]) <= _NATIVE_TOKENS
        and q.dtype != torch.float64
        and extension_problem() is None
    )


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _flash_cpu_backward(grad, q, k, v, out, lse, scale: float) -> tuple[Tensor, ...]:
    grad, out = grad.contiguous(), out.contiguous()
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(grad, q, k, v, out, lse.contiguous(), 0.0, False), scale=scale
    )
    return tuple(g.transpose(1, 2) for g in grads)


# PyTorch's kernels take a last stride of 1 for granted; a copy only for unusual inputs.
def _attention_cpu(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if _native_serves(qkv, qkv):
        return _native["attention"].load()(qkv, scale)
    return _flash_cpu(*qkv.contiguous().unbind(2), scale)


def _attention_cpu_backward(grad, qkv, out, lse, scale: float) -> Tensor:
    if _native_serves(qkv, qkv):
        return _native["attention_backward"].load()(grad, qkv, out, lse, scale)
    return torch.stack(
        _flash_cpu_backward(grad, *qkv.contiguous().unbind(2), out, lse, scale), dim=2
    )


def _queries_cpu(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if _native_serves(q, kv):
        return _native["attention_queries"].load()(q, kv, scale)
    return _flash_cpu(q.contiguous(), *kv.contiguous().unbind(2), scale)


def _queries_cpu_backward(grad, q, kv, out, lse, scale: float) -> tuple[Tensor, Tensor]:
    if _native_serves(q, kv):
        return _native["attention_queries_backward"].load()(grad, q, kv, out, lse, scale)
    given = (grad, q.contiguous(), *kv.contiguous().unbind(2), out, lse)
    grad_q, *grads = _flash_cpu_backward(*given, scale)
    return grad_q.contiguous(), torch.stack(grads, dim=2)


def _attention_library(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    name = choice.library(_packed_call(qkv, scale))
    return libraries.attention(name, *qkv.contiguous().unbind(2), scale)


def _attention_library_backward(grad, qkv, out, lse, scale: float) -> Tensor:
    name = choice.library(_packed_call(qkv, scale))
    given = (grad, *qkv.contiguous().unbind(2), out, lse)
    return torch.stack(libraries.attention_backward(name, *given, scale), dim=2)


def _queries_library(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    name = choice.library(_queries_call(q, kv, scale))
    return libraries.attention(name, q.contiguous(), *kv.contiguous().unbind(2), scale)


def _queries_library_backward(grad, q, kv, out, lse, scale: float) -> tuple[Tensor, Tensor]:
    name = choice.library(_queries_call(q, kv, scale))
    given = (grad, q.contiguous(), *kv.contiguous().unbind(2), out, lse)
    grad_q, *grads = libraries.attention_backward(name, *given, scale)
    return grad_q.contiguous(), torch.stack(grads, dim=2)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp of scores of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_attention(qkv, scale):
    return _fake_queries(qkv[:, :, 0], None, scale)


def _fake_attention_backward(grad, qkv, out, lse, scale):
    return qkv.new_empty(qkv.shape)


def _fake_queries(q, kv, scale):
    b, m, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, h, m, dtype=lse_dtype(q.dtype))


def _fake_queries_backward(grad, q, kv, out, lse, scale):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save(ctx, inputs, output):
    *given, scale = inputs
    out, lse = output
    ctx.save_for_backward(*given, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.scale = scale


def _attention_backward(ctx, grad, _):
    if grad is None:
        return None, None
    return _backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None


def _queries_backward(ctx, grad, _):
    if grad is None:
        return None, None, None
    return *_backward_queries(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None


def _make(b, n, h, d, device, dtype):
    return torch.randn(b, n, 3, h, d, device=device, dtype=dtype), d**-0.5


def _make_backward(b, n, h, d, device, dtype):
    qkv, scale = _make(b, n, h, d, device, dtype)
    out, lse = reference.attention(qkv, scale)
    return torch.randn(b, n, h, d, device=device, dtype=dtype), qkv, out, lse, scale


def _make_queries(b, m, n, h, d, device, dtype):
    q = torch.randn(b, m, h, d, device=device, dtype=dtype)
    return q, torch.randn(b, n, 2, h, d, device=device, dtype=dtype), d**-0.5


def _make_queries_backward(b, m, n, h, d, device, dtype):
    q, kv, scale = _make_queries(b, m, n, h, d, device, dtype)
    return torch.randn_like(q), q, kv, *reference.attention_queries(q, kv, scale), scale


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
    "image_h16": dict(b=256, n=197, h=16, d=80),
}
QUERIES_SHAPES = {
    "edge": dict(b=2, m=3, n=5, h=3, d=8),
    "edge_one_query": dict(b=2, m=1, n=19, h=2, d=16),
    "edge_more_queries": dict(b=1, m=5, n=2, h=2, d=8),
    "edge_empty": dict(b=0, m=2, n=4, h=2, d=8),
    "edge_no_query": dict(b=2, m=0, n=4, h=1, d=8),
    "edge_tiny": dict(b=1, m=48, n=65, h=2, d=16),
    "edge_two_chunks": dict(b=1, m=66, n=80, h=1, d=32),
    "decoder": dict(b=256, m=147, n=197, h=16, d=32),
    "decoder_h14": dict(b=256, m=192, n=257, h=16, d=32),
}


def implementations(name: str, reference_of, cpu, library, call) -> dict[str, Implementation]:
    """The backends of one operator; ``call`` makes of its arguments what decides."""
    return {
        "reference": Implementation(reference_of),
        "cpp": Implementation(cpu, accepts=lambda *args: _cpu_refuses(call(*args))),
        "triton": Implementation(
            f"fastmim.kernels.attention:{name}",
            accepts=lambda *args: choice.triton_refuses(call(*args)),
        ),
        "cuda": Implementation(library, accepts=lambda *args: choice.library_refuses(call(*args))),
    }


_attention = Op(
    "attention(Tensor qkv, float scale) -> (Tensor, Tensor)",
    fake=_fake_attention,
    implementations=implementations(
        "attention", reference.attention, _attention_cpu, _attention_library, _packed_call
    ),
    shapes=SHAPES,
    make=_make,
    override=choice.override,
    setup_context=_save,
    backward=_attention_backward,
)
_backward = Op(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    fake=_fake_attention_backward,
    implementations=implementations(
        "attention_backward",
        reference.attention_backward,
        _attention_cpu_backward,
        _attention_library_backward,
        _packed_backward_call,
    ),
    shapes=SHAPES,
    make=_make_backward,
    override=choice.override,
)
_attention_queries = Op(
    "attention_queries(Tensor q, Tensor kv, float scale) -> (Tensor, Tensor)",
    fake=_fake_queries,
    implementations=implementations(
        "attention_queries",
        reference.attention_queries,
        _queries_cpu,
        _queries_library,
        _queries_call,
    ),
    shapes=QUERIES_SHAPES,
    make=_make_queries,
    override=choice.override,
    setup_context=_save,
    backward=_queries_backward,
)
_backward_queries = Op(
    "attention_queries_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, "
    "float scale) -> (Tensor, Tensor)",
    fake=_fake_queries_backward,
    implementations=implementations(
        "attention_queries_backward",
        reference.attention_queries_backward,
        _queries_cpu_backward,
        _queries_library_backward,
        _queries_backward_call,
    ),
    shapes=QUERIES_SHAPES,
    make=_make_queries_backward,
    override=choice.override,
)
