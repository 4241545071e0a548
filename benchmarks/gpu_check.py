"""Suite ``gpu-check``: all that only a GPU can tell, in one command of less than 9 minutes.

Builds the checkout for the GPU at hand if need be, runs the tests on it, then compute-sanitizer and
the timings. Every stage is a process with its share of the time; one that fails or runs out of it
is a row of the result.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import rows as rows_of
import torch
from stages import SHOWN, Result, Stage, by_report, run_stages
from suite import Column, Options

from fastmim.info import report
from fastmim.ops import OPS

ROOT = Path(__file__).parents[1]
NAME = "gpu-check"
SHAPES: dict = {}
DEFAULT: dict = {"cpu": [], "cuda": []}
WORDS: dict = {}
# fmt: off
COLUMNS: list[Column] = [
    ("stage", "stage", ""), ("status", "status", ""), ("passed", "passed", "d"),
    ("failed", "failed", "d"), ("skipped", "skipped", "d"), ("seconds", "seconds", ".0f"),
    ("reason", "reason", ""),
]
# fmt: on
SECONDS = 520  # of 540: the first lines and the table take some too

# Name of a stage to its files in tests/ and its seconds, the most important first.
TESTS: dict[str, tuple[tuple[str, ...], dict]] = {
    # Short without a test of CPUs, and alone in comparing the bits of CPU and GPU by storage.
    "test_native": (
        ("test_native.py",),
        dict(budget=50, least=20, words=("-k", "not instruction_sets")),
    ),
    "test_ops": (("test_ops.py",), dict(budget=170, least=60)),
    "test_gpu": (("test_gpu.py",), dict(budget=110, least=40)),
    "special cases": (
        (
            "test_attention.py",
            "test_norm.py",
            "test_loss_gradients.py",
            "test_masking.py",
            "test_feature_loss.py",
            "test_augment_op.py",
            "test_memory_modes.py",
        ),
        dict(budget=60, least=20),
    ),
    "test_compile": (("test_compile.py",), dict(budget=80, least=20)),
    "test_fuzz": (("test_fuzz.py",), dict(budget=40, least=10)),
}
# Files that ask for the device under test and run nothing on a GPU, with the reason.
TESTS_LEFT_OUT = {
    "test_interpreter.py": "of Triton's interpreter, which serves where there is no GPU",
    "test_runs.py": "runs on the CPU; compares with Triton's interpreter",
}

_FOUND = 9  # exit status of compute-sanitizer when it has found something

# An out-of-bounds write. A sanitizer that may attach reports it, and one that does not is no use.
_PLANTED = """
import torch, triton, triton.language as tl

@triton.jit
def write_behind(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + SIZE + tl.arange(0, 32), 1.0)

x = torch.zeros(1024, device="cuda")
write_behind[(1,)](x, SIZE=1024)
torch.cuda.synchronize()
"""


def describe() -> list[str]:
    return [f"suite {NAME}   the checkout on a GPU: build, tests, compute-sanitizer, times"]


def refuse_unless_possible(suites: Sequence[object], device: str) -> None:
    """ValueError if other suites are asked for as well, or there is no GPU."""
    if len(suites) > 1:
        raise ValueError(f"--suite: {NAME} times the other suites itself")
    problem = report()["cuda"]["problem"]
    if device == "cpu" or problem:
        raise ValueError(
            f"--suite {NAME} needs a CUDA GPU ({problem or '--device cpu'}): run it on a machine "
            "with one and a CUDA build of torch; `pytest` makes the CPU's checks"
        )


def run(options: Options) -> Iterator[dict]:
    """A row of every stage, and those that it measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.jsonl"
        seen = 0
        for row in run_stages(plan(folder, path, options.device), seconds=SECONDS, say=options.say):
            yield row
            measured = rows_of.read(path)[seen:] if path.exists() else []
            seen += len(measured)
            yield from measured


def by_sanitizer(status: int, output: str) -> Result:
    """From compute-sanitizer's summary, which must be there."""
    found = [line.removeprefix("=========").strip() for line in output.splitlines()]
    errors = [line for line in found if line.startswith(("Error", "Invalid", "Uninitialized"))]
    if status == 0 and "ERROR SUMMARY: 0 errors" in output:
        return Result("passed")
    summary = next((line for line in found if "SUMMARY" in line), "no summary")
    last = errors or output.splitlines()[-SHOWN:]
    return Result("failed", f"exit {status}, {summary}", failures=last[:SHOWN])


