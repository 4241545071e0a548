"""Pre-norm transformer block (ViT, arXiv:2010.11929), parameter names as in timm and MAE."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmim.ops import (
    attention,
    attention_queries,
    bias_gelu,
    bias_gelu_linear,
    gather_tokens,
    linear,
    norm,
    norm_linear,
)

# Blocks draw no random numbers: stochastic depth is given its draws.
_CHECKPOINT = dict(use_reentrant=False, preserve_rng_state=False)


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


def _plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether an operator may take the layer's parameters: no subclass, and nobody listens."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks
    return type(layer) is kind and not any((*hooks, layer._backward_pre_hooks))


def add_norm(layer: nn.Module, stream: Residual) -> tuple[Tensor, Tensor]:
    """Normalise a residual stream: one operator if ``layer`` is a plain LayerNorm.

    Args:
        layer: The normalisation of a width.
        stream: (B, N, D).

    Returns:
        The normalised tokens and the stream after its addition, both (B, N, D).
    """
    if _plain(layer, nn.LayerNorm) and layer.weight is not None and layer.bias is not None:
        return norm(stream.x, layer.weight, layer.bias, eps=layer.eps, branch=stream.branch)
    total = stream.total()
    return layer(total), total


class Linear(nn.Linear):
    """``torch.nn.Linear`` served by :func:`fastmim.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        return linear(x, self.weight, self.bias)


# What a block keeps for its backward pass, most first; see Block.
MEMORY_MODES = ("standard", "lean", "recompute_mlp", "checkpoint")


def add_norm_linear(
    norm: nn.Module,
    layer: nn.Module,
    stream: Residual,
    *,
    bias: bool = True,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """``layer(norm(stream))`` that keeps the stream alone for the backward pass.

    Args:
        norm: A plain LayerNorm.
        layer: A plain :class:`Linear`.
        stream: (B, N, D).
        bias: Add the layer's bias.
        part: Of the layer's E outputs, those wanted.

    Returns:
        The layer's output (B, N, E), and the stream after its addition.

    Raises:
        TypeError: If one of them was replaced by a module of another kind, or has forward hooks.
    """
    if not (_plain(norm, nn.LayerNorm) and _plain(layer, Linear)):
        raise TypeError(
            "Block: memory 'lean' and 'recompute_mlp' need torch.nn.LayerNorm and "
            f"fastmim.nn.Linear without hooks, got {type(norm).__name__} and "
            f"{type(layer).__name__}; use 'standard' or 'checkpoint'"
        )
    return norm_linear(
        stream.x,
        norm.weight,
        norm.bias,
        layer.weight[part],
        layer.bias[part] if bias else None,
        eps=norm.eps,
        branch=stream.branch,
    )


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
        return self.proj(self.mix(self.qkv(x)))

    def mix(self, qkv: Tensor) -> Tensor:
        """Attention without the projections: (B, N, 3 * D) to (B, N, D)."""
        b, n, width = qkv.shape
        packed = qkv.view(b, n, 3, self.num_heads, width // (3 * self.num_heads))
        return attention(packed).view(b, n, width // 3)

    def mix_queries(self, q: Tensor, kv: Tensor) -> Tensor:
        """Of some tokens: (B, K, D) and (B, N, 2 * D) to (B, K, D)."""
        (b, k, dim), heads = q.shape, self.num_heads
        parts = q.view(b, k, heads, -1), kv.view(b, kv.shape[1], 2, heads, dim // heads)
        return attention_queries(*parts).view(b, k, dim)


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
        if not _plain(self.fc1, Linear):  # replaced, by an adapter for example
            return self.fc2(F.gelu(self.fc1(x)))
        return self.fc2(bias_gelu(linear(x, self.fc1.weight), self.fc1.bias))

    def contract(self, hidden: Tensor) -> Tensor:
        """What follows the product of ``fc1``, keeping this alone for the backward pass.

        Args:
            hidden: (B, N, hidden_dim), without the bias of ``fc1``.

        Returns:
            (B, N, D).
        """
        return bias_gelu_linear(hidden, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """``x = x + Attention(LN(x)); x = x + Mlp(LN(x))``.

    Args:
        dim: D, width of a token.
        num_heads: Heads of the attention.
        mlp_ratio: Hidden width of the MLP divided by D.
        norm_layer: Makes a normalisation for a width.
        memory: What is kept for the backward pass, and so how much is computed twice. Results are
            the same. Bytes for each token and value of width under bf16 autocast, with a float32
            (bfloat16) residual stream:

            * ``standard``: everything, 36 (32);
            * ``lean``: not the normalised tokens and the activation, 24 (20);
            * ``recompute_mlp``: nor the output of ``fc1``, 16 (12), for one more product;
            * ``checkpoint``: the block's input alone, 4 (2), for a second forward pass.

    Raises:
        ValueError: If the mode is none of these.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: Callable[[int], nn.Module],
        memory: str = "standard",
    ) -> None:
        super().__init__()
        if memory not in MEMORY_MODES:
            raise ValueError(f"Block: expected memory {', '.join(MEMORY_MODES)}, got '{memory}'")
        self.memory = memory
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
            ids: (B, K), int64: the tokens wanted. Queries and what follows are then computed for
                these alone. Default: all.
            scale: (B, 2), factors of each image's two branches, attention first. Default: 1.

        Returns:
            (B, K, D) in the order of ``ids``, or (B, N, D); a :class:`Residual` for one.
        """
        stream = x if isinstance(x, Residual) else Residual(x)
        if self.memory == "checkpoint" and torch.is_grad_enabled():
            stream = checkpoint(self._again, stream.total(), ids, scale, **_CHECKPOINT)
        else:
            stream = self._transform(stream, ids, scale)
        return stream if isinstance(x, Residual) else stream.total()

    def _again(self, x: Tensor, ids: Tensor | None, scale: Tensor | None) -> Residual:
        return self._transform(Residual(x), ids, scale)

    @property
    def lean(self) -> bool:
        """Whether normalised tokens are made again in the backward pass."""
        return self.memory in ("lean", "recompute_mlp")

    def _transform(self, stream: Residual, ids: Tensor | None, scale: Tensor | None) -> Residual:
        if ids is not None and _plain(self.attn.qkv, Linear):
            mixed, total = self._attend_from(ids, stream)
        else:
            if self.lean:
                qkv, total = add_norm_linear(self.norm1, self.attn.qkv, stream)
            else:
                tokens, total = add_norm(self.norm1, stream)
                qkv = self.attn.qkv(tokens)
            mixed = self.attn.mix(qkv)
            if ids is not None:
                total, mixed = gather_tokens(total, ids), gather_tokens(mixed, ids)
        branch = self.attn.proj(mixed)
        if scale is not None:
            branch = _scaled(branch, scale[:, 0])
        stream = Residual(total, branch)
        if self.memory == "recompute_mlp" and torch.is_grad_enabled():
            total = stream.total()
            branch = checkpoint(self._expand, total, **_CHECKPOINT)
        elif self.lean:
            hidden, total = add_norm_linear(self.norm2, self.mlp.fc1, stream, bias=False)
            branch = self.mlp.contract(hidden)
        else:
            tokens, total = add_norm(self.norm2, stream)
            branch = self.mlp(tokens)
        if scale is not None:
            branch = _scaled(branch, scale[:, 1])
        return Residual(total, branch)

    def _attend_from(self, ids: Tensor, stream: Residual) -> tuple[Tensor, Tensor]:
        """Attention of the tokens ``ids`` to all, and their residual stream; (B, K, D) both.

        They are normalised once more instead of being copied: their gradient then joins that of the
        residual stream on its way back.
        """
        dim = self.attn.qkv.in_features
        kv, total = self._project(stream, slice(dim, None))
        total = gather_tokens(total, ids)
        q, total = self._project(Residual(total), slice(dim))
        return self.attn.mix_queries(q, kv), total

    def _project(self, stream: Residual, part: slice) -> tuple[Tensor, Tensor]:
        """The outputs ``part`` of the qkv projection, and the stream after its addition."""
        layer = self.attn.qkv
        if self.lean:
            return add_norm_linear(self.norm1, layer, stream, part=part)
        tokens, total = add_norm(self.norm1, stream)
        return linear(tokens, layer.weight[part], layer.bias[part]), total

    def _expand(self, total: Tensor) -> Tensor:
        return self.mlp(add_norm(self.norm2, Residual(total))[0])


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
        residual_dtype: Of the residual stream. Default: that of the tokens, float32 in training.

    Raises:
        ValueError: If the rate is out of range.
    """

    def __init__(
        self,
        blocks: Iterable[Block] = (),
        drop_path: float = 0.0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(blocks)
        self.residual_dtype = residual_dtype
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
        if self.residual_dtype is not None:
            stream = Residual(stream.total().to(self.residual_dtype))
        used = 0
        for i, (block, rate) in enumerate(zip(self, self.rates, strict=True)):
            scale = None
            if dropped and rate > 0:
                scale = (draws[:, used : used + 2] + (1 - rate)).floor() / (1 - rate)
                used += 2
            stream = block(stream, ids if i == len(self) - 1 else None, scale)
        return stream
