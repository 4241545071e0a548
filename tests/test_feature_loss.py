"""feature_loss against the losses that dBOT's and SdAE's code calls."""

import pytest
import torch
import torch.nn.functional as F

from fastmim.ops import OPS, feature_loss, use_backend
from tests import accuracy

BACKENDS = [b for b in OPS["feature_loss"].backends if b in ("reference", "triton")]


def published(pred, target, ids, kind, affine):
    """The loss as the authors write it, on the whole normalised target."""
    if ids is not None:
        target = target.gather(1, ids[..., None].expand(-1, -1, target.shape[-1]))
    mean = target.mean(dim=-1, keepdim=True)
    target = (target - mean) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    if affine:
        target = target * affine[0] + affine[1]
    if kind == "smooth_l1":
        return F.smooth_l1_loss(pred, target, beta=2.0)
    return 1 - F.cosine_similarity(target, pred, dim=-1 if kind == "cosine" else 1).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["smooth_l1", "cosine", "cosine_token"])
@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize(("rows", "tokens"), [(5, 5), (49, 197), (65, 257), (148, 197)])
def test_is_the_published_loss(backend, kind, with_affine, rows, tokens, device):
    if backend == "triton":
        pytest.importorskip("fastmim.kernels", reason="a checkout has no fastmim.kernels; install")
    reason = OPS["feature_loss"].unavailable(backend, torch.device(device))
    if reason:
        pytest.skip(reason)
    double = {"dtype": torch.float64, "device": device}
    pred = (torch.randn(2, rows, 24, **double) * 3).requires_grad_()
    target = torch.randn(2, tokens, 24, **double) * 2 + 1
    ids = None
    if rows != tokens:
        ids = torch.rand(2, tokens, device=device).argsort(dim=1)[:, :rows]
    affine = torch.randn(2, 24, **double).unbind() if with_affine else ()
    expected = published(pred, target, ids, kind, affine)
    with use_backend(backend):
        loss = feature_loss(
            pred, target, kind=kind, ids=ids, **dict(zip(("weight", "bias"), affine, strict=False))
        )
        (gradient,) = torch.autograd.grad(loss, pred)
    accuracy.golden(loss.detach(), expected.detach())
    accuracy.golden(gradient, torch.autograd.grad(expected, pred)[0])


def test_nothing_of_the_target_is_kept(device):
    pred = torch.randn(2, 5, 8, device=device, requires_grad=True)
    target = torch.randn(2, 5, 8, device=device)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        feature_loss(pred, target, kind="smooth_l1")
    assert [t.shape for t in kept] == [pred.shape]  # the direction of its gradient


def test_a_token_of_zeros_has_a_finite_gradient(device):
    pred = torch.zeros(1, 3, 8, device=device, requires_grad=True)
    for kind in ("cosine", "cosine_token"):
        loss = feature_loss(pred, torch.zeros(1, 3, 8, device=device), kind=kind)
        (gradient,) = torch.autograd.grad(loss, pred)
        accuracy.exact(loss.detach(), torch.ones((), device=device))
        accuracy.exact(gradient, torch.zeros_like(pred))
