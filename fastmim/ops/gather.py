"""Keep the visible tokens of each image, and put tokens back in their places."""

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._registry import Implementation, Native, Op


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by position: ``out[b, k] = x[b, ids[b, k]]``.

    MAE (arXiv:2111.06377, sec. 3) encodes only the visible tokens; ``ids`` is then ``ids_keep``.

    Args:
        x: (B, N, D), any dtype.
        ids: (B, K), int64, values in [0, N), unique within a row.

    Returns:
        (B, K, D), contiguous, dtype of ``x``. Exact: no arithmetic is done.

    Raises:
        ValueError: If the batch sizes differ or ``ids`` is not (B, K) of int64.
    """
    _check("gather_tokens", x, ids)
    return _gather(x, ids)


def scatter_tokens(x: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    """Adjoint of :func:`gather_tokens`: ``out[b, ids[b, k]] = x[b, k]``, zero elsewhere.

    Args:
        x: (B, K, D), any dtype.
        ids: (B, K), int64, values in [0, num_tokens), unique within a row.
        num_tokens: N, the token count of the result.

    Returns:
        (B, N, D), contiguous, dtype of ``x``. Exact: no arithmetic is done.

    Raises:
        ValueError: If the batch sizes differ, ``ids`` is not (B, K) of int64, or K exceeds N.
    """
    _check("scatter_tokens", x, ids)
    if x.shape[1] != ids.shape[1] or ids.shape[1] > num_tokens:
        raise ValueError(
            "scatter_tokens: expected x (B, K, D), ids (B, K) and num_tokens >= K, "
            f"got {tuple(x.shape)}, {tuple(ids.shape)} and {num_tokens}"
        )
    return _scatter(x, ids, num_tokens)


def _check(function: str, x: Tensor, ids: Tensor) -> None:
    if x.ndim != 3 or ids.ndim != 2 or x.shape[0] != ids.shape[0] or ids.dtype != torch.int64:
        raise ValueError(
            f"{function}: expected x (B, N, D) and ids (B, K) of int64, "
            f"got {tuple(x.shape)} and {tuple(ids.shape)} of {ids.dtype}"
        )


def _fake_gather(x, ids):
    return x.new_empty(x.shape[0], ids.shape[1], x.shape[2])


def _fake_scatter(x, ids, num_tokens):
    return x.new_empty(x.shape[0], num_tokens, x.shape[2])


def _save_for_gather(ctx, inputs, output):
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.num_tokens = x.shape[1]


def _gather_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return _scatter(grad, ids, ctx.num_tokens), None


def _save_for_scatter(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return _gather(grad, ids), None, None


def _refuse_complex(x: Tensor, *rest) -> str | None:
    return "Triton has no complex numbers" if x.is_complex() else None


def random_ids(b: int, n: int, k: int, device) -> Tensor:
    """(B, K) distinct positions in [0, N), for the ``make`` of operators."""
    return torch.rand(b, n, device=device).argsort(dim=1)[:, :k]


SHAPES = {
    "edge": dict(b=2, n=7, k=3, d=5),
    "edge_keep_all": dict(b=1, n=4, k=4, d=1),
    "edge_one_token": dict(b=2, n=1, k=1, d=8),
    "edge_empty": dict(b=0, n=4, k=2, d=8),
    "edge_keep_none": dict(b=2, n=4, k=0, d=8),
    "edge_h14": dict(b=1, n=257, k=65, d=3),
    "edge_wide": dict(b=1, n=50, k=2, d=300),
    "edge_many_ids": dict(b=1, n=300, k=280, d=2),
    "vit_b": dict(b=256, n=196, k=49, d=768),
    "vit_l": dict(b=256, n=196, k=49, d=1024),
    "vit_h14": dict(b=256, n=256, k=64, d=1280),
}

_gather = Op(
    "gather_tokens(Tensor x, Tensor ids) -> Tensor",
    fake=_fake_gather,
    implementations={
        "reference": reference.gather_tokens,
        "cpp": Native("gather_tokens"),
        "triton": Implementation("fastmim.kernels.gather:gather_tokens", accepts=_refuse_complex),
        "cuda": Native("gather_tokens"),
    },
    shapes=SHAPES,
    make=lambda b, n, k, d, device, dtype: (
        torch.randn(b, n, d, device=device, dtype=dtype),
        random_ids(b, n, k, device),
    ),
    setup_context=_save_for_gather,
    backward=_gather_backward,
    twice_differentiable=True,
)
_scatter = Op(
    "scatter_tokens(Tensor x, Tensor ids, SymInt num_tokens) -> Tensor",
    fake=_fake_scatter,
    implementations={
        "reference": reference.scatter_tokens,
        "cpp": Native("scatter_tokens"),
        "triton": Implementation("fastmim.kernels.gather:scatter_tokens", accepts=_refuse_complex),
        "cuda": Native("scatter_tokens"),
    },
    shapes=SHAPES,
    make=lambda b, n, k, d, device, dtype: (
        torch.randn(b, k, d, device=device, dtype=dtype),
        random_ids(b, n, k, device),
        n,
    ),
    setup_context=_save_for_scatter,
    backward=_scatter_backward,
    twice_differentiable=True,
)
