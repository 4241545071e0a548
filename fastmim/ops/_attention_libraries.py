"""GPU attention kernels of PyTorch and xformers over packed qkv (B, N, 3, H, D).

All of them return the natural logarithm of the sum of exponentials of the scaled scores, so forward
and backward pass need not come from the same library, or may come from ours. The gradients of q, k
and v are separate tensors and are stacked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops._registry import compute_capability, installed

aten = torch.ops.aten


@dataclass(frozen=True)
class Library:
    """One library's kernels.

    Args:
        forward: q, k, v (B, H, N, D) and the scale to out (B, H, N, D) and lse (B, H, N).
        backward: grad, q, k, v, out (B, H, N, D), lse, scale to the gradients of q, k and v.
        dtypes: Those of qkv.
        max_head_dim: D is a multiple of 8 up to this.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int


def _flash(q, k, v, scale):
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _flash_backward(grad, q, k, v, out, lse, scale):
    n = q.shape[2]
    seed = torch.empty(2, device=q.device, dtype=torch.uint64)  # of a dropout that is off
    return aten._scaled_dot_product_flash_attention_backward(
        *(grad, q, k, v, out, lse, None, None, n, n, 0.0, False, seed, seed[0]), scale=scale
    )


def _efficient(q, k, v, scale):
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out, lse[:, :, : q.shape[2]]  # rows are padded to a multiple of 32


def _efficient_backward(grad, q, k, v, out, lse, scale):
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))  # exp(score - inf) is 0
    seed = torch.empty((), device=q.device, dtype=torch.int64)
    return aten._scaled_dot_product_efficient_attention_backward(
        *(grad, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False]), scale=scale
    )[:3]


def _cudnn(q, k, v, scale):
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse.flatten(2)  # (B, H, N, 1)


def _cudnn_backward(grad, q, k, v, out, lse, scale):
    n = q.shape[2]
    seed = torch.empty((), device=q.device, dtype=torch.int64)
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, q, k, v, out, lse[..., None], seed, seed, None, None, None, n, n, 0.0, False),
        scale=scale,
    )


def _xformers(q, k, v, scale):
    from xformers.ops import fmha

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    return out.transpose(1, 2), lse[:, :, : q.shape[1]]  # some of its kernels pad rows


def _xformers_backward(grad, q, k, v, out, lse, scale):
    from xformers.ops import fmha

    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    grads = fmha.memory_efficient_attention_backward(grad, out, lse, q, k, v, scale=scale)
    return tuple(g.transpose(1, 2) for g in grads)


_HALF = (torch.float16, torch.bfloat16)
LIBRARIES = {
    "flash": Library(_flash, _flash_backward, _HALF, 256),
    "cudnn": Library(_cudnn, _cudnn_backward, _HALF, 128),
    "efficient": Library(_efficient, _efficient_backward, (*_HALF, torch.float32), 256),
    "xformers": Library(_xformers, _xformers_backward, (*_HALF, torch.float32), 256),
}


def library_for(name: str | None, qkv: Tensor) -> str:
    """``name``, or PyTorch's usual choice: flash for 16 bits from sm_80 on, else efficient."""
    if name is not None:
        return name
    return "flash" if qkv.dtype in _HALF and _has_flash(qkv.device) else "efficient"


def _has_flash(device: torch.device) -> bool:
    return (compute_capability(device) or (8, 0)) >= (8, 0)


def refuses(name: str | None, qkv: Tensor) -> str | None:
    """Why the library cannot serve; None if it can. Reads dtype, shape and device."""
    name = library_for(name, qkv)
    library = LIBRARIES[name]
    if name == "xformers" and not installed("xformers"):
        return "xformers is not installed; pip install 'fastmim[xformers]'"
    if qkv.dtype not in library.dtypes:
        names = ", ".join(str(t).removeprefix("torch.") for t in library.dtypes)
        return f"{name} attention takes {names}, not {qkv.dtype}"
    if qkv.shape[-1] % 8 or qkv.shape[-1] > library.max_head_dim:
        limit = library.max_head_dim
        return f"{name} attention takes head dims that are multiples of 8 up to {limit}"
    if qkv.numel() == 0:
        return f"{name} attention does not take empty tensors"
    if name in ("flash", "cudnn") and not _has_flash(qkv.device):
        return f"{name} attention needs a GPU from compute capability 8.0 on"
    return None


def attention(name: str | None, qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.contiguous().permute(2, 0, 3, 1, 4)
    out, lse = LIBRARIES[library_for(name, qkv)].forward(q, k, v, scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def attention_backward(
    name: str | None, grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    q, k, v = qkv.contiguous().permute(2, 0, 3, 1, 4)
    grad, out = (t.contiguous().transpose(1, 2) for t in (grad, out))
    library = LIBRARIES[library_for(name, qkv)]
    grads = library.backward(grad, q, k, v, out, lse.contiguous(), scale)
    return torch.stack([g.transpose(1, 2) for g in grads], dim=2)
