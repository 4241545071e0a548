"""Compile every Triton kernel for sm_80, 90, 100 and 120 without a GPU, as its launcher would.

The operators of the registry are called on tensors without memory, at each of their real shapes
that the kernels accept; what the launchers launch is compiled instead. A binary that builds is no
proof that it runs.

usage: aot.py [--write docs/kernels.md | --compile-only]

Without ``--write`` the result is compared with the committed table. It fails on a spill, on a
kernel that no operator launches, on a missing or left-over row, on registers or shared memory that
differ by more than 10 %, and on narrower memory accesses. With ``--compile-only``, for any version
of Triton, it fails on kernels that do not compile, all of which it names, and on spills alone.
"""

import argparse
import functools
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="fastmim_aot_"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

import fastmim.kernels
from fastmim.ops import OPS

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float32)
TABLE = Path(__file__).parents[1] / "docs" / "kernels.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TOLERANCE = 0.1
INTRODUCTION = f"""\
Written by `.ci/aot.py --write docs/kernels.md` with Triton {triton.__version__}: every kernel
compiled, not run, for each architecture at the real shapes of its operators. A cell holds registers
per thread / bytes of shared memory; spills are instructions that access local memory, all
architectures together; load and store are the widest accesses to global memory in bits, on the
architecture where they are narrowest."""
# "module:kernel" to the most spills of one shape, all architectures together, and the reason.
SPILLS_ALLOWED: dict[str, tuple[int, str]] = {
    "attention:_attention_kernel": (
        450,
        "packed sequences: float32, which auto gives to PyTorch, and about 26 on each architecture "
        "in bfloat16 at head dim 64, to be weighed against a smaller tile on a GPU; of images, "
        "sm_120 alone at 197 tokens of head dim 64, 80",
    ),
    "attention:_attention_bwd_long_kernel": (
        170,
        "257 tokens, and queries apart from keys: loads of constants before and behind the loop "
        "over keys, few in it; sm_100 has none; two sweeps: none, but 1.4 times the products",
    ),
    "attention:_attention_bwd_swept_kernel": (
        125,
        "float32 alone, whose exact products need the operands in registers, and 2 on sm_80 at "
        "head dim 80; auto gives float32 to PyTorch",
    ),
}


class Usage(NamedTuple):
    """Resources of one binary.

    Attributes:
        registers: Per thread.
        shared: Shared memory of a program, bytes.
        spills: Instructions that access local memory.
        load: Widest access to global memory, bits; 0 if there is none.
        store: Likewise.
    """

    registers: int
    shared: int
    spills: int
    load: int
    store: int


Table = dict[tuple[str, str], list[Usage]]  # (kernel, configuration) to one usage per architecture


