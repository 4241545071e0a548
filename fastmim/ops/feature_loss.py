"""Loss between predicted and teacher features, as dBOT and SdAE use it."""

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._limits import refuse_native, refuse_rows
from fastmim.ops._registry import Implementation, Native, Op
from fastmim.ops.gather import random_ids
from fastmim.ops.scale import scale

KINDS = ("smooth_l1", "cosine", "cosine_token")


def feature_loss(
    pred: Tensor,
    target: Tensor,
    *,
    kind: str,
    ids: Tensor | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 2.0,
) -> Tensor:
    """Distance of ``pred`` to the (normalised) features of a teacher.

    * ``smooth_l1``: mean of ``0.5 d^2 / beta`` where ``|d| < beta``, else ``|d| - 0.5 beta``
      (dBOT, arXiv:2209.03917, with beta 2);
    * ``cosine``: 1 minus the mean cosine similarity of the tokens, taken over the features
      (SdAE, arXiv:2208.00449);
    * ``cosine_token``: the same taken over the tokens of an image, for each feature, as SdAE's
      released code does.

    The gradient of ``pred`` is made in the forward pass but for a factor, which the backward pass
    applies before it rounds to the dtype of ``pred``: it reads and writes the gradient once more.
    No normalised target is kept.

    Args:
        pred: (B, M, D), floating point.
        target: (B, M, D), floating point; (B, N, D) with ``ids``. Gets no gradient.
        kind: ``smooth_l1``, ``cosine`` or ``cosine_token``.
        ids: (B, M), int64, the token of ``target`` that belongs to each row of ``pred``, values in
            [0, N), not checked. Default: row by row.
        normalize: Normalise each target token over its features, with the unbiased variance and
            eps 1e-6 inside the root; D must then be at least 2.
        weight: (D,), factor of the target's features after that; no gradient.
        bias: (D,), summand; no gradient.
        beta: Of ``smooth_l1``, positive: where it turns linear.

    Returns:
        Scalar in float32 (float64 for float64). No rows give 0.

    Raises:
        ValueError: If the sizes do not fit or the kind is none of these.
    """
    if kind not in KINDS:
        raise ValueError(f"feature_loss: expected kind {', '.join(KINDS)}, got '{kind}'")
    if not beta > 0:
        raise ValueError(f"feature_loss: expected a positive beta, got {beta}")
    rows = tuple(pred.shape[:2])
    fits = pred.ndim == target.ndim == 3 and pred.shape[2] == target.shape[2]
    if ids is None:
        fits = fits and tuple(target.shape[:2]) == rows
    else:
        fits = fits and (tuple(ids.shape), ids.dtype) == (rows, torch.int64)
        fits = fits and target.shape[0] == pred.shape[0]
    if not fits:
        raise ValueError(
            "feature_loss: expected pred (B, M, D) and target (B, M, D), or target (B, N, D) and "
            f"ids (B, M) of int64, got {tuple(pred.shape)}, {tuple(target.shape)} and "
            f"{None if ids is None else (tuple(ids.shape), ids.dtype)}"
        )
    if normalize and pred.shape[2] < 2:
        raise ValueError("feature_loss: a token of a single feature cannot be normalised")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and tuple(value.shape) != tuple(pred.shape[2:]):
            raise ValueError(
                f"feature_loss: expected {name} ({pred.shape[2]},), got {tuple(value.shape)}"
            )
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    return _feature_loss(pred, target.detach(), ids, normalize, weight, bias, kind, beta)[0]


def _fake_feature_loss(pred, target, ids, normalize, weight, bias, kind, beta):
    double = torch.float64 in (pred.dtype, target.dtype)
    loss = pred.new_empty((), dtype=torch.float64 if double else torch.float32)
    return loss, pred.new_empty(pred.shape)


def _save_for_feature_loss(ctx, inputs, output):
    _, direction = output
    ctx.save_for_backward(direction)
    ctx.mark_non_differentiable(direction)
    ctx.kind = inputs[6]


def _feature_loss_backward(ctx, grad, _):
    (direction,) = ctx.saved_tensors
    b, m, d = direction.shape
    terms = {"smooth_l1": b * m * d, "cosine": b * m, "cosine_token": b * d}[ctx.kind]
    return (scale(direction, grad / max(terms, 1)), *(None,) * 7)


def _refuse(pred, target, ids, normalize, weight, bias, kind, beta):
    return refuse_rows(pred, target, weight, bias)


def _refuse_native(pred, target, ids, normalize, weight, bias, kind, beta):
    return refuse_native(pred, target)


def _make(b, m, n, d, kind, normalize, device, dtype):
    pred, target = (torch.randn(b, k, d, device=device, dtype=dtype) for k in (m, n))
    ids = random_ids(b, n, m, device)
    weight, bias = torch.rand(2, d, device=device, dtype=torch.float64)
    return pred, target, ids, normalize, weight, bias, kind, 0.7


def _shape(b, m, n, d, kind, normalize=True):
    return dict(b=b, m=m, n=n, d=d, kind=kind, normalize=normalize)


_feature_loss = Op(
    "feature_loss(Tensor pred, Tensor target, Tensor? ids, bool normalize, Tensor? weight, "
    "Tensor? bias, str kind, float beta) -> (Tensor, Tensor)",
    fake=_fake_feature_loss,
    implementations={
        "reference": reference.feature_loss,
        "cpp": Implementation(Native("feature_loss"), accepts=_refuse_native),
        "triton": Implementation("fastmim.kernels.feature_loss:feature_loss", accepts=_refuse),
    },
    shapes={
        "edge": _shape(2, 5, 5, 7, "smooth_l1"),
        "edge_cosine": _shape(2, 3, 3, 5, "cosine"),
        "edge_cosine_token": _shape(2, 3, 3, 4, "cosine_token"),
        "edge_as_given": _shape(1, 3, 3, 1, "smooth_l1", normalize=False),
        "edge_cosine_as_given": _shape(1, 1, 1, 5, "cosine", normalize=False),
        "edge_empty": _shape(0, 3, 3, 8, "smooth_l1"),
        "edge_encoder": _shape(1, 50, 50, 64, "cosine_token"),
        "edge_h14": _shape(2, 65, 65, 3, "cosine_token"),
        "edge_decoder": _shape(1, 197, 197, 16, "smooth_l1"),
        "edge_decoder_h14": _shape(1, 257, 257, 2, "cosine"),
        "edge_wide": _shape(1, 2, 2, 1280, "smooth_l1"),
        "dbot_b": _shape(256, 148, 197, 768, "smooth_l1"),
        "sdae_b": _shape(768, 49, 49, 768, "cosine"),
        "sdae_b_token": _shape(768, 49, 49, 768, "cosine_token"),
    },
    make=_make,
    setup_context=_save_for_feature_loss,
    backward=_feature_loss_backward,
)
