"""A tensor times a scalar on its device; internal: the gradients of the losses end in it."""

import torch

from fastmim.ops import reference
from fastmim.ops._limits import refuse_types
from fastmim.ops._registry import Implementation, Op


def _fake_scale(x, factor):
    return x.new_empty(x.shape)


def _scale_cpu(x, factor):
    # One pass: on a CPU PyTorch keeps a scalar tensor in float32 when x has 16 bits.
    return torch.mul(x, factor).contiguous()


def _make(b, n, d, device, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(b, n, d, device=device, dtype=dtype)
    return x, torch.rand((), device=device, dtype=wide) + 0.5


# x of any size, factor a scalar of float32 or float64: the product is rounded once, to the dtype
# of x, so a factor beyond the range of that dtype is as good as any other.
scale = Op(
    "scale(Tensor x, Tensor factor) -> Tensor",
    fake=_fake_scale,
    implementations={
        "reference": reference.scale,
        "cpp": _scale_cpu,
        "triton": Implementation("fastmim.kernels.scale:scale", accepts=refuse_types),
    },
    shapes={
        "edge": dict(b=2, n=5, d=7),
        "edge_empty": dict(b=0, n=2, d=3),
        "edge_one": dict(b=1, n=1, d=1),
        "edge_blocks": dict(b=3, n=25, d=64),
        "vit_b": dict(b=256, n=147, d=768),
    },
    make=_make,
)
