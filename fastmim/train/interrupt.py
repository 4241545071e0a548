"""Ctrl-C and the scheduler's signals: finish the step, save, and end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns with SIGUSR1


@contextmanager
def collected_signals() -> Iterator[list[signal.Signals]]:
    """Collect the first interrupting signal instead of dying of it; a second one kills as usual."""
    received: list[signal.Signals] = []
    previous = {}

    def note(number: int, frame) -> None:
        received.append(signal.Signals(number))
        for caught, handler in previous.items():
            signal.signal(caught, handler)
        # Not print: the signal may have come in the middle of one, whose buffer is locked.
        text = f"\n{received[0].name}: finishing this step and saving; again to stop at once\n"
        with suppress(OSError):
            os.write(2, text.encode())

    try:
        for number in _SIGNALS:
            previous[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
