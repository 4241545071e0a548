"""Triton's interpreter is wrong in bfloat16; the repair that the tests install makes it right."""

import pytest
import torch

from tests import accuracy
from tests.conftest import DEVICE

if DEVICE != "cpu":
    pytest.skip("Triton kernels are compiled, not interpreted", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from tests import interpreter_bf16  # noqa: E402

SIZE = 1 << 12


@triton.jit
def _cast_kernel(x_ptr, _y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


@triton.jit
def _greater_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, (tl.load(x_ptr + i) > tl.load(y_ptr + i)).to(tl.float32))


@triton.jit
def _negate_kernel(x_ptr, _y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, -tl.load(x_ptr + i))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, 64)
    at = i[:, None] * 64 + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


CASES = {
    "cast_float": (_cast_kernel, torch.float32, lambda x, y: x.bfloat16()),
    "cast_double": (_cast_kernel, torch.float64, lambda x, y: x.bfloat16()),
    "add": (_add_kernel, torch.bfloat16, lambda x, y: x + y),
    "greater": (_greater_kernel, torch.bfloat16, lambda x, y: (x > y).float()),
    "negate": (_negate_kernel, torch.bfloat16, lambda x, y: -x),
    "dot": (
        _dot_kernel,
        torch.bfloat16,
        lambda x, y: (x.float().view(64, 64) @ y.float().view(64, 64)).flatten(),
    ),
}


def assert_right(case: str) -> None:
    kernel, dtype, formula = CASES[case]
    x, y = (torch.randn(SIZE, dtype=torch.float64).to(dtype) for _ in range(2))
    if "cast" in case:
        x[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e30])
    if case == "dot":  # small whole numbers: their products and sums are exact
        x, y = (t.mul(4).round() for t in (x, y))
    expected = formula(x, y)
    out = torch.empty_like(expected)
    kernel[(1,)](x, y, out, SIZE=SIZE)
    accuracy.exact(out, expected)


@pytest.mark.parametrize("case", CASES)
def test_repaired_interpreter_computes_bfloat16_as_pytorch_does(case):
    assert_right(case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_repair_is_still_needed(case, monkeypatch):
    for name, method in interpreter_bf16.ORIGINAL.items():
        monkeypatch.setattr(InterpreterBuilder, name, method)
    with pytest.raises((AssertionError, InterpreterError)):
        assert_right(case)
