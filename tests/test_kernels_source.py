"""Kernels address memory in 64 bits: what multiplies a program's number may pass 2**31."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


SOURCES = sorted(f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cu", ".cuh", ".h", ".cpp"))
# What is made 32 bits wide, by file, and why no value is cut off that an address needs.
NARROWED = {
    "augment.py": {
        "centre - 2.0 * stretch + 0.5": "a place in a picture, which has fewer than 2**31 columns",
        "centre + 2.0 * stretch + 0.5": "likewise",
        "tl.where(inside & (first + t < last), weight, 0.0)": "a weight, at most about 2**22",
        "tl.load(source + t, mask=inside, other=0)": "the value of a pixel, 8 bits",
        "tl.load(source + t * width, mask=inside, other=0)": "likewise",
    },
    "masking.py": {
        "sample_id": "the low word of a counter of random numbers",
        "sample_id >> 32": "its high word",
        "tl.full((), epoch, tl.int64)": "a word of the counter too; the reference cuts it as well",
        "lower": "one bit, to be counted",
    },
    "patch_loss.py": {
        "tl.load(id_ptr, mask=row < num_rows, other=0)": "a patch of an image: fewer than "
        "2**31, and what it multiplies is 64 bits wide again",
        "row": "its accepts() refuses 2**31 rows",
    },
}


def narrowed(source: str) -> list[str]:
    """What a Triton file converts to 32 bits, in order of appearance."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("to", "cast")
        and any("int32" in ast.unparse(a) for a in (*node.args, *(k.value for k in node.keywords)))
    ]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    values = [call.func.value if call.func.attr == "to" else call.args[0] for call in calls]
    return [ast.unparse(value) for value in values]


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
    """Lines of a CUDA file where blockIdx or gridDim is not cast to 64 bits at once.

    So is a thread's number times the width of a block, in either order.
    """
    code = re.sub(r"//[^\n]*", "", source)
    code = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), code, flags=re.S)
    number = r"(?:blockIdx|gridDim)\.[xyz]"
    code = re.sub(rf"static_cast<int64_t>\({number}\)", "wide", code)
    threads = r"threadIdx\.[xyz]\s*\*\s*blockDim|blockDim\.[xyz]\s*\*\s*threadIdx"
    found = re.finditer(f"{number}|{threads}", code)
    return [code.count("\n", 0, match.start()) + 1 for match in found]


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda f: f.name)
def test_triton_kernels_count_programs_in_64_bits(file):
    assert not narrow_programs(file.read_text())


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.name)
def test_cuda_kernels_count_blocks_in_64_bits(file):
    assert not narrow_blocks(file.read_text())


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda f: f.name)
def test_what_is_made_32_bits_wide_is_listed_with_its_reason(file):
    assert set(narrowed(file.read_text())) == set(NARROWED.get(file.name, {}))


def test_what_is_made_32_bits_wide_is_found():
    source = "a = (x * 4).to(tl.int32)\nb = tl.cast(row, tl.int32)\nc = y.to(dtype=tl.uint32)"
    assert narrowed(source) == ["x * 4", "row", "y"]
    assert not narrowed("d = x.to(tl.int64) + tl.zeros((4,), tl.int32)")


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
        "const int i = threadIdx.y * blockDim.x + threadIdx.x;",
    ],
)
def test_a_block_number_in_32_bits_is_found(snippet):
    fine = "int64_t a = static_cast<int64_t>(blockIdx.x) * 4;  // blockIdx.x alone would wrap\n"
    assert set(narrow_blocks(fine + snippet)) == {2}
