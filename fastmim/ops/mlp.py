"""Bias and exact GELU of a transformer's MLP, alone or followed by a linear layer."""

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._limits import refuse_native, refuse_types
from fastmim.ops._registry import Implementation, Native, Op
from fastmim.ops.linear import linear, weight_grad


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``out = gelu(x + bias)`` with the exact (erf) GELU.

    Hendrycks & Gimpel (arXiv:1606.08415). ``x`` and ``bias`` are kept for the backward pass, the
    sum is not.

    Args:
        x: (..., D), floating point: the product of the layer before, without its bias.
        bias: (D,), floating point.

    Returns:
        (..., D), contiguous, dtype of ``x``. The arithmetic is in float32 (float64 for float64).

    Raises:
        ValueError: If ``bias`` does not fit.
    """
    _check("bias_gelu", x, bias)
    return _bias_gelu(x, bias)


def bias_gelu_linear(x: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor | None) -> Tensor:
    """``out = linear(gelu(x + bias))``, keeping ``x`` alone for the backward pass.

    The activation is made again when the gradient of ``weight`` is taken: 8 to 16 bytes less for
    each token and value of width in an MLP of ratio 4, at the price of one more activation.

    Args:
        x: (..., D), floating point: the product of the layer before, without its bias.
        bias: (D,), floating point.
        weight: (E, D), of the linear layer, in the dtype of ``x`` or wider.
        out_bias: (E,) or None.

    Returns:
        (..., E), contiguous, dtype of ``x``.

    Raises:
        ValueError: If the sizes do not fit.
    """
    _check("bias_gelu_linear", x, bias)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"bias_gelu_linear: expected weight (E, {x.shape[-1]}) for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    out_bias = None if out_bias is None else out_bias.to(x.dtype)
    return _bias_gelu_linear(x, bias, weight.to(x.dtype), out_bias)


def _check(function: str, x: Tensor, bias: Tensor) -> None:
    if x.ndim == 0 or not x.is_floating_point() or tuple(bias.shape) != tuple(x.shape[-1:]):
        raise ValueError(
            f"{function}: expected x (..., D) of floating point and bias (D,), "
            f"got {tuple(x.shape)} of {x.dtype} and {tuple(bias.shape)}"
        )


def _fake_bias_gelu(x, bias):
    return x.new_empty(x.shape)


def _fake_bias_gelu_backward(grad, x, bias):
    return x.new_empty(x.shape), torch.empty_like(bias)


def _save_for_bias_gelu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _bias_gelu_backward(ctx, grad):
    return _backward(grad, *ctx.saved_tensors)


def _fake_bias_gelu_linear(x, bias, weight, out_bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _bias_gelu_then_linear(x, bias, weight, out_bias):
    return linear(_bias_gelu(x, bias), weight, out_bias)


def _save_for_bias_gelu_linear(ctx, inputs, output):
    x, bias, weight, out_bias = inputs
    ctx.save_for_backward(x, bias, weight)
    ctx.has_out_bias = out_bias is not None


def _bias_gelu_linear_backward(ctx, grad):
    x, bias, weight = ctx.saved_tensors
    grad_weight = grad_out_bias = None
    if ctx.needs_input_grad[2]:
        grad_weight = weight_grad(grad, _bias_gelu(x, bias))
    if ctx.has_out_bias and ctx.needs_input_grad[3]:
        grad_out_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    grad_x, grad_bias = _backward(linear(grad, weight.t()), x, bias)
    return grad_x, grad_bias, grad_weight, grad_out_bias


def _make_bias_gelu(b, n, d, device, dtype):
    wide = torch.promote_types(dtype, torch.float32)  # parameters stay wide under autocast
    x = torch.randn(b, n, d, device=device, dtype=dtype)
    return x, torch.randn(d, device=device, dtype=wide)


def _make_backward(b, n, d, device, dtype):
    grad = torch.randn(b, n, d, device=device, dtype=dtype)
    return grad, *_make_bias_gelu(b, n, d, device, dtype)


def _make_bias_gelu_linear(b, n, d, device, dtype):
    weight = torch.randn(d + 2, d, device=device, dtype=dtype)
    return *_make_bias_gelu(b, n, d, device, dtype), weight, weight[:, 0].clone()


SHAPES = {
    "edge": dict(b=2, n=5, d=7),
    "edge_one_value": dict(b=1, n=1, d=1),
    "edge_empty": dict(b=0, n=4, d=8),
    "edge_encoder": dict(b=1, n=50, d=64),
    "edge_h14": dict(b=1, n=65, d=3),
    "edge_decoder": dict(b=1, n=197, d=16),
    "edge_decoder_h14": dict(b=1, n=257, d=2),
    "edge_wide": dict(b=1, n=2, d=1280),
    "encoder_l": dict(b=256, n=50, d=4096),
    "decoder": dict(b=256, n=197, d=2048),
}

_bias_gelu = Op(
    "bias_gelu(Tensor x, Tensor bias) -> Tensor",
    fake=_fake_bias_gelu,
    implementations={
        "reference": reference.bias_gelu,
        "triton": Implementation("fastmim.kernels.mlp:bias_gelu", accepts=refuse_types),
        "cpp": Implementation(Native("bias_gelu"), accepts=refuse_native),
    },
    shapes=SHAPES,
    make=_make_bias_gelu,
    setup_context=_save_for_bias_gelu,
    backward=_bias_gelu_backward,
)
_backward = Op(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    fake=_fake_bias_gelu_backward,
    implementations={
        "reference": reference.bias_gelu_backward,
        "triton": Implementation("fastmim.kernels.mlp:bias_gelu_backward", accepts=refuse_types),
        "cpp": Implementation(Native("bias_gelu_backward"), accepts=refuse_native),
    },
    shapes=SHAPES,
    make=_make_backward,
)
_bias_gelu_linear = Op(
    "bias_gelu_linear(Tensor x, Tensor bias, Tensor weight, Tensor? out_bias) -> Tensor",
    fake=_fake_bias_gelu_linear,
    implementations={
        "reference": reference.bias_gelu_linear,
        "triton": _bias_gelu_then_linear,
        "cpp": Implementation(_bias_gelu_then_linear, accepts=refuse_native),
    },
    shapes=SHAPES,
    make=_make_bias_gelu_linear,
    setup_context=_save_for_bias_gelu_linear,
    backward=_bias_gelu_linear_backward,
)
