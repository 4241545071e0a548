"""The command ``fastmim``, also ``python -m fastmim``."""

import os
import sys


def main() -> int:
    """Run the command line of this process; see :func:`fastmim.cli.main`."""
    # Read by OpenMP when torch is first imported. Threads that wait by spinning, its default, are
    # 20 times slower as soon as another process wants a core (measured: 2 cores, ViT of width 128).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fastmim import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
