"""How kernels that copy or add rows of D values cut them into tiles and find their ids."""

import triton
from torch import Tensor


def columns(width: int) -> int:
    """Columns of a tile, a power of two; wider rows take several tiles.

    256 divides 512, 768, 1024 and 1280, so that no lane is idle at the width of a real model.
    """
    return min(triton.next_power_of_2(width), 256)


def rows_of_ids(ids: Tensor) -> tuple[Tensor, int]:
    """``ids`` (B, K) with neighbours in memory next to each other, and how far its rows are apart.

    The ids of visible or masked patches are columns of ``ids_shuffle``: read where they lie.
    """
    if ids.stride(1) != 1:
        ids = ids.contiguous()
    return ids, ids.stride(0)
