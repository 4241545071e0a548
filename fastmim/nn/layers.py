"""Pre-norm transformer block (ViT, arXiv:2010.11929), parameter names as in timm and MAE."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
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

    def forward(
        self, x: Tensor | Residual, ids: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor | Residual:
        """Transform tokens, each of which attends to all.

        Args:
            x: (B, N, D); or a :class:`Residual`, whose addition is then done on the way and whose
                successor leaves its own to the next block.
            ids: (B, K), int64: the tokens wanted. What follows the attention is then computed for
                these alone. Default: all.
            scale: (B, 2), factors of each image's two branches, attention first. Default: 1.

        Returns:
            (B, K, D) in the order of ``ids``, or (B, N, D); a :class:`Residual` for one.
        """
        tokens, total = add_norm(self.norm1, x if isinstance(x, Residual) else Residual(x))
        mixed = self.attn.mix(tokens)
        if ids is not None:
            total, mixed = gather_tokens(total, ids), gather_tokens(mixed, ids)
        branch = self.attn.proj(mixed)
        if scale is not None:
            branch = _scaled(branch, scale[:, 0])
        tokens, total = add_norm(self.norm2, Residual(total, branch))
        branch = self.mlp(tokens)
        if scale is not None:
            branch = _scaled(branch, scale[:, 1])
        stream = Residual(total, branch)
        return stream if isinstance(x, Residual) else stream.total()


def _scaled(branch: Tensor, scale: Tensor) -> Tensor:
    """Multiplied in the precision of the factors: 1 / 0.9 is off by 2e-3 in bfloat16."""
    return (branch * scale[:, None, None]).to(branch.dtype)


class Blocks(nn.ModuleList):
    """Blocks in a row, with stochastic depth (arXiv:1603.09382) in training mode.

    Block i leaves out each of its two branches, image by image, with probability ``rates[i]``,
    which rises linearly from 0 to ``drop_path``, and divides those it keeps by ``1 - rates[i]``.

    Args:
        blocks: The blocks.
        drop_path: Rate of the last block, in [0, 1).

    Raises:
        ValueError: If the rate is out of range.
    """

    def __init__(self, blocks: Iterable[Block] = (), drop_path: float = 0.0) -> None:
        super().__init__(blocks)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path: expected a rate in [0, 1), got {drop_path}")
        steps = max(len(self) - 1, 1)
        self.rates = tuple(drop_path * i / steps for i in range(len(self)))

    @property
    def num_draws(self) -> int:
        """Uniform numbers that an image needs: two for each block with a rate above 0."""
        return 2 * sum(rate > 0 for rate in self.rates)

    def forward(
        self, stream: Residual, *, ids: Tensor | None = None, draws: Tensor | None = None
    ) -> Residual:
        """Transform tokens block by block.

        Args:
            stream: (B, N, D).
            ids: (B, K), int64: the tokens wanted of the last block. Default: all.
            draws: (B, num_draws), in [0, 1): two numbers for each block that drops, attention
                first; a branch stays if its number is at least the rate. Default: drawn from
                torch's global generator. Unused outside training mode.
        """
        dropped = self.training and self.num_draws > 0
        if dropped and draws is None:
            draws = torch.rand(stream.x.shape[0], self.num_draws, device=stream.x.device)
        used = 0
        for i, (block, rate) in enumerate(zip(self, self.rates, strict=True)):
            scale = None
            if dropped and rate > 0:
                scale = (draws[:, used : used + 2] + (1 - rate)).floor() / (1 - rate)
                used += 2
            stream = block(stream, ids if i == len(self) - 1 else None, scale)
        return stream
