"""The tolerance classes of the project; a test names one and never carries its own number.

exact     copies, gathers, masks: equal to the bit.
rounding  elementwise arithmetic: the float64 formula within 1 ulp of the stored dtype.
relative  reductions and products: at most twice the error that plain PyTorch makes in the same
          dtype, both against float64, plus 1 ulp of the largest value. Plain PyTorch counts as off
          by half an ulp at least: that a few values happen to round well promises nothing.
golden    the authors' recorded numbers: 1e-5 of the tensor's largest value in float32, 1e-9 in
          float64; trained weights likewise, but error and value as Euclidean norms, because AdamW
          divides by gradients that can be rounding noise in single entries.
run       two runs with one seed: the first 32 losses within 1e-4 (float32) or 2e-2 (bfloat16).
scalar    one number (a loss, a norm, a momentum) computed in two ways: the bound of a run.
sampled   the mean of a sample: within four standard errors of the known mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = {torch.float32: 1e-5, torch.float64: 1e-9}
_RUN = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def exact(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def rounding(got: Tensor, formula: Tensor) -> None:
    """``formula`` is the float64 result from the values ``got`` was made of."""
    bound = torch.finfo(got.dtype).eps * formula.abs().clamp_min(torch.finfo(got.dtype).tiny)
    _assert_within(got, formula, bound)


def relative(got: Tensor, plain: Tensor, formula: Tensor) -> None:
    """``plain`` is what PyTorch makes in the dtype of ``got``, ``formula`` the float64 result."""
    assert got.dtype == plain.dtype
    if formula.numel():
        ulp = torch.finfo(got.dtype).eps * formula.abs().max()
        error = (plain.double() - formula).abs().max().clamp_min(ulp / 2)
        _assert_within(got, formula, 2 * error + ulp)
    assert got.shape == formula.shape


def golden(got: Tensor, recorded: Tensor) -> None:
    assert got.dtype == recorded.dtype
    largest = recorded.double().abs().max() if recorded.numel() else 0.0
    _assert_within(got, recorded.double(), torch.as_tensor(_GOLDEN[got.dtype] * largest))


def golden_weights(got: Tensor, recorded: Tensor) -> None:
    assert got.shape == recorded.shape
    error = (got.double() - recorded.double()).norm() / recorded.double().norm()
    assert error <= _GOLDEN[got.dtype], f"relative error {error:.3g}"


def run(losses: Sequence[float], expected: Sequence[float], dtype: torch.dtype) -> None:
    got, reference = (
        torch.tensor(values[:32], dtype=torch.float64) for values in (losses, expected)
    )
    _assert_within(got, reference, _RUN[dtype] * reference.abs())


def scalar(got: float | Tensor, expected: float | Tensor, dtype: torch.dtype) -> None:
    """``dtype`` is the less precise one of the two computations."""
    run(*([torch.as_tensor(value).item()] for value in (got, expected)), dtype)


def sampled(sample: Tensor, mean: Tensor) -> None:
    """``sample`` is (n, ...), independent values of the known mean (...)."""
    error = sample.double().std(dim=0) / len(sample) ** 0.5
    _assert_within(sample.double().mean(dim=0), mean.double(), 4 * error)


def _assert_within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    error = (got.double() - expected).abs()
    within = error <= bound  # false for NaN
    assert within.all(), (
        f"{int((~within).sum())} of {got.numel()} values are off; largest error "
        f"{error.max():.3g}, allowed {torch.as_tensor(bound).max():.3g}"
    )
