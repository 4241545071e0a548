"""How long each part of a training step takes, in the very steps that are timed."""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from peers.base import PARTS, Batch, StepProgram

_FORWARD = tuple(part for part in PARTS if part not in ("backward", "update"))


class Parts:
    """A program whose methods note when they begin and end.

    On a GPU they do it by events on the stream: what it needs, and the waits for the host. A part
    that another one calls counts for itself alone.

    Args:
        program: Changed: its methods are wrapped.
        device: Where it runs.
    """

    def __init__(self, program: StepProgram, device: torch.device) -> None:
        self._program = program
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []
        self._steps: list[dict[str, float]] = []
        for part, places in program.parts().items():
            for owner, name in places:
                setattr(owner, name, self._noted(getattr(owner, name), part))

    def step(self, batch: Batch) -> None:
        """The program's step. The device must have been waited for since the last one."""
        self._finish()
        backward = torch.Tensor.backward
        torch.Tensor.backward = self._noted(backward, "backward")
        self._begin("other")
        try:
            self._program.step(batch)
        finally:
            torch.Tensor.backward = backward
        self._end()

    def row(self) -> dict:
        """Medians in ms; the device must have been waited for.

        Returns:
            ``parts_ms``: part to ms, in the order of PARTS; ``forward_ms`` is the sum of what is
            neither ``backward_ms`` nor ``update_ms``.
        """
        self._finish()
        ms = {
            part: statistics.median(step.get(part, 0.0) for step in self._steps) * 1e3
            for part in PARTS
            if any(part in step for step in self._steps)
        }
        return dict(
            parts_ms=ms,
            forward_ms=sum(ms.get(part, 0.0) for part in _FORWARD),
            backward_ms=ms["backward"],
            update_ms=ms["update"],
        )

    def _noted(self, function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def noted(*args, **kwargs):
            if not self._open:  # not within a step
                return function(*args, **kwargs)
            self._begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._end()

        return noted

    def _begin(self, part: str) -> None:
        self._open.append(part)
        self._mark(part)

    def _end(self) -> None:
        self._open.pop()
        self._mark(self._open[-1] if self._open else "")

    def _mark(self, part: str) -> None:
        """From here on, time counts for ``part``."""
        if self._on_gpu:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self._marks.append((stamp, part))

    def _finish(self) -> None:
        """Turn the marks of the last step into seconds."""
        if not self._marks:
            return
        seconds: dict[str, float] = defaultdict(float)
        for (begin, part), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        self._marks.clear()
        self._steps.append(dict(seconds))
