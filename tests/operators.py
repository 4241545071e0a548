"""What the checks of operators share: calls on one backend, and the accuracy expected of them."""

import copy
import importlib.util
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastmim.ops import OPS, join_storage, use_backend
from fastmim.ops._registry import Op
from tests import accuracy

EXACT = {"gather_tokens", "scatter_tokens", "sample_masks"}
ROUNDING = {"restore_tokens", "scale"}
# Arguments that get a gradient; every floating-point tensor of an operator not named here.
DIFFERENTIABLE = {
    "gather_patches": {"imgs"},
    "patch_loss": {"pred"},
    "feature_loss": {"pred"},
    "crop_resize": set(),
    "scale": set(),
}
# Their state is float32 or float64, see test_sixteen_bit_state_is_refused.
IN_PLACE = {name for name, op in OPS.items() if op.overload._schema.is_mutable}


def refusal(op: Op, backend: str, args: tuple) -> str | None:
    """Why the backend cannot serve the call; None if it can."""
    device = next(leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    missing = importlib.util.find_spec("fastmim.kernels") is None
    if backend == "triton" and missing and op.unavailable(backend, device) is None:
        return "a checkout has no fastmim.kernels; install"
    with use_backend(backend):
        try:
            op.choose(device, args)
        except RuntimeError as refused:
            return str(refused)
    return None


def usable(op: Op, backend: str, args: tuple) -> None:
    """Skip with the reason if the backend cannot serve the call."""
    reason = refusal(op, backend, args)
    if reason is not None:
        pytest.skip(reason)


def run(op: Op, backend: str, args: tuple) -> list[Tensor]:
    """Results of a call on copies of ``args``: the tensors returned, or those changed in place.

    Split storage is joined: its halves alone say nothing about accuracy.
    """
    usable(op, backend, args)
    args = copy.deepcopy(args)
    with use_backend(backend):
        out = op(*args)
    if op.name not in IN_PLACE:
        return tree_leaves(out)
    changed = zip(with_masters(op, args), op.overload._schema.arguments, strict=True)
    return tree_leaves([a for a, s in changed if s.is_write])


def with_masters(op: Op, args: tuple) -> tuple:
    """The arguments of an update with float32 tensors in place of split storage."""
    names = [s.name for s in op.overload._schema.arguments]
    lists = dict(zip(names, args, strict=True))
    for name in names:
        if name.endswith("_remainders") and lists[name]:
            tensors = f"{name.removesuffix('_remainders')}s"
            pairs = zip(lists[tensors], lists[name], strict=True)
            lists[tensors] = [join_storage(*pair) for pair in pairs]
            lists[name] = []
    return tuple(lists.values())


def make(op: Op, shape: str, device: str, dtype: torch.dtype) -> tuple:
    return op.make(**op.shapes[shape], device=device, dtype=dtype)


def in_double(args: tuple, dtype: torch.dtype) -> tuple:
    """The same values in float64, bytes too, and a dtype argument likewise."""

    def widen(leaf):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.dtype == torch.uint8):
            return leaf.double()
        return torch.float64 if leaf is dtype else leaf

    return tree_map(widen, args)


def plain_attention_queries(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What a user writes in the dtype of ``q``; the reference computes in float32 at least."""
    q, (k, v) = q.transpose(1, 2), kv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * scale
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(dim=-1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2), lse


def plain_attention(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return plain_attention_queries(qkv[:, :, 0], qkv[:, :, 1:], scale)


def plain_attention_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen, scale: float):
    parts = [
        plain_attention(qkv[None, a:b], scale) for a, b in itertools.pairwise(cu_seqlens.tolist())
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def plain_attention_backward(grad: Tensor, qkv: Tensor, out, lse, scale: float) -> Tensor:
    qkv = qkv.detach().requires_grad_()
    return torch.autograd.grad(plain_attention(qkv, scale)[0], qkv, grad)


def plain_attention_queries_backward(grad: Tensor, q: Tensor, kv: Tensor, out, lse, scale: float):
    q, kv = (t.detach().requires_grad_() for t in (q, kv))
    return torch.autograd.grad(plain_attention_queries(q, kv, scale)[0], (q, kv), grad)


def plain_attention_varlen_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, scale) -> Tensor:
    qkv = qkv.detach().requires_grad_()
    out, _ = plain_attention_varlen(qkv, cu_seqlens, max_seqlen, scale)
    return torch.autograd.grad(out, qkv, grad)


# Plain PyTorch in the dtype of the call, where the reference is more careful than that.
PLAIN = {
    "attention": plain_attention,
    "attention_backward": plain_attention_backward,
    "attention_queries": plain_attention_queries,
    "attention_queries_backward": plain_attention_queries_backward,
    "attention_varlen": plain_attention_varlen,
    "attention_varlen_backward": plain_attention_varlen_backward,
}


def truths(op: Op, args: tuple, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """What plain PyTorch makes of a call in its dtype, and the result in float64."""
    plain = run(op, "reference", args)
    if op.name in PLAIN and plain[0].numel():
        plain = tree_leaves(PLAIN[op.name](*args))
    return plain, run(op, "reference", in_double(with_masters(op, args), dtype))


def assert_class(op: Op, got: Tensor, plain: Tensor, formula: Tensor) -> None:
    """One result is as accurate as the class of its operator asks."""
    if op.name in EXACT or not got.is_floating_point():
        accuracy.exact(got, plain)
    elif op.name in ROUNDING:
        accuracy.rounding(got, formula)
    elif got.dtype == torch.float64:  # then plain and formula are one, and no error is allowed
        accuracy.golden(got, plain)
    else:
        accuracy.relative(got, plain, formula)


def assert_accurate(op: Op, results: list[Tensor], args: tuple, dtype: torch.dtype) -> None:
    for got, plain, formula in zip(results, *truths(op, args, dtype), strict=True):
        assert_class(op, got, plain, formula)


def inputs(op: Op, args: tuple) -> list[Tensor]:
    """The arguments that get a gradient."""
    named = {s.name: a for s, a in zip(op.overload._schema.arguments, args, strict=True)}
    wanted = DIFFERENTIABLE.get(op.name, named)
    return [
        named[name]
        for name in wanted
        if isinstance(named[name], Tensor) and named[name].is_floating_point()
    ]


def variants(op: Op, args: tuple) -> list[tuple]:
    """The arguments as made, and with every optional tensor left out."""
    arguments = op.overload._schema.arguments
    optional = [str(s.type) == "Optional[Tensor]" for s in arguments]
    bare = tuple(None if o else a for a, o in zip(args, optional, strict=True))
    return [args, bare] if any(optional) else [args]


def strided(tensor: Tensor) -> Tensor:
    """The same values with a gap after each."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0] if tensor.ndim else tensor


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the strides of the transposed tensor."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def offset(tensor: Tensor) -> Tensor:
    """The same values one element into a storage, so no longer aligned to 16 bytes."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[-tensor.numel() :].view_as(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first row for every row, without memory of its own."""
    return tensor[:1].expand_as(tensor) if tensor.ndim and tensor.numel() else tensor
