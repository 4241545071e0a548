"""metrics.jsonl, the progress line, memory, and what a resumed run makes of them."""

import io
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastmim.train import log
from fastmim.train.engine import StepResult
from fastmim.train.log import Metrics, RunLog, Window, duration, memory_gib, read_metrics, say

CPU = torch.device("cpu")


def result(loss: float = 1.0, skipped: bool = False) -> StepResult:
    losses = {"loss": loss, "pixel": loss / 2}
    return StepResult(losses, lr=1e-3, momentum=0.9, grad_norm=2.0, skipped=skipped)


def run_log(path: Path, *, done: int = 0, window: Window | None = None, total: int = 100) -> RunLog:
    return RunLog(
        Metrics(path, done),
        window or Window(),
        device=CPU,
        first_step=done,
        total_steps=total,
        steps_per_epoch=10,
        batch_size=8,
        log_every=4,
    )


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in its one entry."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    return now


def terminal(monkeypatch, width: int) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(log, "_console", Console(file=screen, force_terminal=True, width=width))
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_line_holds_means_over_the_steps_since_the_last(path):
    written = run_log(path)
    for step, loss in enumerate((1.0, 2.0, 3.0, 6.0, 5.0), start=1):
        written.step(step, result(loss), seconds=0.5, wait=0.1)
    written.close()
    (line,) = read_metrics(path)
    assert line == {
        "step": 4,
        "epoch": 0.4,
        "loss": 3.0,
        "pixel": 1.5,
        "lr": 1e-3,
        "momentum": 0.9,
        "grad_norm": 2.0,
        "skipped_steps": 0,
        "images_per_second": 16.0,
        "data_wait": 0.2,
        "teacher_time": 0.0,
        "peak_memory_gib": pytest.approx(memory_gib(CPU)[1], rel=0.5),
        "seconds": 2.0,
    }


def test_last_step_always_has_a_line(path):
    written = run_log(path, total=6)
    for step in range(1, 7):
        written.step(step, result(), 1.0, 0.0)
    written.close()
    assert [line["step"] for line in read_metrics(path)] == [4, 6]


def test_skipped_steps_are_counted_and_not_averaged(path):
    written = run_log(path)
    for step, loss in enumerate((1.0, math.nan, math.inf, 3.0), start=1):
        written.step(step, result(loss, skipped=not math.isfinite(loss)), 1.0, 0.0)
    for step in range(5, 9):
        written.step(step, result(math.nan, skipped=True), 1.0, 0.0)
    written.close()
    first, second = read_metrics(path)
    assert (first["loss"], first["skipped_steps"]) == (2.0, 2)
    assert (second["loss"], second["skipped_steps"]) == (None, 4)
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize("stop", range(9))
def test_lines_after_a_resumption_are_those_of_the_unbroken_run(path, stop):
    def steps(written, begin, end):
        for step in range(begin + 1, end + 1):
            written.step(step, result(math.sqrt(step)), seconds=step / 7, wait=step / 70)
        written.close()

    whole = path.with_name("whole.jsonl")
    steps(run_log(whole), 0, 8)
    first = run_log(path)
    steps(first, 0, stop)
    stored = json.loads(json.dumps(vars(first.window)))
    steps(run_log(path), 0, min(8, stop + 3))  # killed after the checkpoint: lines too many
    steps(run_log(path, done=stop, window=Window(**stored)), stop, 8)
    for got, expected in zip(read_metrics(path), read_metrics(whole), strict=True):
        assert got | {"peak_memory_gib": 0} == expected | {"peak_memory_gib": 0}


def test_lines_of_steps_that_will_come_again_are_dropped(path):
    metrics = Metrics(path, 0)
    for step in (5, 10, 10, 15):
        metrics.write(step, {"loss": step / 10})
    metrics.close()
    with open(path, "a") as file:
        file.write('{"step": 20, "lo')  # a kill during a power loss; also lines of others
    with open(path, "a") as file:
        file.write('\n[1]\n{"step": "x"}\nnonsense\n')
    Metrics(path, 10).close()
    assert path.read_text().count("\n") == 3
    assert [line["step"] for line in read_metrics(path)] == [5, 10, 10]


def test_line_that_cannot_be_written_is_told_once_and_training_goes_on(path, capsys):
    metrics = Metrics(path, 0)
    metrics.write(1, {})
    whole, metrics._file = metrics._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    metrics.write(2, {})
    metrics.write(3, {})
    metrics._file.close()
    metrics._file = whole
    metrics.write(4, {})
    metrics.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 4]
    message = f"warning: {path} lacks lines from step 2 on: No space left on device"
    assert capsys.readouterr().err.splitlines() == [message]


