"""GPU attention kernels of PyTorch and xformers, over views (B, N, H, D) of the projections.

All of them return the natural logarithm of the sum of exponentials of the scaled scores, so forward
and backward pass need not come from the same library, or may come from ours. The gradients of q, k
and v are separate tensors.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops._registry import compute_capability, installed

aten = torch.ops.aten


class Call(NamedTuple):
    """What decides who can serve a call.

    Attributes:
        queries: M, of one image; of the longest sequence.
        keys: N, likewise.
        head_dim: D.
        dtype: Of queries, keys and values.
        device: Theirs.
        scale: Of the scores.
        varlen: Whether the sequences have various lengths.
        empty: Whether there is nothing to compute.
    """

    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    varlen: bool
    empty: bool


@dataclass(frozen=True)
class Library:
    """One library's kernels.

    Args:
        forward: q (B, H, M, D), k, v (B, H, N, D) and the scale to out (B, H, M, D) and lse
            (B, H, M).
        backward: grad (B, H, M, D), q, k, v, out, lse, scale to the gradients of q, k and v.
        dtypes: Those of q, k and v.
        max_head_dim: D is a multiple of 8 up to this.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int


def _flash(q, k, v, scale):
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _flash_backward(grad, q, k, v, out, lse, scale):
    m, n = q.shape[2], k.shape[2]
    seed = torch.empty(2, device=q.device, dtype=torch.uint64)  # of a dropout that is off
    return aten._scaled_dot_product_flash_attention_backward(
        *(grad, q, k, v, out, lse, None, None, m, n, 0.0, False, seed, seed[0]), scale=scale
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
    m, n = q.shape[2], k.shape[2]
    seed = torch.empty((), device=q.device, dtype=torch.int64)
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, q, k, v, out, lse[..., None], seed, seed, None, None, None, m, n, 0.0, False),
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


def library_for(name: str | None, call: Call) -> str:
    """``name``, or PyTorch's usual choice: flash for 16 bits from sm_80 on, else efficient."""
    if name is not None:
        return name
    return "flash" if call.dtype in _HALF and _has_flash(call.device) else "efficient"


def _has_flash(device: torch.device) -> bool:
    return (compute_capability(device) or (8, 0)) >= (8, 0)


def refuses(name: str, call: Call) -> str | None:
    """Why the library cannot serve; None if it can."""
    library = LIBRARIES[name]
    if name == "xformers" and not installed("xformers"):
        return "xformers is not installed; pip install 'fastmim[xformers]'"
    dtypes = _HALF if name == "xformers" and call.varlen else library.dtypes
    if call.dtype not in dtypes:
        names = ", ".join(str(t).removeprefix("torch.") for t in dtypes)
        return f"{name} attention takes {names}, not {call.dtype}"
    if call.head_dim % 8 or call.head_dim > library.max_head_dim:
        limit = library.max_head_dim
        return f"{name} attention takes head dims that are multiples of 8 up to {limit}"
    if call.empty:
        return f"{name} attention does not take empty tensors"
    if name in ("flash", "cudnn") and not _has_flash(call.device):
        return f"{name} attention needs a GPU from compute capability 8.0 on"
    return None


def attention(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, M, H, D), k and v (B, N, H, D) to out (B, M, H, D) and lse (B, H, M)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = LIBRARIES[name].forward(q, k, v, scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def attention_backward(
    name: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each like its tensor."""
    grad, out = grad.contiguous(), out.contiguous()
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    grads = LIBRARIES[name].backward(grad, q, k, v, out, lse.contiguous(), scale)
    return tuple(g.transpose(1, 2) for g in grads)


def varlen(
    name: str, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """qkv (T, 3, H, D) to out (T, H, D) and lse (H, T); waits for the GPU unless it is flash."""
    q, k, v = qkv.contiguous().unbind(1)
    if name == "flash":
        given = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False)
        return aten._flash_attention_forward(q, k, v, *given, scale=scale)[:2]
    if name == "xformers":
        return _xformers_varlen(q, k, v, _block_diagonal(cu_seqlens), scale)
    parts = [
        attention(name, *(t[None, a:b] for t in (q, k, v)), scale)
        for a, b in itertools.pairwise(cu_seqlens.tolist())
        if a < b
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def varlen_backward(
    name: str,
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Gradient of qkv, likewise."""
    q, k, v = qkv.contiguous().unbind(1)
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    if name == "flash":
        seed = torch.empty(2, device=q.device, dtype=torch.uint64)  # of a dropout that is off
        given = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, seed, seed[0])
        grads = aten._flash_attention_backward(grad, q, k, v, out, lse, *given, scale=scale)
        return torch.stack(grads[:3], dim=1)
    if name == "xformers":
        mask = _block_diagonal(cu_seqlens)
        return torch.stack(_xformers_varlen_backward(grad, q, k, v, out, lse, mask, scale), dim=1)
    parts = [
        attention_backward(
            name, *(t[None, a:b] for t in (grad, q, k, v, out)), lse[None, :, a:b], scale
        )
        for a, b in itertools.pairwise(cu_seqlens.tolist())
        if a < b
    ]
    return torch.cat([torch.stack(grads, dim=2)[0] for grads in parts])


def _block_diagonal(cu_seqlens: Tensor):
    from xformers.ops import fmha

    lengths = [b - a for a, b in itertools.pairwise(cu_seqlens.tolist())]
    return fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=cu_seqlens.device)


def _xformers_varlen(q, k, v, mask, scale: float) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    q, k, v = (t[None] for t in (q, k, v))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, mask, scale=scale, op=fmha.flash.FwOp
    )
    return out[0], lse[0, :, : q.shape[1]]


def _xformers_varlen_backward(grad, q, k, v, out, lse, mask, scale: float) -> tuple[Tensor, ...]:
    from xformers.ops import fmha

    grad, q, k, v, out = (t[None] for t in (grad, q, k, v, out))
    grads = fmha.memory_efficient_attention_backward(
        grad, out, lse[None], q, k, v, mask, scale=scale, op=fmha.flash.BwOp
    )
    return tuple(g[0] for g in grads)
