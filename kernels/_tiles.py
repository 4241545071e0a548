"""How kernels that copy or add rows of D values cut them into tiles."""

import triton

MAX_COLUMNS = 256  # divides 512, 768, 1024 and 1280: no lane of a real width is idle
MAX_ROWS = 16  # 16 x 256 values on 128 threads: 4 loads of 16 bytes in flight per thread in bf16


def columns(width: int) -> int:
    """Columns of a tile, a power of two; rows wider than that take several tiles."""
    return min(triton.next_power_of_2(width), MAX_COLUMNS)