def test_line_that_was_cut_short_costs_only_itself(path):
    class Short:
        """Writes half of the first line."""

        def __init__(self, file):
            self.file, self.cut = file, True

        def write(self, data):
            if self.cut:
                self.cut = False
                return self.file.write(data[: len(data) // 2])
            return self.file.write(data)

    metrics = Metrics(path, 0)
    whole, metrics._file = metrics._file, Short(metrics._file)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1.0})
    whole.close()
    assert [line["step"] for line in read_metrics(path)] == [2, 3]


def test_progress_shows_all_that_was_promised(path, capsys):
    written = run_log(path)
    written.step(1, result(), seconds=2.0, wait=0.5)
    written.close()
    (line,) = capsys.readouterr().err.splitlines()
    head, memory = line.split("  memory ")
    assert head == ("step 1/100  epoch 0.1  loss 1.0000  pixel 0.5000  4.0 images/s  data wait 25%")
    now, peak = memory_gib(CPU)
    assert memory == f"{now:.2f} GiB (peak {peak:.2f})  ETA 3:18"


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0.0000"), (1.9e-5, "1.9e-05"), (0.0123, "0.0123"), (12.0, "12.0000"), (math.nan, "nan"),
])  # fmt: skip
def test_small_losses_keep_their_digits(path, capsys, value, text):
    written = run_log(path)
    written.step(1, result(value), 1.0, 0.0)
    written.close()
    assert f"  loss {text}  pixel " in capsys.readouterr().err


def test_without_a_terminal_there_is_a_line_every_ten_seconds(path, clock, capsys):
    written = run_log(path, total=40)
    seen = []
    for step in range(1, 41):
        clock[0] += 3.0
        written.step(step, result(), 3.0, 0.0)
        if capsys.readouterr().err:
            seen.append((step, clock[0]))
    written.close()
    assert seen[0][0] == 1
    assert seen[-1][0] == 40
    assert all(b - a <= 10.0 for (_, a), (_, b) in itertools.pairwise(seen))
    assert len(seen) < 20
    assert capsys.readouterr().err == ""


def test_interrupted_run_ends_with_the_line_of_its_last_step(path, clock, capsys):
    written = run_log(path)
    for step in (1, 2):
        clock[0] += 1.0
        written.step(step, result(), 1.0, 0.0)
    written.close()
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 1/100",
        "step 2/100",
    ]


def test_run_without_steps_shows_no_line(path, capsys):
    run_log(path, done=100).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_on_a_terminal_one_live_display_fits_its_width(path, clock, monkeypatch, width):
    screen = terminal(monkeypatch, width)
    written = run_log(path)
    for step in range(1, 11):
        clock[0] += 1.0
        written.step(step, result(), 1.0, 0.3)
    say("[a message] above")
    live = screen.getvalue()
    written.close()
    assert "\x1b[1A" in live  # drawn over, not scrolled
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", live)
    for text in ("step 10/100", "epoch 1.0", "loss 1.0000", "8.0 images/s", "data wait 30%", "ETA"):
        assert text in shown
    assert "[a message] above\n" in shown
    assert "…" not in shown
    assert all(len(line) <= width for line in shown.splitlines())
    assert screen.getvalue().splitlines()[-1].endswith("ETA 1:30")


def test_live_display_is_redrawn_ten_times_a_second_at_most(path, clock, monkeypatch):
    screen = terminal(monkeypatch, 80)
    written = run_log(path, total=1001)
    for step in range(1, 1001):
        clock[0] += 0.01
        written.step(step, result(), 0.01, 0.0)
    assert 90 <= screen.getvalue().count("epoch") <= 130
    written.close()


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (90061, "25:01:01"),
])  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_memory_is_that_of_the_process():
    status = Path("/proc/self/status").read_text()
    kib = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if "Vm" in line}
    now, peak = memory_gib(CPU)
    assert now == pytest.approx(int(kib["VmRSS"]) / 2**20, rel=0.02)
    assert peak == pytest.approx(int(kib["VmHWM"]) / 2**20, rel=0.02)
    ballast = torch.ones(2**25)  # 128 MiB
    assert memory_gib(CPU)[0] - now == pytest.approx(0.125, rel=0.05)
    del ballast
    assert memory_gib(CPU)[0] - now == pytest.approx(0, abs=0.01)
    assert memory_gib(CPU)[1] >= now + 0.124


def test_memory_is_known_without_proc(monkeypatch):
    def missing(self, **_):
        raise FileNotFoundError

    expected = memory_gib(CPU)[1]
    monkeypatch.setattr(Path, "read_text", missing)
    now, peak = memory_gib(CPU)
    assert now == peak >= expected * 0.99
