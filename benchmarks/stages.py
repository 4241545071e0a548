"""Stages that run one after the other, each a process with its share of the time."""

import os
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_GRACE = 8  # seconds in which an interrupted stage may write what it knows
SHOWN = 10  # failures of a stage that are named


@dataclass
class Result:
    """What a stage came to.

    Attributes:
        status: passed, failed, timed out, skipped (nothing to do here) or left out (no time).
        reason: Why it was not passed, in words.
        counts: passed, failed and skipped tests, where there are tests.
        failures: Names of the first failures.
        seconds: That it took.
    """

    status: str
    reason: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.status in ("passed", "skipped")


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        name: In the rows.
        command: Its words.
        budget: Seconds it may take at most.
        least: Seconds kept free for it by the stages before.
        needs: Stage that must have passed.
        judge: Makes the result out of the exit status and the output.
        variables: Of its environment.
        folder: Where it runs.
    """

    name: str
    command: list[str]
    budget: float
    least: float
    needs: str | None = None
    judge: Callable[[int, str], Result] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


def run_stages(
    stages: list[Stage],
    *,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[dict]:
    """Run the stages in order, none beyond its budget, all within ``seconds``: a row of each.

    Args:
        stages: In order.
        seconds: Of all together.
        say: Takes a line for a person.
    """
    results: dict[str, Result] = {}
    end = time.monotonic() + seconds
    for i, stage in enumerate(stages):
        reserved = sum(later.least for later in stages[i + 1 :])
        allowed = min(stage.budget, end - time.monotonic() - reserved)
        result = _left_out(stage, allowed, results)
        if result is None:
            say(f"gpu-check {stage.name}: at most {allowed:.0f} s")
            result = _run(stage, allowed)
        results[stage.name] = result
        say(f"gpu-check {stage.name}: {_in_words(result)}")
        yield _row(stage.name, result)


def _left_out(stage: Stage, allowed: float, results: dict[str, Result]) -> Result | None:
    if stage.needs is not None and results[stage.needs].status != "passed":
        status = "skipped" if results[stage.needs].good else "left out"
        return Result(status, f"needs {stage.needs}: {_in_words(results[stage.needs])}")
    if allowed < stage.least:
        return Result("left out", f"{max(allowed, 0):.0f} s were left, it needs {stage.least:.0f}")
    return None


def _run(stage: Stage, allowed: float) -> Result:
    start = time.monotonic()
    judge = stage.judge or by_status
    with tempfile.TemporaryFile("w+") as log:
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=stage.folder,
                env={**os.environ, **stage.variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what it starts ends with it
            )
        except FileNotFoundError as error:
            return judge(127, str(error))  # as a shell says it
        grace = min(_GRACE, allowed / 2)
        timed_out = not _ended(process, allowed - grace)
        if timed_out:
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes its report
            if not _ended(process, grace):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        result = judge(process.returncode, log.read())
    if timed_out:
        result.status, result.reason = "timed out", f"cut off after {allowed:.0f} s"
    result.seconds = time.monotonic() - start
    return result


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def by_status(status: int, output: str) -> Result:
    """Passed if the process says so; otherwise its last lines are the reason."""
    if status == 0:
        return Result("passed")
    return Result("failed", f"exit {status}", failures=output.splitlines()[-SHOWN:])


def by_report(path: Path, status: int, output: str) -> Result:
    """From pytest's JUnit report: counts and the names of the first tests that failed."""
    if not path.exists():
        return by_status(status or 1, output)
    counts = dict(passed=0, failed=0, skipped=0)
    failures = []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.get("name") is not None:  # without a name: it was interrupted
            counts["passed" if case.find("skipped") is None else "skipped"] += 1
    failures += [line for line in output.splitlines() if line.endswith(": KeyboardInterrupt")]
    good = status == 0 and counts["passed"] > 0 and not failures
    reason = None if good else f"pytest's exit status is {status}"
    return Result("passed" if good else "failed", reason, counts, failures[:SHOWN])


def _in_words(result: Result) -> str:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in result.counts.items())
    words = [result.status, *filter(None, [counts, result.reason])]
    return f"{'; '.join(words)}, {result.seconds:.0f} s"


def _row(name: str, result: Result) -> dict:
    counts = {outcome: result.counts.get(outcome) for outcome in ("passed", "failed", "skipped")}
    return dict(
        suite="gpu-check",
        stage=name,
        status=result.status,
        reason=result.reason,
        **counts,
        seconds=round(result.seconds, 1),
        failures=result.failures,
        match=result.good,
    )
