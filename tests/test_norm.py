"""norm and bias_gelu, alone or with the linear layer after them: PyTorch's layers, fewer bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops import OPS, bias_gelu, bias_gelu_linear, norm, norm_linear, use_backend
from tests import accuracy

BACKENDS = [b for b in OPS["norm"].backends if b in ("reference", "triton")]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def usable(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("fastmim.kernels", reason="a checkout has no fastmim.kernels; install")
    reason = OPS["norm"].unavailable(backend, torch.device(device))
    if reason:
        pytest.skip(reason)


def leaves(*shapes: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64):
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def assert_same(results: list[Tensor], expected: list[Tensor], inputs: list[Tensor]) -> None:
    """The same values, and the same gradients of a weighted sum of them."""
    weights = [torch.randn_like(e) for e in expected]
    gradients = []
    for outs in (results, expected):
        total = sum((w * o).sum() for w, o in zip(weights, outs, strict=True))
        gradients.append(torch.autograd.grad(total, inputs))
    for got, right in zip([*results, *gradients[0]], [*expected, *gradients[1]], strict=True):
        accuracy.golden(got.detach(), right.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 50, 65, 197, 257])
def test_norm_is_layer_norm_of_the_sum(backend, rows, device):
    usable(backend, device)
    given = leaves((2, rows, 12), (2, rows, 12), (12,), (12,), device=device)
    x, branch, weight, bias = given
    with use_backend(backend):
        results = list(norm(x, weight, bias, eps=1e-6, branch=branch))
        total = x + branch
        assert_same(results, [F.layer_norm(total, (12,), weight, bias, 1e-6), total], given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_linear_is_layer_norm_and_linear(backend, device):
    usable(backend, device)
    given = leaves((3, 5, 12), (3, 5, 12), (12,), (12,), (7, 12), (7,), device=device)
    x, branch, norm_weight, norm_bias, weight, bias = given
    with use_backend(backend):
        results = list(norm_linear(x, *given[2:], eps=1e-6, branch=branch))
        total = x + branch
        rows = F.layer_norm(total, (12,), norm_weight, norm_bias, 1e-6)
        assert_same(results, [F.linear(rows, weight, bias), total], given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gelu_is_gelu(backend, device):
    usable(backend, device)
    given = leaves((3, 5, 12), (12,), device=device)
    with use_backend(backend):
        assert_same([bias_gelu(*given)], [F.gelu(given[0] + given[1])], given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gelu_linear_is_gelu_and_linear(backend, device):
    usable(backend, device)
    given = leaves((3, 5, 12), (12,), (7, 12), (7,), device=device)
    x, bias, weight, out_bias = given
    with use_backend(backend):
        expected = F.linear(F.gelu(x + bias), weight, out_bias)
        assert_same([bias_gelu_linear(*given)], [expected], given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branch_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics_are_those_of_the_rounded_stream(backend, dtype, branch_dtype, device):
    usable(backend, device)
    x = torch.randn(3, 5, 24, device=device).to(dtype)
    branch = torch.randn(3, 5, 24, device=device).to(branch_dtype)
    weight, bias = torch.randn(2, 24, device=device)
    with use_backend(backend):
        out, total = norm(x, weight, bias, eps=1e-6, branch=branch, dtype=x.dtype)
        again, same = norm(total, weight, bias, eps=1e-6, dtype=x.dtype)
    assert out.dtype == total.dtype == dtype
    accuracy.rounding(total, x.double() + branch.double())
    accuracy.exact(again, out)
    assert same is total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1e4, 3e18])
def test_a_far_mean_does_not_cancel(backend, value, device):
    """The variance is that of the centred values; E[x^2] - E[x]^2 would lose all digits."""
    usable(backend, device)
    x = torch.randn(4, 64, device=device) * value * 1e-3 + value
    one, zero = torch.ones(64, device=device), torch.zeros(64, device=device)
    with use_backend(backend):
        out = norm(x, one, zero, eps=1e-6).out
    plain = F.layer_norm(x, (64,), eps=1e-6)
    accuracy.relative(out, plain, F.layer_norm(x.double(), (64,), eps=1e-6))


def test_rows_beyond_the_registers_are_refused_by_triton():
    args = OPS["norm"].make(b=1, n=1, d=8193, device="cpu", dtype=torch.float32)
    reason = OPS["norm"].refuses("triton", args)
    assert reason == "it takes rows of 1 to 8192 values, not 8193"


def saved_bytes(call) -> int:
    """Bytes that ``call`` keeps for its backward pass, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()
    del out
    return sum(kept.values())


ROWS, WIDTH, WIDER = 6, 16, 64
STATISTICS = 2 * ROWS * 4


def parameters(*shapes, device):
    return leaves(*shapes, device=device, dtype=torch.float32)


def test_norm_keeps_the_stream_the_statistics_and_the_weight(device):
    x, branch, *affine = parameters((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,), device=device)
    kept = saved_bytes(lambda: norm(x, *affine, eps=1e-6, branch=branch))
    assert kept == ROWS * WIDTH * 4 + STATISTICS + WIDTH * 4


def test_norm_linear_does_not_keep_the_normalised_tokens(device):
    x, branch, *rest = parameters(
        (ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,), (WIDER, WIDTH), (WIDER,), device=device
    )
    kept = saved_bytes(lambda: norm_linear(x, *rest, eps=1e-6, branch=branch))
    assert kept == ROWS * WIDTH * 4 + STATISTICS + 2 * WIDTH * 4 + WIDER * WIDTH * 4


def test_bias_gelu_linear_keeps_its_input_alone(device):
    given = parameters((ROWS, WIDER), (WIDER,), (WIDTH, WIDER), (WIDTH,), device=device)
    kept = saved_bytes(lambda: bias_gelu_linear(*given))
    assert kept == ROWS * WIDER * 4 + WIDER * 4 + WIDTH * WIDER * 4
