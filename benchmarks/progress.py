"""One line that says what is being measured; on a terminal it is written over."""

import sys
import time
from typing import TextIO


class Progress:
    """Prints lines about progress, with the seconds since the start.

    Args:
        out: Where to; a terminal shows the last line only.
    """

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out, self._live = out, out.isatty()
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - self._start:4.0f} s] {text}"
        self._write(f"\r\x1b[K{line[:100]}" if self._live else f"{line}\n")

    def clear(self) -> None:
        """Leave the terminal's line to what is printed next."""
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
