"""LayerNorm with the residual add before it, alone or followed by a linear layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._limits import refuse_native, refuse_rows
from fastmim.ops._registry import Implementation, Native, Op, autocast_dtype
from fastmim.ops.linear import linear, weight_grad


class Normalized(NamedTuple):
    """Result of :func:`norm`.

    Attributes:
        out: What the next layer reads.
        total: The residual stream after the add, in the dtype of ``x``.
    """

    out: Tensor
    total: Tensor


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    branch: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Normalized:
    """``total = x + branch; out = (total - mean) / sqrt(var + eps) * weight + bias``, in one pass.

    Layer normalisation (Ba et al., arXiv:1607.06450) over the last dimension, with the biased
    variance. ``total``, the mean and the reciprocal deviation are kept for the backward pass,
    ``out`` is not.

    Args:
        x: (..., D), floating point: the residual stream.
        weight: (D,).
        bias: (D,).
        eps: Added to the variance.
        branch: (..., D) like ``x``, in any floating-point dtype; or None for no add.
        dtype: Of ``out``. Default: autocast's if it is on, else the wider of ``x`` and ``weight``.

    Returns:
        ``out`` and ``total``, contiguous; ``total`` is ``x`` itself if there is no branch. The
        statistics are in float32 (float64 for float64).

    Raises:
        ValueError: If the sizes do not fit.
    """
    _check("norm", x, weight, bias, branch)
    dtype = dtype or _compute_dtype(x, weight)
    out, total, _, _ = _norm(x, branch, weight, bias, eps, dtype)
    return Normalized(out, x if branch is None else total)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    branch: Tensor | None = None,
) -> Normalized:
    """``out = linear(norm(x + branch))``, keeping the residual stream alone for the backward pass.

    The normalised tokens are made again when the gradient of ``weight`` is taken: 2 to 4 bytes less
    for each value of ``x``, at the price of one more normalisation.

    Args:
        x: (..., D), floating point: the residual stream.
        norm_weight: (D,), of the normalisation.
        norm_bias: (D,), of the normalisation.
        weight: (E, D), of the linear layer.
        bias: (E,) or None.
        eps: Added to the variance.
        branch: (..., D) like ``x``, in any floating-point dtype; or None for no add.

    Returns:
        ``out`` (..., E), in autocast's dtype if it is on, else the wider of ``x`` and
        ``norm_weight``; and ``total`` as :func:`norm` gives it.

    Raises:
        ValueError: If the sizes do not fit.
    """
    _check("norm_linear", x, norm_weight, norm_bias, branch)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"norm_linear: expected weight (E, {x.shape[-1]}) for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    dtype = _compute_dtype(x, norm_weight)
    out, total, _, _ = _norm_linear(
        x,
        branch,
        norm_weight,
        norm_bias,
        eps,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
    return Normalized(out, x if branch is None else total)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return autocast_dtype(x) or torch.promote_types(x.dtype, weight.dtype)


def _check(function: str, x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None) -> None:
    width = x.shape[-1:]
    if (
        x.ndim == 0
        or not x.is_floating_point()
        or weight.shape != width
        or bias.shape != width
        or (branch is not None and branch.shape != x.shape)
    ):
        raise ValueError(
            f"{function}: expected x (..., D) of floating point, branch like x, and norm weight "
            f"and bias (D,), got {tuple(x.shape)} of {x.dtype}, "
            f"{None if branch is None else tuple(branch.shape)}, {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )


def _native_norm_accepts(x, branch, weight, bias, eps, dtype) -> str | None:
    return refuse_native(x, branch, weight, bias, dtype)


def _native_norm_backward_accepts(grad, grad_total, total, mean, rstd, weight) -> str | None:
    return refuse_native(total, grad, grad_total, weight)


def _native_norm_linear_accepts(x, branch, norm_weight, norm_bias, *rest) -> str | None:
    return refuse_native(x, branch, norm_weight, norm_bias)


def _statistics(x: Tensor) -> list[Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [x.new_empty(x.shape[:-1], dtype=dtype) for _ in range(2)]


def _fake_norm(x, branch, weight, bias, eps, dtype):
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    return x.new_empty(x.shape, dtype=dtype), total, *_statistics(x)


def _fake_norm_backward(grad, grad_total, total, mean, rstd, weight):
    # Not empty_like, which keeps the order of the strides: the results are contiguous.
    return total.new_empty(total.shape), *(weight.new_empty(weight.shape) for _ in range(2))


def _save_for_norm(ctx, inputs, output):
    x, branch, weight = inputs[:3]
    _, total, mean, rstd = output
    ctx.save_for_backward(x if branch is None else total, mean, rstd, weight)
    _remember(ctx, inputs, output)


def _remember(ctx, inputs, output):
    x, branch, _, bias = inputs[:4]
    ctx.mark_non_differentiable(*output[2:], *([output[1]] if branch is None else []))
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype, bias.dtype


def _residual_grads(ctx, grad_total):
    """The same gradient for ``x`` and for ``branch``, each in its dtype."""
    x_dtype, branch_dtype, _ = ctx.dtypes
    if grad_total is None:
        return None, None
    return grad_total.to(x_dtype), None if branch_dtype is None else grad_total.to(branch_dtype)


def _norm_backward(ctx, grad, grad_total, *_):
    total, mean, rstd, weight = ctx.saved_tensors
    if grad is None:
        return *_residual_grads(ctx, grad_total), None, None, None, None
    grad_total, grad_weight, grad_bias = _backward(grad, grad_total, total, mean, rstd, weight)
    return *_residual_grads(ctx, grad_total), grad_weight, grad_bias.to(ctx.dtypes[2]), None, None


def _fake_norm_linear(x, branch, norm_weight, norm_bias, eps, weight, bias):
    total = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)
    return out, total, *_statistics(x)


def _norm_then_linear(x, branch, norm_weight, norm_bias, eps, weight, bias):
    rows, *kept = _norm(x, branch, norm_weight, norm_bias, eps, weight.dtype)
    return linear(rows, weight, bias), *kept


def _save_for_norm_linear(ctx, inputs, output):
    x, branch, norm_weight, norm_bias, eps, weight, bias = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(
        x if branch is None else total, mean, rstd, norm_weight, norm_bias, weight
    )
    ctx.eps = eps
    ctx.bias_dtype = None if bias is None else bias.dtype
    _remember(ctx, inputs, output)


def _norm_linear_backward(ctx, grad, grad_total, *_):
    total, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
    grads = dict.fromkeys(("norm_weight", "norm_bias", "weight", "bias"))
    if grad is not None:
        grad = grad.to(weight.dtype)
        if ctx.needs_input_grad[5]:
            rows = _norm(total, None, norm_weight, norm_bias, ctx.eps, weight.dtype)[0]
            grads["weight"] = weight_grad(grad, rows)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
            grads["bias"] = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        grad_total, grads["norm_weight"], grad_bias = _backward(
            linear(grad, weight.t()), grad_total, total, mean, rstd, norm_weight
        )
        grads["norm_bias"] = grad_bias.to(norm_bias.dtype)
    return (
        *_residual_grads(ctx, grad_total),
        grads["norm_weight"],
        grads["norm_bias"],
        None,
        grads["weight"],
        grads["bias"],
    )


def _refuse_norm(x, branch, weight, bias, eps, dtype):
    return refuse_rows(x, branch, weight, bias, dtype)


def _refuse_backward(grad, grad_total, total, mean, rstd, weight):
    return refuse_rows(total, grad, grad_total, weight)


def _rows(b, n, d, device, dtype):
    return torch.randn(b, n, d, device=device, dtype=dtype)


def _affine(d, device, dtype):
    wide = torch.promote_types(dtype, torch.float32)  # parameters stay wide under autocast
    return [torch.randn(d, device=device, dtype=wide) for _ in range(2)]


def _make_norm(b, n, d, device, dtype):
    x, branch = _rows(b, n, d, device, dtype), _rows(b, n, d, device, dtype)
    return x, branch, *_affine(d, device, dtype), 1e-6, dtype


def _make_backward(b, n, d, device, dtype):
    x, _, weight, bias, eps, _ = _make_norm(b, n, d, device, dtype)
    _, _, mean, rstd = reference.norm(x, None, weight, bias, eps, dtype)
    return _rows(b, n, d, device, dtype), _rows(b, n, d, device, dtype), x, mean, rstd, weight


def _make_norm_linear(b, n, d, device, dtype):
    x, branch, weight, bias, eps, _ = _make_norm(b, n, d, device, dtype)
    linear = torch.randn(d + 2, d, device=device, dtype=dtype)
    return x, branch, weight, bias, eps, linear, linear[:, 0].clone()


SHAPES = {
    "edge": dict(b=2, n=5, d=7),
    "edge_one_value": dict(b=1, n=1, d=1),
    "edge_empty": dict(b=0, n=4, d=8),
    "edge_encoder": dict(b=1, n=50, d=64),
    "edge_h14": dict(b=1, n=65, d=3),
    "edge_decoder": dict(b=1, n=197, d=16),
    "edge_decoder_h14": dict(b=1, n=257, d=2),
    "edge_wide": dict(b=1, n=2, d=1280),
    "encoder_l": dict(b=256, n=50, d=1024),
    "decoder": dict(b=256, n=197, d=512),
}

_norm = Op(
    "norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_norm,
    implementations={
        "reference": reference.norm,
        "triton": Implementation("fastmim.kernels.norm:norm", accepts=_refuse_norm),
        "cpp": Implementation(Native("norm"), accepts=_native_norm_accepts),
    },
    shapes=SHAPES,
    make=_make_norm,
    setup_context=_save_for_norm,
    backward=_norm_backward,
)
_backward = Op(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor mean, Tensor rstd, "
    "Tensor weight) -> (Tensor, Tensor, Tensor)",
    fake=_fake_norm_backward,
    implementations={
        "reference": reference.norm_backward,
        "triton": Implementation("fastmim.kernels.norm:norm_backward", accepts=_refuse_backward),
        "cpp": Implementation(Native("norm_backward"), accepts=_native_norm_backward_accepts),
    },
    shapes=SHAPES,
    make=_make_backward,
)
_norm_linear = Op(
    "norm_linear(Tensor x, Tensor? branch, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_norm_linear,
    implementations={
        "reference": reference.norm_linear,
        "triton": _norm_then_linear,
        "cpp": Implementation(_norm_then_linear, accepts=_native_norm_linear_accepts),
    },
    shapes=SHAPES,
    make=_make_norm_linear,
    setup_context=_save_for_norm_linear,
    backward=_norm_linear_backward,
)
