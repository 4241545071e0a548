"""``python -m fastmim`` is the command ``fastmim``."""

import sys

from fastmim.cli import main

sys.exit(main())
