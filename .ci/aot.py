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
    constants: dict[str, int | float]
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


PARAMETERS = ("weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr", "partials_ptr")


def _tile(kernel: str, dtype: str, width: int, tensors: str, constants: dict, **sizes: str) -> Case:
    """A kernel over tiles of 4096 values; ``tensors`` hold ``dtype``, the parameters float32."""
    tile = constants.pop("tile", 4096)
    names = tensors.split()
    pointers = {n: "*fp32" if n in PARAMETERS else f"*{dtype}" for n in names}
    block_d = min(triton.next_power_of_2(width), constants.pop("widest", 1 << 30))
    blocks = {"BLOCK_ROWS": tile // block_d, "BLOCK_D": block_d}
    if "BLOCK_M" in constants:
        del blocks["BLOCK_ROWS"]
    types = {**pointers, "rows": "i32", "D": "i32", **sizes}
    aligned = (*pointers, *(n for n in types if n == "D" or n == "ids_ptr"))
    return Case(kernel, types, {**blocks, **constants}, aligned)


def _norm(dtype: str, width: int) -> list[Case]:
    forward = "x_ptr branch_ptr weight_ptr bias_ptr out_ptr total_ptr mean_ptr rstd_ptr"
    backward = (
        "grad_ptr grad_total_ptr total_ptr mean_ptr rstd_ptr weight_ptr grad_x_ptr partials_ptr"
    )
    return [
        _tile("norm:_norm_kernel", dtype, width, forward, {"EPS": 1e-6}),
        _tile("norm:_norm_bwd_kernel", dtype, width, backward, {"tile": 2048}),
    ]


def _mlp(dtype: str, width: int) -> list[Case]:
    backward = "grad_ptr x_ptr bias_ptr grad_x_ptr partials_ptr"
    return [
        _tile("mlp:_bias_gelu_kernel", dtype, width, "x_ptr bias_ptr out_ptr", {"widest": 1024}),
        _tile("mlp:_bias_gelu_bwd_kernel", dtype, width, backward, {"widest": 1024}),
    ]


def _sums(width: int) -> Case:
    block_d = min(triton.next_power_of_2(width), 64)
    pointers = dict.fromkeys(("partials_ptr", "first_ptr", "second_ptr"), "*fp32")
    return Case(
        "reduce:_sum_partials_kernel",
        {**pointers, "P": "i32", "D": "i32"},
        {"BLOCK_P": 4096 // block_d, "BLOCK_D": block_d},
        (*pointers, *(["D"] if width % 16 == 0 else [])),
    )


def _feature_loss(dtype: str, width: int) -> list[Case]:
    sizes = {"ids_ptr": "*i64", "M": "i32", "N": "i32"}
    affine = "weight_ptr bias_ptr"
    tensors = f"pred_ptr target_ptr {affine} grad_ptr"
    sizes["partials_ptr"] = "*fp64"
    loss = {"BETA": 2.0, "NORMALIZE": 1}
    token = {"BLOCK_M": 64, "widest": 64}
    return [
        *(
            _tile(
                "feature_loss:_feature_loss_kernel",
                dtype,
                width,
                tensors,
                {**loss, "COSINE": cosine},
                count="i32",
                **sizes,
            )
            for cosine in (0, 1)
        ),
        _tile(
            "feature_loss:_target_statistics_kernel",
            dtype,
            width,
            "target_ptr mean_ptr rstd_ptr",
            {},
            **sizes,
        ),
        _tile(
            "feature_loss:_feature_loss_token_kernel",
            dtype,
            width,
            f"pred_ptr target_ptr mean_ptr rstd_ptr {affine} grad_ptr",
            token,
            count="i32",
            **sizes,
        ),
    ]


def _crop_resize(dtype: str) -> list[Case]:
    """Pictures of any size, so no size is known to be a multiple of 16."""
    blocks = {"BLOCK_H": 16, "BLOCK_W": 128}
    tables = dict.fromkeys(("first_ptr", "count_ptr", "weights_ptr"), "*i32")
    rows = {"x_ptr": "*u8", "boxes_ptr": "*i32", **tables, "out_ptr": "*u8"}
    affine = {"scale_ptr": "*fp32", "shift_ptr": "*fp32"}
    columns = {"x_ptr": "*u8", **tables, **affine, "out_ptr": f"*{dtype}"}
    sizes = [dict.fromkeys((*names.split(), "taps"), "i32") for names in ("C H W width", "length")]
    down = dict.fromkeys(("C", "H", "height", "width", "taps"), "i32")
    weights = {"boxes_ptr": "*i32", **tables}
    return [
        Case("augment:_crop_resize_rows_kernel", {**rows, **sizes[0]}, blocks, tuple(rows)),
        Case("augment:_crop_resize_columns_kernel", {**columns, **down}, blocks, tuple(columns)),
        *(
            Case(
                "augment:_crop_weights_kernel",
                {**weights, **sizes[1]},
                {"AXIS": axis, "BLOCK": 128},
                tuple(weights),
            )
            for axis in (0, 1)
        ),
    ]


DTYPES = ("bf16", "fp16", "fp32")
CASES += [
    *(case for dtype in DTYPES for d in (512, 768, 1024, 1280) for case in _norm(dtype, d)),
    *(case for dtype in DTYPES for d in (2048, 3072, 4096, 5120) for case in _mlp(dtype, d)),
    *(case for dtype in DTYPES for d in (768, 1024) for case in _feature_loss(dtype, d)),
    *(case for dtype in ("u8", "bf16", "fp32") for case in _crop_resize(dtype)),
    *(_sums(d) for d in (1, 512, 1280, 5120)),
]


def kernels() -> dict[str, triton.runtime.JITFunction]:
    """Every Triton kernel of the package, by ``module:function``."""
    found = {}
    for info in pkgutil.iter_modules(fastmim.kernels.__path__):
        module = importlib.import_module(f"fastmim.kernels.{info.name}")
        for name, value in vars(module).items():
            # A helper has no launch of its own; it is compiled with the kernels that call it.
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
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
            dtype = next(iter(case.types.values()))
            print(f"{case.kernel} {dtype} {case.constants} sm_{arch}: {numbers}")
    print(f"triton {triton.__version__}: {len(CASES) * len(ARCHITECTURES)} binaries, {bad} spill")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
