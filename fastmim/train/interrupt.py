"""Ctrl-C and the scheduler's signals: finish the step, save, and end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastmim.train.distributed import rank

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns with SIGUSR1


@contextmanager
def collected_signals(once: bool = True) -> Iterator[list[signal.Signals]]:
    """Collect interrupting signals instead of dying of them.

    Args:
        once: A second one kills as usual. Otherwise none does: of several processes each may get
            the scheduler's signal and the launcher's copy of it, and the launcher kills in the end.
    """
    received: list[signal.Signals] = []
    previous = {}

    def note(number: int, frame) -> None:
        received.append(signal.Signals(number))
        if once:
            for caught, handler in previous.items():
                signal.signal(caught, handler)
        if len(received) > 1 or rank() > 0:
            return
        # Not print: the signal may have come in the middle of one, whose buffer is locked.
        again = "; again to stop at once" if once else ""
        text = f"\n{received[0].name}: finishing this step and saving{again}\n"
        with suppress(OSError):
            os.write(2, text.encode())

    try:
        for number in _SIGNALS:
            previous[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
