"""What this installation consists of, and which backend serves each operator: `fastmim info`."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import warnings
from collections.abc import Iterable
from json import dumps
from pathlib import Path
from typing import Any

import torch

from fastmim.ops import OPS
from fastmim.ops._attention_choice import GPU_TABLE
from fastmim.ops._registry import PREFERENCE, Op, extension_problem

_PACKAGES = (
    *("torch", "triton", "numpy", "safetensors", "simplejpeg", "pillow", "pyarrow"),
    *("jsonargparse", "rich", "pyyaml"),
)
_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET"),
    *("CUDAFLAGS", "MAX_JOBS", "NVCC_THREADS", "TORCH_CUDA_ARCH_LIST"),  # of the build
)
_BF16_FLAGS = ("avx512_bf16", "avx_ne_convert", "amx_bf16", "bf16")  # x86, the last one Arm
_BUILD_KEYS = (
    "git_revision",
    "compiler",
    "cuda",
    "cuda_architectures",
    "torch_build",
    "torch_target",
    "sanitize",
    "simd_variants",
    "simd_in_use",
)


def report() -> dict[str, Any]:
    """Everything a bug report needs. What is missing or unknown is None; the keys never change.

    Returns:
        ``fastmim`` (version, git_revision, path), ``python``, ``platform``, ``packages`` (name to
        version or None), ``cpu``, ``cuda`` (with ``gpus``), ``extension``, ``environment``
        (variable to value or None) and ``operators`` (name to device to ``backend``, ``error`` and
        ``others``: of each other backend its ``status`` - "absent", "unavailable" or "ready" - and
        the ``reason`` why it does not serve), and ``gpu_attention`` (what ``auto`` takes for
        attention on a GPU, up to which shape, and the evidence). Sizes are in GiB.
    """
    extension = _extension()
    cuda = _cuda()
    devices = ["cpu", "cuda"] if cuda["gpus"] else ["cpu"]
    variables = {*_VARIABLES, "FASTMIM_BACKEND", *(v for v in os.environ if v[:8] == "FASTMIM_")}
    return {
        "fastmim": {
            "version": _version("fastmim"),
            "git_revision": extension["git_revision"],
            "path": str(Path(__file__).parent),
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "cpu": _cpu(),
        "cuda": cuda,
        "extension": extension,
        "environment": {name: os.environ.get(name) for name in sorted(variables)},
        "operators": {
            name: {device: _served(op, torch.device(device)) for device in devices}
            for name, op in sorted(OPS.items())
        },
        "gpu_attention": [choice._asdict() for choice in GPU_TABLE],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    flags = set(_field(text, "flags|Features").split())
    pairs = re.findall(r"^physical id\s*: (\d+)$.*?^core id\s*: (\d+)$", text, re.M | re.S)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "model": _field(text, "model name") or platform.processor() or platform.machine(),
        "cores": len(set(pairs)) or None,
        "threads": os.cpu_count(),
        "usable_threads": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": [f for f in _BF16_FLAGS if f in flags] if flags else None,
        "memory_gib": _memory(),
        "memory_limit_gib": _gib(_read("/sys/fs/cgroup/memory.max")),  # of the container
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # another operating system
        return ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^(?:{name})\s*: (.*)$", text, re.M)
    return found[1].strip() if found else ""


def _gib(number: str) -> float | None:
    return round(int(number) / 2**30, 1) if number.strip().isdigit() else None


def _memory() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return _gib(str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def _cuda() -> dict[str, Any]:
    gpus, problem = [], None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
        except RuntimeError as error:  # a driver that answers, but not well
            problem = str(error)
    if not gpus and problem is None:
        if torch.version.cuda is None and torch.version.hip is None:
            problem = f"torch {torch.__version__} is a build without GPU support"
        else:
            problem = "; ".join(str(w.message) for w in said) or "no GPU or no driver found"
    return {
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "gpus": gpus,
        "problem": problem,
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "bf16": properties.major >= 8 or torch.version.hip is not None,
    }


def _extension() -> dict[str, Any]:
    problem = extension_problem()
    built = {}
    if problem is None:
        from fastmim import _C

        built = _C.build_info()
    return {"problem": problem, **dict.fromkeys(_BUILD_KEYS), **built}


def _served(op: Op, device: torch.device) -> dict[str, Any]:
    """Which backend serves ``op`` on ``device``, as far as the device decides, and why no other."""
    backend = error = None
    try:
        backend = op.choose(device)
    except RuntimeError as refusal:  # FASTMIM_BACKEND asks for what cannot serve
        error = str(refusal)
    others = {b: _other(op, b, backend, device) for b in PREFERENCE if b != backend}
    return {"backend": backend, "error": error, "others": others}


def _other(op: Op, other: str, backend: str | None, device: torch.device) -> dict[str, str]:
    reason = op.unavailable(other, device)
    if reason is not None:
        return {"status": "unavailable" if other in op.backends else "absent", "reason": reason}
    if op.forced() is not None:
        reason = f"'{op.forced()[0]}' was asked for"
    elif other == "triton" and device.type == "cpu":
        reason = "interpreted (TRITON_INTERPRET=1): a test tool, never chosen by itself"
    else:
        reason = f"{backend} comes first"
    return {"status": "ready", "reason": reason}


def print_report(*, json: bool = False) -> None:
    """Print :func:`report` for a person, or as JSON.

    Args:
        json: As JSON, for programs and bug reports.
    """
    facts = report()
    print(dumps(facts, indent=2, sort_keys=True) if json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> Iterable[str]:
    """The report as text: aligned names and values, then one table of operators per device."""
    yield from _table(_summary(facts))
    for device in next(iter(facts["operators"].values()), {}):
        yield ""
        yield from _operators(device, {k: v[device] for k, v in facts["operators"].items()})
    yield ""
    yield from _table(_gpu_attention(facts["gpu_attention"]))


def _summary(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    own, cpu, cuda = facts["fastmim"], facts["cpu"], facts["cuda"]
    yield "fastmim", f"{own['version'] or 'not installed'} in {own['path']}"
    yield "git revision", own["git_revision"] or "unknown"
    yield "python", f"{facts['python']} on {facts['platform']}"
    for name, version in facts["packages"].items():
        yield name, version or "not installed"
    yield "CPU", cpu["model"]
    cores = f"{cpu['cores']} cores, " if cpu["cores"] else ""
    yield "", f"{cores}{cpu['threads']} threads ({cpu['usable_threads']} usable)"
    yield "", f"torch: {cpu['torch_threads']} threads, {cpu['torch_capability']}"
    bf16 = cpu["bf16_instructions"]
    yield "", f"bf16: {'unknown' if bf16 is None else ', '.join(bf16) or 'emulated, slow'}"
    limit = f", limited to {cpu['memory_limit_gib']}" if cpu["memory_limit_gib"] else ""
    yield "memory", f"{cpu['memory_gib'] or 'unknown'} GiB{limit}"
    for gpu in cuda["gpus"]:
        text = f"compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        yield "GPU", f"{gpu['name']}, {text}, bf16: {'yes' if gpu['bf16'] else 'no'}"
    if cuda["problem"]:
        yield "GPU", f"none: {cuda['problem']}"
    yield "extension", facts["extension"]["problem"] or "loaded"
    for name, value in facts["extension"].items():
        if facts["extension"]["problem"] is None and name not in ("problem", "git_revision"):
            text = " ".join(value) if isinstance(value, list) else value
            yield "", f"{name.replace('_', ' ')}: {'none' if text in (None, '') else text}"
    for name, value in facts["environment"].items():
        if value is not None:
            yield name, repr(value)


def _operators(device: str, served: dict[str, dict[str, Any]]) -> Iterable[str]:
    notes: dict[str, int] = {}
    rows = [("operator", f"{device}: served by", *PREFERENCE)]
    for name, entry in served.items():
        cells = []
        for backend in PREFERENCE:
            other = entry["others"].get(backend, {"status": "serves"})
            cell = {"absent": "-"}.get(other["status"], other["status"])
            if cell == "unavailable":
                cell = f"no [{notes.setdefault(other['reason'], len(notes) + 1)}]"
            cells.append(cell)
        rows.append((name, entry["backend"] or "nothing", *cells))
    yield from _table(rows)
    yield ""
    yield from (f"[{number}] {reason}" for reason, number in notes.items())
    yield "-: no such implementation. A call with an unusual dtype or layout may use another."
    failing: dict[str, list[str]] = {}
    for name, entry in served.items():
        if entry["error"]:
            failing.setdefault(OPS[name].forced()[0], []).append(name)
    for backend, names in failing.items():
        yield f"error: '{backend}' was asked for and cannot serve {', '.join(names)}"


def _gpu_attention(choices: list[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    yield "attention on a GPU: up to tokens", "head dim", "served by", "evidence"
    for choice in choices:
        yield tuple(map(str, choice.values()))
    yield "more", "any", "cuda", "PyTorch's kernels"


def _table(rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m fastmim.info``.

    Args:
        argv: Arguments. Default: those of the process.
    """
    parser = argparse.ArgumentParser(prog="fastmim info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    print_report(json=parser.parse_args(argv).json)


if __name__ == "__main__":
    main()
