"""How much memory there is, is used, and may be used."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_HOST_SHARE = 0.5  # of what the host has left: others live there too


def memory_in_use(device: torch.device) -> float | None:
    """GiB of this process: resident on a CPU, allocated on a GPU; None if the system is silent."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return gib_of("/proc/self/status", "VmRSS:")


def total_memory(device: torch.device, host_share: float = _HOST_SHARE) -> float:
    """GiB that a benchmark may take: all of a GPU, a share of what is available on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2**30
    left = [gib_of("/proc/meminfo", "MemAvailable:"), _left_to_container()]
    return host_share * min((gib for gib in left if gib is not None), default=float("inf"))


@contextlib.contextmanager
def limited_memory(device: torch.device, gib: float) -> Iterator[None]:
    """Let this process allocate no more than so much in all: what goes beyond raises.

    On a CPU its address space is limited to what it has now, less what is resident, and ``gib``.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    mapped, resident = gib_of("/proc/self/status", "VmSize:"), memory_in_use(device)
    before = resource.getrlimit(resource.RLIMIT_AS)
    if mapped is not None:
        limit = int((mapped - resident + gib) * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _left_to_container(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """GiB that a container may still take; None if nothing limits it."""
    limit, used = (folder / f"memory.{name}" for name in ("max", "current"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    return (int(limit.read_text()) - int(used.read_text())) / 2**30


def gib_of(path: str, field: str) -> float | None:
    """A field of a file of /proc, given in kB, as GiB."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(field)), None)
