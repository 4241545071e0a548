"""Position tables: which grid they are of, and the same for another one."""

import math

import torch
from torch import Tensor

from fastmim.nn import resize_pos_embed, sincos_pos_embed

TABLES = ("pos_embed", "decoder_pos_embed")


def is_sincos(table: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a table (1, N + 1, D) is the fixed one of that grid; an EMA's rounding is allowed."""
    if table.shape[-1] % 4:
        return False
    return torch.allclose(table.float(), sincos_pos_embed(table.shape[-1], grid), atol=1e-4)


def grid_of(table: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a table (1, N + 1, D).

    A fixed table tells them; a learnt one is taken as square, or gives None if it cannot be.
    """
    count = table.shape[1] - 1
    root = math.isqrt(count)
    square = [(root, root)] if root * root == count else []
    others = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    for grid in square + others:
        if is_sincos(table, grid):
            return grid
    return square[0] if square else None


def resized(
    state: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int], *, sincos: bool
) -> dict[str, Tensor]:
    """A state_dict with its position tables for another grid.

    Args:
        state: Published names.
        old: Rows and columns of patches in ``state``.
        new: Those wanted.
        sincos: Compute the fixed tables anew instead of resampling.

    Raises:
        ValueError: If ``sincos`` would throw away learnt positions.
    """
    changed = dict(state)
    for name in TABLES:
        if name not in state:
            continue
        if not sincos:
            changed[name] = resize_pos_embed(state[name], old, new)
        elif is_sincos(state[name], old):
            changed[name] = sincos_pos_embed(state[name].shape[-1], new).to(state[name].dtype)
        else:
            raise ValueError(
                f"convert: {name} is learnt, not sine-cosine; pass --positions bicubic to resample"
            )
    return changed
