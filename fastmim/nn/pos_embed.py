"""Fixed sine-cosine position table of a patch grid (MAE, arXiv:2111.06377, appendix A.1)."""

import torch
from torch import Tensor


def sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Position table with a zero row for the cls token, then patches row-major.

    The patch in row y and column x gets ``[E(x), E(y)]``, column first, with
    ``E(t) = [sin(t w), cos(t w)]`` and ``w_k = 10000 ** (-k / (D / 4))`` for k in [0, D / 4).

    Args:
        embed_dim: D, a multiple of 4.
        grid_size: Rows and columns of patches.

    Returns:
        (1, rows * columns + 1, D), float32; computed in float64.

    Raises:
        ValueError: If D is no multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"sincos_pos_embed: expected a width divisible by 4, got {embed_dim}")
    quarter = embed_dim // 4
    frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = grid_size
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    waves = [position.flatten()[:, None] * frequencies for position in (x, y)]
    table = torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, embed_dim), table.float()]).unsqueeze(0)
