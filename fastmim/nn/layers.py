"""Pre-norm transformer block (ViT, arXiv:2010.11929), parameter names as in timm and MAE."""

from collections.abc import Callable

from torch import Tensor, nn

from fastmim.ops import attention, gather_tokens


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
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

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
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.fc2(self.act(self.fc1(x)))


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

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Transform tokens, each of which attends to all.

        Args:
            x: (B, N, D).
            ids: (B, K), int64: the tokens wanted. What follows the attention is then computed for
                these alone. Default: all.

        Returns:
            (B, K, D) in the order of ``ids``, or (B, N, D).
        """
        mixed = self.attn.mix(self.norm1(x))
        if ids is not None:
            x, mixed = gather_tokens(x, ids), gather_tokens(mixed, ids)
        x = x + self.attn.proj(mixed)
        return x + self.mlp(self.norm2(x))
