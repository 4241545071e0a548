"""Linear layers: PyTorch's, with oneDNN's products for float32 on a CPU."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._registry import Op, autocast_dtype, on_cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out = x weight^T + bias``, as ``torch.nn.functional.linear``.

    In float32 on a CPU with AVX-512 the products are oneDNN's: PyTorch takes MKL's, which on a
    processor that is not Intel's are half as fast (AMD EPYC, 2 threads: 90 against 200 GFLOP/s at
    the sizes of a small ViT). Without AVX-512 MKL's are level, and those of a weight's gradient
    faster by half. Everywhere else and under autocast this is ``torch.nn.functional.linear``
    itself.

    Args:
        x: (..., D), floating point.
        weight: (E, D).
        bias: (E,) or None.

    Returns:
        (..., E), in the dtype of ``x``, or autocast's if it is on.
    """
    if not _onednn_is_faster(x) or autocast_dtype(x) is not None:
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a linear layer's weight: (E, D) from ``grad`` (..., E) and ``x`` (..., D)."""
    if not _onednn_is_faster(x):
        return reference.linear_weight_grad(grad, x)
    return _weight_grad(grad, x)


def _onednn_is_faster(x: Tensor) -> bool:
    return on_cpu(x) and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def _onednn():
    """oneDNN's product on plain tensors; None if this torch has none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # It takes x and weight as they lie, and a bias as if it were contiguous.
    bias = None if bias is None else bias.contiguous()
    return _onednn()(x, weight, bias, "none", [], "")


def _serves(*tensors: Tensor | None) -> bool:
    """Whether oneDNN is to make the product; PyTorch asks it by itself in 16 bits."""
    return _onednn() is not None and all(
        t is None or (t.dtype == torch.float32 and t.numel()) for t in tensors
    )


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _serves(x, weight, bias):
        return F.linear(x, weight, bias)
    out = _product(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _weight_grad_cpu(grad: Tensor, x: Tensor) -> Tensor:
    if not _serves(grad, x):
        return reference.linear_weight_grad(grad, x)
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    # The right operand is reordered for the product; the wider one gains most by it (measured).
    if grad.shape[1] > x.shape[1]:
        return _product(x.t(), grad.t(), None).t().contiguous()
    return _product(grad.t(), x.t(), None)


def _fake_linear(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_weight_grad(grad, x):
    return x.new_empty(grad.shape[-1], x.shape[-1])


def _save_for_linear(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _linear_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _linear(grad, weight.t(), None)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_grad(grad, x)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, grad_weight, grad_bias


def _save_for_weight_grad(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weight_grad_backward(ctx, grad):
    first, x = ctx.saved_tensors
    return _linear(x, grad, None), _linear(first, grad.t(), None)


def _make_linear(b, n, d, e, device, dtype):
    x = torch.randn(b, n, d, device=device, dtype=dtype)
    weight = torch.randn(e, d, device=device, dtype=dtype)
    return x, weight, torch.randn(e, device=device, dtype=dtype)


def _make_weight_grad(b, n, d, e, device, dtype):
    grad, x = (torch.randn(b, n, width, device=device, dtype=dtype) for width in (e, d))
    return grad, x


SHAPES = {
    "edge": dict(b=2, n=5, d=7, e=3),
    "edge_wide": dict(b=1, n=3, d=4, e=33),
    "edge_one": dict(b=1, n=1, d=1, e=1),
    "edge_empty": dict(b=0, n=4, d=8, e=2),
    "encoder_s": dict(b=8, n=50, d=384, e=1536),
    "decoder": dict(b=8, n=197, d=512, e=2048),
}

_linear = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fake_linear,
    implementations={
        "reference": F.linear,
        "triton": F.linear,  # no kernel of ours: PyTorch's product is cuBLAS's
        "cpp": _linear_cpu,
    },
    shapes=SHAPES,
    make=_make_linear,
    setup_context=_save_for_linear,
    backward=_linear_backward,
    twice_differentiable=True,
)
_weight_grad = Op(
    "linear_weight_grad(Tensor grad, Tensor x) -> Tensor",
    fake=_fake_weight_grad,
    implementations={
        "reference": reference.linear_weight_grad,
        "triton": reference.linear_weight_grad,
        "cpp": _weight_grad_cpu,
    },
    shapes=SHAPES,
    make=_make_weight_grad,
    setup_context=_save_for_weight_grad,
    backward=_weight_grad_backward,
    twice_differentiable=True,
)
