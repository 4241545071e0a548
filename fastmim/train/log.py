"""What a person sees of a run, and what is kept of it: the progress line and metrics.jsonl."""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastmim.train.engine import StepResult

_PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal
_WINDOW = 20  # steps over which the rate on the progress line is taken

console = Console(file=sys.stderr, highlight=False, soft_wrap=True)


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Memory in use now and at most so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return (
            torch.cuda.memory_allocated(device) / 2**30,
            torch.cuda.max_memory_allocated(device) / 2**30,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        now_bytes = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        now_bytes = peak_bytes
    return now_bytes / 2**30, peak_bytes / 2**30


class Metrics:
    """Lines of metrics.jsonl: means over ``log_every`` steps, and anything else with a step.

    Args:
        path: The file; lines of later steps than ``step`` are dropped, for they will come again.
        step: Steps that are done.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self.path = path
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run

    def write(self, step: int, values: dict) -> None:
        """Append one line; numbers that are not finite become null."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> Iterator[dict]:
    """Whole lines of a metrics file; a line cut by a kill is left out."""
    if not path.exists():
        return
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def read_metrics(path: Path) -> list[dict]:
    """All lines of a metrics file."""
    return list(_lines(path))


class RunLog:
    """Averages steps into metrics.jsonl and keeps the progress line up to date.

    Args:
        metrics: Where lines go.
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
        *,
        device: torch.device,
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        log_every: int,
    ) -> None:
        self.metrics = metrics
        self.device = device
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.log_every = log_every
        self._window: list[StepResult] = []
        self._last_print = time.perf_counter()
        self._seconds = self._wait = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # seconds, of them waiting
        self._progress = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("first step", total=total_steps, completed=first_step)
        self._progress.start()

    def step(self, done: int, result: StepResult, seconds: float, wait: float) -> None:
        """Take in one optimizer step.

        Args:
            done: Steps done now.
            result: Of the step.
            seconds: The step took, waiting included.
            wait: Of these, waiting for images.
        """
        self._recent.append((seconds, wait))
        self._window.append(result)
        self._seconds += seconds
        self._wait += wait
        if done % self.log_every == 0 or done == self.total_steps:
            self._write(done)
        text = self._line(done, result)
        self._progress.update(self._task, completed=done, description=text)
        now = time.perf_counter()
        due = now - self._last_print > _PLAIN_SECONDS
        if not console.is_terminal and (due or done == self.total_steps):
            console.print(text)
            self._last_print = now

    def _write(self, done: int) -> None:
        seconds, count = self._seconds, len(self._window)
        good = [r for r in self._window if not r.skipped]
        last = self._window[-1]
        means = {
            name: sum(r.losses[name] for r in good) / len(good) if good else math.nan
            for name in last.losses
        }
        self.metrics.write(
            done,
            {
                "epoch": round(done / self.steps_per_epoch, 4),
                **means,
                "lr": last.lr,
                "momentum": last.momentum,
                "grad_norm": last.grad_norm,
                "skipped_steps": count - len(good),
                "images_per_second": round(count * self.batch_size / seconds, 2),
                "data_wait": round(self._wait / seconds, 4),
                "peak_memory_gib": round(memory_gib(self.device)[1], 3),
                "seconds": round(seconds, 3),
            },
        )
        self._window.clear()
        self._seconds = self._wait = 0.0

    def _line(self, done: int, result: StepResult) -> str:
        seconds = sum(s for s, _ in self._recent)
        wait = sum(w for _, w in self._recent)
        per_step = seconds / len(self._recent)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in result.losses.items())
        now, peak = memory_gib(self.device)
        return (
            f"step {done}/{self.total_steps}  epoch {done / self.steps_per_epoch:.1f}  {losses}  "
            f"{self.batch_size / per_step:.0f} images/s  data wait {100 * wait / seconds:.0f}%  "
            f"{now:.2f} GiB (peak {peak:.2f})  "
            f"ETA {duration((self.total_steps - done) * per_step)}"
        )

    def say(self, text: str) -> None:
        """Print above the progress line."""
        console.print(text, markup=False)

    def close(self) -> None:
        """End the progress line and close the file."""
        self._progress.stop()
        self.metrics.close()


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
