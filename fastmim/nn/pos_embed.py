"""Fixed sine-cosine position table of a patch grid (MAE, arXiv:2111.06377, appendix A.1)."""

import torch
import torch.nn.functional as F
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


def resize_pos_embed(
    table: Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]
) -> Tensor:
    """Bicubic interpolation of a position table to another grid; the cls row stays.

    As fine-tuning does it (MAE, arXiv:2111.06377): align_corners=False. 16-bit tables are resampled
    in float32.

    Args:
        table: (1, rows * columns + 1, D).
        grid_size: Rows and columns of the table.
        new_grid_size: Rows and columns wanted; the same ones give the table itself.

    Returns:
        (1, M + 1, D) for M patches of the new grid, dtype of ``table``.

    Raises:
        ValueError: If the table is not of ``grid_size``.
    """
    rows, columns = grid_size
    if table.ndim != 3 or table.shape[:2] != (1, rows * columns + 1):
        raise ValueError(
            f"resize_pos_embed: expected a table (1, {rows * columns + 1}, D) for {rows} x "
            f"{columns} patches and a cls token, got {tuple(table.shape)}"
        )
    if tuple(grid_size) == tuple(new_grid_size):
        return table
    grid = table[:, 1:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    grid = grid.to(torch.promote_types(table.dtype, torch.float32))
    grid = F.interpolate(grid, tuple(new_grid_size), mode="bicubic", align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], patches], dim=1)
