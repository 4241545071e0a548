"""Where and when rows were measured: commit, versions, clocks of the GPU, pinned cores."""

import datetime
import functools
import importlib.metadata
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastmim.info import report
from fastmim.ops import OPS

# field of the row, of nvidia-smi
_GPU_STATE = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_limit_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
_AT_END = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")  # of what changes
_FRESH = 1.0  # seconds for which a state is not asked again


def environment(device: torch.device, *, smoke: bool) -> dict:
    """What every row says about machine, versions and commit."""
    about = report()
    return dict(
        device=device.type,
        gpu_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        cpu_name=about["cpu"]["model"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=about["packages"]["triton"],
        cuda=torch.version.cuda,
        fastmim_version=about["fastmim"]["version"],
        commit=commit(),
        run=timestamp(),
        smoke=smoke,
    )


def serving(device: torch.device) -> str:
    """What serves fastmim's operators on a device, and those that something else serves."""
    chosen: dict[str, list[str]] = {}
    for name, op in OPS.items():
        chosen.setdefault(op.choose(device), []).append(name)
    most = max(chosen, key=lambda backend: len(chosen[backend]))
    others = (f"{b} for {', '.join(names)}" for b, names in chosen.items() if b != most)
    return "; ".join([most, *others])


def libraries(modules: Sequence[str]) -> dict[str, str | None]:
    """Versions of the packages of some modules; None of one that does not tell."""
    return {name: _version(name) for name in (module.partition(".")[0] for module in modules)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Clocks:
    """State of the GPU before and after what each row measured.

    Args:
        device: A CPU has no such state: every field is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._read()

    def stamp(self) -> dict:
        """Fields of a row that has just been measured."""
        now = self._read()
        row = {**self._start[1], **{f"{name}_end": now[1][name] for name in _AT_END}}
        if now[0] - self._start[0] > _FRESH:  # rows of one group come together
            self._start = now
        return {**row, "timestamp": timestamp()}

    def _read(self) -> tuple[float, dict]:
        return time.monotonic(), gpu_state(self._device, round(time.monotonic() / _FRESH))


def timestamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@functools.lru_cache(maxsize=1)
def gpu_state(device: torch.device, moment: int) -> dict[str, str | None]:
    """Driver, clocks, power and limits; None where nvidia-smi does not tell.

    Args:
        device: The GPU.
        moment: States asked for at the same one are the same.
    """
    state: dict[str, str | None] = dict.fromkeys(_GPU_STATE)
    tool = shutil.which("nvidia-smi")
    if device.type == "cuda" and tool is not None:
        uuid = torch.cuda.get_device_properties(device).uuid
        query = f"--query-gpu={','.join(_GPU_STATE.values())}"
        words = [tool, f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        values = [value.strip() for value in done.stdout.split(",")]
        if len(values) == len(state):
            state = dict(zip(state, values, strict=True))
    return state


@functools.cache
def commit() -> str | None:
    """Short hash, "+changes" if the checkout differs from it; None outside a checkout."""
    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*words: str) -> str:
    """What git says about this checkout; CalledProcessError if it refuses."""
    command = ["git", "--no-optional-locks", *words]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def pin(threads: int, turn: int = 0) -> list[int] | None:
    """Keep this process on as many cores as it has threads, one of each pair of siblings.

    Must come before the first parallel work: threads stay where they were started.

    Args:
        threads: Of the process.
        turn: Number of this process among those that share the machine.

    Returns:
        The cores; None if there are too few, or the system cannot pin.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    chosen = list(cores.values())[turn * threads : (turn + 1) * threads]
    if len(chosen) < threads:
        return None
    os.sched_setaffinity(0, chosen)
    return chosen
