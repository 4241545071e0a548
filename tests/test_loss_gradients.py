"""Gradients of the losses in 16 bits: the factors of a mean and of a loss scale cost nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops import OPS, feature_loss, patch_loss, patchify, use_backend
from fastmim.ops.feature_loss import KINDS
from tests import accuracy
from tests.conftest import DEVICE
from tests.operators import usable

PATCH, IMAGES, PATCHES = 4, 8, 49
VALUES = 3 * PATCH**2
IDS = torch.arange(PATCHES).expand(IMAGES, -1)
BETA = 8.0  # nothing is clamped: equal gradients would be rounded by equal amounts


def unit(target: Tensor) -> Tensor:
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (target - mean) / (variance + 1e-6).sqrt()


class PatchCase:
    op = OPS["patch_loss"]

    def __init__(self, teacher: bool) -> None:
        side = int(PATCHES**0.5) * PATCH
        self.imgs = torch.randn(IMAGES, 3, side, side, device=DEVICE)
        rows = torch.randn(IMAGES, PATCHES, VALUES, device=DEVICE)
        self.teacher = rows.to(torch.bfloat16) if teacher else None

    def loss(self, pred: Tensor) -> Tensor:
        teacher = None if self.teacher is None else self.teacher.to(pred.dtype)
        ids = IDS.to(DEVICE)
        options = {"norm_pix": True, "teacher_pred": teacher, "gamma": 0.5}
        return patch_loss(pred, self.imgs, ids, PATCH, **options).total

    def formula(self, pred: Tensor) -> Tensor:
        loss = F.mse_loss(pred, unit(patchify(self.imgs, PATCH).to(pred.dtype)))
        if self.teacher is None:
            return loss
        return loss + 0.5 * F.mse_loss(pred, self.teacher.to(pred.dtype))

    def arguments(self, pred: Tensor) -> tuple:
        return pred, self.imgs, IDS.to(DEVICE), PATCH, True, None, 0.5, None, None


class FeatureCase:
    op = OPS["feature_loss"]

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.target = torch.randn(IMAGES, PATCHES, VALUES, device=DEVICE)

    def loss(self, pred: Tensor) -> Tensor:
        return feature_loss(pred, self.target, kind=self.kind, beta=BETA)

    def formula(self, pred: Tensor) -> Tensor:
        target = unit(self.target.to(pred.dtype))
        if self.kind == "smooth_l1":
            return F.smooth_l1_loss(pred, target, beta=BETA)
        return 1 - F.cosine_similarity(pred, target, dim=-1 if self.kind == "cosine" else 1).mean()

    def arguments(self, pred: Tensor) -> tuple:
        return pred, self.target, None, True, None, None, self.kind, BETA


CASES = {
    "patch_loss": lambda: PatchCase(teacher=False),
    "patch_loss_teacher": lambda: PatchCase(teacher=True),
    **{kind: lambda kind=kind: FeatureCase(kind) for kind in KINDS},
}
ON_EVERY_BACKEND = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, b) for name, make in CASES.items() for b in make().op.backends],
)


def gradients(case, backend: str, dtype: torch.dtype, scale: float) -> list[Tensor]:
    """Of ``scale * loss``: from the operator, and from its formula in float32 and float64."""
    pred = torch.randn(IMAGES, PATCHES, VALUES, device=DEVICE).to(dtype).requires_grad_()
    usable(case.op, backend, case.arguments(pred))

    def served(pred: Tensor) -> Tensor:
        with use_backend(backend):
            return case.loss(pred)

    losses = served(pred), case.formula(pred.float())
    found = [torch.autograd.grad(scale * loss, pred)[0] for loss in losses]
    wide = pred.detach().double().requires_grad_()
    return [*found, torch.autograd.grad(scale * case.formula(wide), wide)[0]]


@ON_EVERY_BACKEND
def test_a_loss_scale_beyond_float16_neither_overflows_nor_underflows(name, backend):
    accuracy.relative(*gradients(CASES[name](), backend, torch.float16, 65536.0))


@ON_EVERY_BACKEND
def test_a_loss_divided_by_three_has_an_unbiased_gradient_in_bfloat16(name, backend):
    got, plain, formula = gradients(CASES[name](), backend, torch.bfloat16, 1 / 3)
    accuracy.relative(got, plain, formula)
    longer = ((got - formula) * formula.sign()).flatten()
    accuracy.sampled(longer, torch.zeros((), device=DEVICE))


@ON_EVERY_BACKEND
def test_nan_reaches_loss_and_gradient(name, backend):
    case = CASES[name]()
    pred = torch.randn(IMAGES, PATCHES, VALUES, device=DEVICE)
    pred[1, 2, 3] = float("nan")
    pred.requires_grad_()
    usable(case.op, backend, case.arguments(pred))
    results = []
    for chosen in (backend, "reference"):
        with use_backend(chosen):
            loss = case.loss(pred)
            results.append((loss.isnan(), torch.autograd.grad(loss, pred)[0].isnan()))
    assert results[0][0]
    assert results[0][1][1, 2, 3]
    for got, expected in zip(*results, strict=True):
        accuracy.exact(got, expected)
