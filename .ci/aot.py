"""Compile every Triton kernel for sm_80, 90, 100 and 120 without a GPU; fail on a spill.

A kernel that is in ``fastmim.kernels`` and not in CASES fails too. A binary that builds is no proof
that it runs.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="fastmim_aot_"))

import triton
from triton.backends.compiler import GPUTarget

import fastmim.kernels

ARCHITECTURES = (80, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """One real configuration of a kernel.

    Attributes:
        kernel: ``module:function`` within fastmim.kernels.
        types: Of the arguments that are not constants.
        constants: tl.constexpr arguments.
        aligned: Arguments divisible by 16, which the runtime would find out by itself.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, int]
    aligned: tuple[str, ...]


def _rows(kernel: str, dtype: str, width: int) -> Case:
    pointers = {"x_ptr": f"*{dtype}", "ids_ptr": "*i64", "out_ptr": f"*{dtype}"}
    return Case(
        kernel,
        {**pointers, "N": "i32", "K": "i32", "D": "i32"},
        {"BLOCK_D": triton.next_power_of_2(width)},
        (*pointers, *(["D"] if width % 16 == 0 else [])),
    )


CASES = [
    _rows(f"gather:{kernel}", dtype, width)
    for kernel in ("_gather_kernel", "_scatter_kernel")
    for dtype in ("bf16", "fp16", "fp32")
    for width in (512, 768, 1280)
]


def kernels() -> dict[str, triton.runtime.JITFunction]:
    """Every Triton kernel of the package, by ``module:function``."""
    found = {}
    for info in pkgutil.iter_modules(fastmim.kernels.__path__):
        module = importlib.import_module(f"fastmim.kernels.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.JITFunction):
                found[f"{info.name}:{name}"] = value
    return found


def compile_case(case: Case, kernel: triton.runtime.JITFunction, arch: int) -> dict[str, int]:
    """Registers, stack bytes, local-memory instructions and shared memory of one binary."""
    names = kernel.arg_names
    source = triton.compiler.ASTSource(
        kernel,
        {n: case.types.get(n, "constexpr") for n in names},
        case.constants,
        {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned},
    )
    options = importlib.import_module(kernel.fn.__module__).OPTIONS  # those it is launched with
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(TOOLS / tool), *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
        )
    numbers = {k.lower(): int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {**numbers, "spills": spills, "shared": built.metadata.shared}


def main() -> int:
    found = kernels()
    missing = sorted(set(found) - {case.kernel for case in CASES})
    if missing:
        print(f"aot: no case for {', '.join(missing)}; add one to CASES in {__file__}")
        return 1
    bad = 0
    for case in CASES:
        for arch in ARCHITECTURES:
            row = compile_case(case, found[case.kernel], arch)
            bad += row["spills"] > 0
            numbers = " ".join(f"{k}={v}" for k, v in row.items())
            print(f"{case.kernel} {case.types['x_ptr']} {case.constants} sm_{arch}: {numbers}")
    print(f"triton {triton.__version__}: {len(CASES) * len(ARCHITECTURES)} binaries, {bad} spill")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
