"""How kernels that copy or add rows of D values cut them into tiles."""

import triton


def columns(width: int) -> int:
    """Columns of a tile, a power of two; wider rows take several tiles.

    256 divides 512, 768, 1024 and 1280, so that no lane is idle at the width of a real model.
    """
    return min(triton.next_power_of_2(width), 256)