class CompileOnly:
    """What Triton asks of a driver before a launch. The device index is the architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def kernels() -> set[str]:
    """Every Triton kernel of the package as ``module:function``; helpers do not end in _kernel."""
    modules = [
        importlib.import_module(f"fastmim.kernels.{info.name}")
        for info in pkgutil.iter_modules(fastmim.kernels.__path__)
    ]
    return {
        kernel_name(value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def kernel_name(kernel: JITFunction) -> str:
    return f"{kernel.module.rpartition('.')[2]}:{kernel.fn.__name__}"


def launched(launcher, args: tuple, architecture: int) -> Iterator[tuple[str, CompiledKernel]]:
    """The kernels that a launcher would launch, compiled."""
    binaries = []

    def compile_only(kernel, grid):
        def launch(*given, **constants):
            built = kernel.run(*given, grid=grid, warmup=True, **constants)
            binaries.append((kernel_name(kernel), built))

        return launch

    driver.set_active(CompileOnly(architecture))
    with mock.patch.object(JITFunction, "__getitem__", compile_only):
        launcher(*args)
    return iter(binaries)


@functools.cache
def usage(binary: CompiledKernel) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        resources, sass = (
            subprocess.run(
                [str(TOOLS / tool), *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
        )
    return Usage(
        int(re.search(r"\bREG:(\d+)", resources)[1]),
        binary.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        widest(sass, "LDG"),
        widest(sass, "STG"),
    )


def widest(sass: str, instruction: str) -> int:
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return max(
        (
            max((bits[part] for part in modifiers.split(".") if part in bits), default=32)
            for modifiers in re.findall(rf"\b{instruction}\.([\w.]+)", sass)
        ),
        default=0,
    )


def worst(usages: list[Usage]) -> Usage:
    """Of several launches of one kernel in a call."""
    return Usage(
        *map(max, zip(*(u[:3] for u in usages), strict=True)),
        *map(min, zip(*(u[3:] for u in usages), strict=True)),
    )


def measure() -> tuple[Table, list[str]]:
    """Usage of every kernel at every real shape of the operators that launch it.

    Returns:
        The table, and a line for each configuration that does not compile.
    """
    table: Table = {}
    failures: list[str] = []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        for found, failed in processes.map(measured_on, ARCHITECTURES):
            failures += failed
            for key, resources in found.items():
                table.setdefault(key, []).append(resources)
    return table, failures


def measured_on(architecture: int) -> tuple[dict[tuple[str, str], Usage], list[str]]:
    """The part of :func:`measure` of one architecture."""
    table: dict[tuple[str, str], Usage] = {}
    failures: list[str] = []
    for op in OPS.values():
        if "triton" not in op.backends:
            continue
        for shape in (name for name in op.shapes if not name.startswith("edge")):
            for dtype in DTYPES:
                args = op.make(**op.shapes[shape], device="meta", dtype=dtype)
                if op.refuses("triton", args):
                    continue
                configuration = f"{op.name} {shape}"
                if dtype in (getattr(arg, "dtype", arg) for arg in args):
                    configuration += f" {str(dtype).removeprefix('torch.')}"
                elif dtype != DTYPES[0]:
                    continue
                try:
                    built = launched(op.implementation("triton"), args, architecture)
                except Exception as error:  # whatever a compiler raises
                    last = (str(error).strip().splitlines() or [""])[-1]
                    where = f"{configuration} sm_{architecture}"
                    failures.append(f"{where}: {type(error).__name__}: {last}")
                    continue
                launches: dict[str, list[Usage]] = {}
                for name, binary in built:
                    launches.setdefault(name, []).append(usage(binary))
                for name, usages in launches.items():
                    table[name, configuration] = worst(usages)
    return table, failures


def render(table: Table) -> str:
    lines = [
        "# Triton kernels",
        "",
        textwrap.fill(INTRODUCTION, 100),
        "",
        "| kernel | operator, shape, dtype | "
        + " | ".join(f"sm_{a}" for a in ARCHITECTURES)
        + " | spills | load | store |",
        "|---|---|" + "---|" * (len(ARCHITECTURES) + 3),
    ]
    for (kernel, configuration), row in sorted(table.items()):
        cells = [f"{u.registers} / {u.shared}" for u in row]
        sums = [sum(u.spills for u in row), min(u.load for u in row), min(u.store for u in row)]
        lines.append(f"| {' | '.join([kernel, configuration, *cells, *map(str, sums)])} |")
    return "\n".join(lines) + "\n"


def rows(text: str) -> dict[tuple[str, str], list[int]]:
    """Numbers of a rendered table by kernel and configuration."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if ":_" in cells[0]:
            found[cells[0], cells[1]] = [int(n) for n in re.findall(r"\d+", " ".join(cells[2:]))]
    return found


def unlaunched(table: Table) -> list[str]:
    missing = sorted(kernels() - {kernel for kernel, _ in table})
    return [f"{name}: no operator launches it at a real shape" for name in missing]


def spills(table: Table) -> list[str]:
    return [
        f"{kernel} {configuration}: {count} spills"
        for (kernel, configuration), row in sorted(table.items())
        if (count := sum(u.spills for u in row)) > SPILLS_ALLOWED.get(kernel, (0, ""))[0]
    ]


def problems(table: Table, committed: str) -> list[str]:
    """Why the result is not accepted."""
    found = unlaunched(table) + spills(table)
    if f"Triton {triton.__version__}:" not in committed:
        found.append(f"{TABLE.name} was not written with Triton {triton.__version__}")
    before, now = rows(committed), rows(render(table))
    for key in sorted(before.keys() | now.keys()):
        where = " ".join(key)
        if key not in before or key not in now:
            found.append(f"{where}: {'not in' if key in now else 'only in'} {TABLE.name}")
            continue
        *sizes, _, load, store = now[key]
        *old_sizes, _, old_load, old_store = before[key]
        if load < old_load or store < old_store:
            found.append(f"{where}: accesses of {load}, {store} bits, not {old_load}, {old_store}")
        if any(abs(a - b) > TOLERANCE * b for a, b in zip(sizes, old_sizes, strict=True)):
            found.append(f"{where}: registers and shared memory {sizes}, were {old_sizes}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--write", type=Path, help="write the table here")
    exclusive.add_argument(
        "--compile-only", action="store_true", help="for any Triton: only failures and spills"
    )
    options = parser.parse_args()
    table, wrong = measure()
    if options.compile_only or wrong:
        wrong += unlaunched(table) + spills(table)
    else:
        if options.write:
            options.write.write_text(render(table))
        wrong += problems(table, (options.write or TABLE).read_text())
        print(render(table))
    print("\n".join(wrong))
    print(f"triton {triton.__version__}: {len(table)} configurations, {len(wrong)} problems")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
