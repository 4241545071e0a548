"""What a person sees of a run, and what is kept of it: the progress line and metrics.jsonl."""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastmim.train.distributed import rank
from fastmim.train.engine import StepResult

_PLAIN_SECONDS = 10.0  # at most between progress lines where there is no terminal
_LIVE_SECONDS = 0.1  # at least between redraws on a terminal
_RECENT = 20  # steps over which the rate on the progress line is taken
_BAR = 16  # columns

_console = Console(stderr=True)


def say(text: str) -> None:
    """Print for a person, on standard error, above the progress line if there is one.

    Of several processes rank 0 alone does.
    """
    if rank() == 0:
        _console.print(text, markup=False, highlight=False, soft_wrap=True)


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Memory in use now and at most so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return (
            torch.cuda.memory_allocated(device) / 2**30,
            torch.cuda.max_memory_allocated(device) / 2**30,
        )
    try:
        # Not getrusage's peak: on Linux that one starts as the peak of the process that forked.
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {name: text for name, _, text in (line.partition(":") for line in lines)}
        return tuple(int(kib[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):  # no Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, else KiB
        return peak, peak


class Metrics:
    """Lines of metrics.jsonl: means over ``log_every`` steps, and anything else with a step.

    A line is one write, so a kill leaves whole lines. One that cannot be written, as on a full
    disk, is told once and left out: training is worth more than its log.

    Args:
        path: The file; lines of later steps than ``step`` are dropped, for they will come again.
            None: nothing is kept.
        step: Steps that are done.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
        self._torn = self._told = False

    def write(self, step: int, values: dict) -> None:
        """Append one line; numbers that are not finite become null."""
        if self.path is None:
            return
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        # A line that was cut short is ended first: only that one is lost to a reader.
        line = b"\n" * self._torn + json.dumps({"step": step, **finite}).encode() + b"\n"
        try:
            self._torn = self._file.write(line) < len(line)
        except OSError as error:
            if not self._told:
                say(f"warning: {self.path} lacks lines from step {step} on: {error.strerror}")
            self._told = True

    def close(self) -> None:
        if self.path is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """All whole lines of a metrics file; one that was cut short is left out."""
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict]:
    if not path.exists():
        return
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


@dataclass
class Window:
    """Sums over the steps since the last line of metrics.jsonl.

    Part of a checkpoint, so that the lines after a resumption are those of the unbroken run.
    """

    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    wait: float = 0.0
    taught: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # over the steps that were not skipped

    def add(self, result: StepResult, seconds: float, wait: float, taught: float) -> None:
        self.steps += 1
        self.skipped += result.skipped
        self.seconds += seconds
        self.wait += wait
        self.taught += taught
        for name, value in result.losses.items():
            self.losses.setdefault(name, 0.0)
            if not result.skipped:
                self.losses[name] += value

    def means(self) -> dict[str, float]:
        good = self.steps - self.skipped
        return {name: total / good if good else math.nan for name, total in self.losses.items()}


class RunLog:
    """Averages steps into metrics.jsonl and keeps the progress line up to date.

    Args:
        metrics: Where lines go.
        window: Of the checkpoint that the run goes on from, or an empty one.
        device: Whose memory is shown.
        first_step: Steps done before.
        total_steps: Steps of the run.
        steps_per_epoch: Steps in a pass over the data.
        batch_size: Images in a step.
        log_every: Steps between lines.
    """

    def __init__(
        self,
        metrics: Metrics,
        window: Window,
        *,
        device: torch.device,
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        log_every: int,
    ) -> None:
        self.metrics = metrics
        self.window = window
        self.device = device
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.log_every = log_every
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)  # seconds, of them waiting
        self._done = first_step
        self._losses: dict[str, float] = {}
        self._shown = -math.inf  # when the progress line was last drawn
        self._current = True  # whether it shows the last step
        self._live: Live | None = None
        if rank() == 0 and _console.is_terminal and not _console.is_dumb_terminal:
            # Redrawn by the steps: a thread that draws would be forked with the loader's workers.
            self._live = Live(console=_console, auto_refresh=False, transient=True)
            self._live.start()

    def step(
        self, done: int, result: StepResult, seconds: float, wait: float, taught: float = 0.0
    ) -> None:
        """Take in one optimizer step.

        Args:
            done: Steps done now.
            result: Of the step.
            seconds: The step took, waiting included.
            wait: Of these, waiting for images.
            taught: Of these, in the teacher.
        """
        self._done, self._losses = done, result.losses
        self._recent.append((seconds, wait))
        self.window.add(result, seconds, wait, taught)
        if done % self.log_every == 0 or done == self.total_steps:
            self._write(result)
        self._current = False
        pause = _PLAIN_SECONDS if self._live is None else _LIVE_SECONDS
        late = time.perf_counter() + seconds - self._shown > pause  # if the next step were awaited
        if late or done == self.total_steps:
            self._show()

    def _write(self, result: StepResult) -> None:
        window = self.window
        self.metrics.write(
            self._done,
            {
                "epoch": round(self._done / self.steps_per_epoch, 4),
                **window.means(),
                "lr": result.lr,
                "momentum": result.momentum,
                "grad_norm": result.grad_norm,
                "skipped_steps": window.skipped,
                "images_per_second": round(window.steps * self.batch_size / window.seconds, 2),
                "data_wait": round(window.wait / window.seconds, 4),
                "teacher_time": round(window.taught / window.seconds, 4),
                "peak_memory_gib": round(memory_gib(self.device)[1], 3),
                "seconds": round(window.seconds, 3),
            },
        )
        self.window = Window()

    def _show(self) -> None:
        self._shown, self._current = time.perf_counter(), True
        place, values = self._fields()
        if self._live is None:
            say("  ".join([*place[:2], *values, *place[2:]]))
            return
        width, first = _console.width, "  ".join(place)
        if _BAR + 1 + len(first) > width:
            self._live.update(Text("\n".join(_pack([*place, *values], width))), refresh=True)
            return
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(self.total_steps, self._done, width=_BAR), Text(first))
        below = Text("\n".join(_pack(values, width)))
        self._live.update(Group(row, below), refresh=True)

    def _fields(self) -> tuple[list[str], list[str]]:
        """What tells the place in the run, and what was measured."""
        seconds = sum(s for s, _ in self._recent)
        wait = sum(w for _, w in self._recent)
        per_step = seconds / len(self._recent)
        rate = self.batch_size / per_step
        now, peak = memory_gib(self.device)
        place = [
            f"step {self._done}/{self.total_steps}",
            f"epoch {self._done / self.steps_per_epoch:.1f}",
            f"memory {now:.2f} GiB (peak {peak:.2f})",
            f"ETA {duration((self.total_steps - self._done) * per_step)}",
        ]
        values = [
            *(f"{name} {_number(value)}" for name, value in self._losses.items()),
            f"{rate:.{0 if rate >= 10 else 1}f} images/s",
            f"data wait {100 * wait / seconds:.0f}%",
        ]
        return place, values

    def close(self) -> None:
        """Leave the progress line of the last step behind, and close the file."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._current = not self._recent
        if not self._current:
            self._show()
        self.metrics.close()


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _pack(fields: list[str], width: int) -> list[str]:
    """Lines of at most ``width`` columns; a field is never split."""
    lines: list[str] = []
    for text in fields:
        if lines and len(lines[-1]) + 2 + len(text) <= width:
            lines[-1] += "  " + text
        else:
            lines.append(text)
    return lines


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
