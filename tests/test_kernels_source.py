"""Kernels address memory in 64 bits: what multiplies a program's number may pass 2**31."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def narrow_programs(source: str) -> list[int]:
    """Lines of a Triton file with ``tl.program_id`` not directly followed by ``.to(tl.int64)``."""
    tree = ast.parse(source)
    wide = {
        node.func.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and [ast.unparse(argument) for argument in node.args] == ["tl.int64"]
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("program_id")
        and node not in wide
    ]


def narrow_blocks(source: str) -> list[int]:
    """Lines of a CUDA file where blockIdx or gridDim is not cast to 64 bits at once."""
    code = re.sub(r"//[^\n]*", "", source)
    code = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), code, flags=re.S)
    number = r"(?:blockIdx|gridDim)\.[xyz]"
    code = re.sub(rf"static_cast<int64_t>\({number}\)", "wide", code)
    return [code.count("\n", 0, found.start()) + 1 for found in re.finditer(number, code)]


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda f: f.name)
def test_triton_kernels_count_programs_in_64_bits(file):
    assert not narrow_programs(file.read_text())


@pytest.mark.parametrize("file", sorted((ROOT / "csrc").rglob("*.cu*")), ids=lambda f: f.name)
def test_cuda_kernels_count_blocks_in_64_bits(file):
    assert not narrow_blocks(file.read_text())


@pytest.mark.parametrize(
    "snippet",
    [
        "row = tl.program_id(0)",
        "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
        "row = (tl.program_id(0) * BLOCK).to(tl.int64)",
        "row = tl.program_id(0).to(tl.int32)",
    ],
)
def test_a_program_number_in_32_bits_is_found(snippet):
    assert narrow_programs(f"row = tl.program_id(0).to(tl.int64)\n{snippet}") == [2]


@pytest.mark.parametrize(
    "snippet",
    [
        "const int i = blockIdx.x * blockDim.x + threadIdx.x;",
        "const int64_t i = static_cast<int64_t>(blockIdx.x * blockDim.x);",
        "for (int64_t i = start; i < n; i += gridDim.x * blockDim.x) {}",
        "const int i = lookup(table, static_cast<int>(blockIdx.x));",
    ],
)
def test_a_block_number_in_32_bits_is_found(snippet):
    fine = "int64_t a = static_cast<int64_t>(blockIdx.x) * 4;  // blockIdx.x alone would wrap\n"
    assert set(narrow_blocks(fine + snippet)) == {2}
