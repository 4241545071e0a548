"""Pre-norm transformer block (ViT, arXiv:2010.11929), parameter names as in timm and MAE."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.ops import attention, bias_gelu, gather_tokens, linear, norm


class Residual(NamedTuple):
    """A residual stream whose last addition is still to be done: the next normalisation does it.

    Attributes:
        x: (B, N, D).
        branch: (B, N, D), to be added to ``x``; or None.
    """

    x: Tensor
    branch: Tensor | None = None

    def total(self) -> Tensor:
        """(B, N, D), the sum."""
        return self.x if self.branch is None else self.x + self.branch


def add_norm(layer: nn.Module, stream: Residual) -> tuple[Tensor, Tensor]:
    """Normalise a residual stream: one operator if ``layer`` is a plain LayerNorm.

    Args:
        layer: The normalisation of a width.
        stream: (B, N, D).

    Returns:
        The normalised tokens and the stream after its addition, both (B, N, D).
    """
    if type(layer) is nn.LayerNorm and layer.weight is not None and layer.bias is not None:
        return norm(stream.x, layer.weight, layer.bias, eps=layer.eps, branch=stream.branch)
    total = stream.total()
    return layer(total), total


class Linear(nn.Linear):
    """``torch.nn.Linear`` served by :func:`fastmim.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection ``qkv``.

    Args:
        dim: D, width of a token.
        num_heads: H; must divide D.

    Raises:
        ValueError: If H does not divide D.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.proj(self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        """Attention without the output projection: (B, N, D) to (B, N, D)."""
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads)
        return attention(qkv).view(b, n, d)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them.

    Args:
        dim: D, width of a token.
        hidden_dim: Width between the layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        if type(self.fc1) is not Linear:  # replaced, by an adapter for example
            return self.fc2(F.gelu(self.fc1(x)))
        return self.fc2(bias_gelu(linear(x, self.fc1.weight), self.fc1.bias))


class Block(nn.Module):
    """``x = x + Attention(LN(x)); x = x + Mlp(LN(x))``.

    Args:
        dim: D, width of a token.
        num_heads: Heads of the attention.
        mlp_ratio: Hidden width of the MLP divided by D.
        norm_layer: Makes a normalisation for a width.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor | Residual, ids: Tensor | None = None) -> Tensor | Residual:
        """Transform tokens, each of which attends to all.

        Args:
            x: (B, N, D); or a :class:`Residual`, whose addition is then done on the way and whose
                successor leaves its own to the next block.
            ids: (B, K), int64: the tokens wanted. What follows the attention is then computed for
                these alone. Default: all.

        Returns:
            (B, K, D) in the order of ``ids``, or (B, N, D); a :class:`Residual` for one.
        """
        tokens, total = add_norm(self.norm1, x if isinstance(x, Residual) else Residual(x))
        mixed = self.attn.mix(tokens)
        if ids is not None:
            total, mixed = gather_tokens(total, ids), gather_tokens(mixed, ids)
        tokens, total = add_norm(self.norm2, Residual(total, self.attn.proj(mixed)))
        stream = Residual(total, self.mlp(tokens))
        return stream if isinstance(x, Residual) else stream.total()