def by_planted_fault(status: int, output: str) -> Result:
    """The sanitizer works here if it finds the fault."""
    if status == _FOUND and "Invalid __global__ write" in output:
        return Result("passed")
    last = (output.strip().splitlines() or ["no output"])[-1]
    return Result("skipped", f"it finds no planted fault here (exit {status}): {last}")


def missing_kernels(device: torch.device) -> str | None:
    """Which part of the library this Python lacks for ``device``; None if it has all."""
    if importlib.util.find_spec("fastmim.kernels") is None:
        return "fastmim.kernels"
    for op in OPS.values():
        reason = "cuda" in op.backends and op.unavailable("cuda", device)
        if reason:
            return f"{op.name} for CUDA ({reason})"
    return None


def plan(folder: Path, rows: Path, device: torch.device) -> list[Stage]:
    """The stages of a whole check.

    Args:
        folder: Empty; for what is built and written on the way.
        rows: JSONL file to which the timings are appended.
        device: The GPU.
    """
    missing = missing_kernels(device)
    installed = Path(importlib.util.find_spec("fastmim").origin).parents[1]
    library = folder / "library" if missing else installed
    (folder / "empty").mkdir()
    common = dict(
        # Python looks into the folder it runs in first: not into the checkout, which is not built.
        folder=folder / "empty",
        needs="build" if missing else None,
        variables={"PYTHONPATH": _search_path(library)},
    )
    stages = [_build(folder, library, device)] if missing else []
    stages += [
        run_of_tests(name, [ROOT / "tests" / file for file in files], **seconds, **common)
        for name, (files, seconds) in TESTS.items()
    ]
    stages += _sanitizer(folder, common)
    for name, words, budget, least in (
        ("time ops", "--suite ops --shape large224 --compile", 130, 60),
        ("time ema", "--suite ema --shape base,large", 45, 20),
        ("time base224", "--suite step --shape base224 --dtype bf16 --no-memory", 60, 30),
        ("time large224", "--suite step --shape large224 --dtype bf16 --no-memory", 60, 30),
    ):
        program = [sys.executable, str(ROOT / "benchmarks/run.py"), *words.split()]
        command = [*program, "--device", "cuda", "--rounds", "5", "--json", str(rows)]
        stages.append(Stage(name, command, budget, least, **common))
    return stages


def _search_path(library: Path) -> str:
    return os.pathsep.join(filter(None, [str(library), os.environ.get("PYTHONPATH")]))


def _build(folder: Path, library: Path, device: torch.device) -> Stage:
    major, minor = torch.cuda.get_device_capability(device)
    # Not pip: this needs setuptools alone, and leaves nothing in the checkout.
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "build")]
    variables = {
        "FASTMIM_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}" + "a" * (major == 9),  # wgmma needs sm_90a
    }
    command += ["--build-lib", str(library)]
    return Stage("build", command, 180, 60, variables=variables, folder=ROOT)


def run_of_tests(
    name: str, files: list[Path], *, folder: Path, words: tuple[str, ...] = (), **about
) -> Stage:
    """A run of pytest on ``files``, read from its report; ``words`` are further options of it."""
    report = folder.parent / f"{name}.xml"
    command = [sys.executable, *_pytest(files), *words, f"--junitxml={report}"]
    return Stage(name, command, folder=folder, judge=partial(by_report, report), **about)


def _pytest(files: list[Path]) -> list[str]:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    return [*words, f"--rootdir={ROOT}", *map(str, files)]


def _sanitizer(folder: Path, common: dict) -> list[Stage]:
    name = "compute-sanitizer"
    tool = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") or name
    planted = folder / "planted.py"
    planted.write_text(_PLANTED)
    # PyTorch's allocator hands out parts of large blocks: the tool would not see their borders.
    variables = {**common["variables"], "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    common = {**common, "variables": variables}
    start = [tool, "--error-exitcode", str(_FOUND)]
    program = [*start, sys.executable, str(planted)]
    stages = [Stage(name, program, 40, 15, judge=by_planted_fault, **common)]
    common["needs"] = name
    program = [sys.executable, *_pytest([ROOT / "tests/test_ops.py"])]
    program += ["-k", "test_repeats_to_the_bit and (cuda or triton)"]
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [*start, "--tool", check, *program]
        stages.append(Stage(check, command, 45, 12, judge=by_sanitizer, **common))
    return stages
