"""Random shapes, dtypes, strides and ids: every operator on every backend, and its shape rule.

``FASTMIM_FUZZ_EXAMPLES=5000`` draws that many new examples for each operator; without it a few,
always the same.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from fastmim.ops import OPS
from fastmim.ops._registry import Implementation, Op
from fastmim.ops.feature_loss import KINDS
from tests.conftest import DEVICE
from tests.operators import (
    IN_PLACE,
    assert_class,
    expanded,
    make,
    offset,
    refusal,
    run,
    strided,
    transposed,
    truths,
    variants,
)

_ASKED = os.environ.get("FASTMIM_FUZZ_EXAMPLES")
_EXAMPLES = int(_ASKED or 50)
_INTERPRETED = 10  # one example in Triton's interpreter takes the time of so many elsewhere
_DRAWS = 16
_SETTINGS = settings(
    derandomize=_ASKED is None,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_LAYOUTS = (Tensor.contiguous, strided, transposed, offset)

_SMALL, _POSITIVE = st.integers(0, 9), st.integers(1, 9)
_TOKENS = st.integers(0, 70)
_FLAG = st.booleans()
_STORAGES = st.sampled_from(["plain", "copied", "split"])


def _rows(draw) -> dict:
    return dict(b=draw(_SMALL), n=draw(_TOKENS), d=draw(_POSITIVE))


def _tokens(draw) -> dict:
    n = draw(_TOKENS)
    return dict(b=draw(_SMALL), n=n, k=draw(st.integers(0, n)), d=draw(_SMALL))


def _restored(draw) -> dict:
    n = draw(st.integers(2, 70))
    return dict(b=draw(_SMALL), n=n, k=draw(st.integers(1, n - 1)), d=draw(_SMALL))


def _attention(draw) -> dict:
    return dict(b=draw(_SMALL), n=draw(st.integers(1, 70)), h=draw(_POSITIVE), d=draw(_POSITIVE))


def _attention_queries(draw) -> dict:
    # A gradient of queries to one key alone is 0, a difference of equal sums: mere rounding.
    n = draw(st.integers(2, 70))
    return dict(_attention(draw), m=draw(st.integers(0, 70)), n=n)


def _attention_varlen(draw) -> dict:
    lengths = tuple(draw(st.lists(_TOKENS, min_size=1, max_size=5).filter(any)))
    return dict(lengths=lengths, h=draw(_POSITIVE), d=draw(_POSITIVE))


def _patches(draw, count: str) -> dict:
    h, w = draw(_SMALL), draw(_SMALL)
    cut = dict(c=draw(_POSITIVE), h=h, w=w, p=draw(st.integers(1, 5)), uint8=draw(_FLAG))
    return dict(b=draw(_SMALL), **cut, **{count: draw(st.integers(0, h * w))})


def _patch_loss(draw) -> dict:
    sizes = _patches(draw, "m")
    several = sizes["c"] * sizes["p"] > 1  # one value has no variance
    return dict(**sizes, teacher=draw(_FLAG), norm_pix=several and draw(_FLAG))


def _feature_loss(draw) -> dict:
    n, d = draw(_TOKENS), draw(_POSITIVE)
    kind = draw(st.sampled_from(KINDS))
    m = draw(st.integers(0, n))
    return dict(b=draw(_SMALL), m=m, n=n, d=d, kind=kind, normalize=d > 1 and draw(_FLAG))


def _linear(draw) -> dict:
    return dict(b=draw(_SMALL), n=draw(_TOKENS), d=draw(_POSITIVE), e=draw(_POSITIVE))


def _lists(draw, *stored: str) -> dict:
    sizes = tuple(draw(st.lists(_TOKENS, min_size=1, max_size=9)))
    return dict(sizes=sizes, **{name: draw(_STORAGES) for name in stored})


def _resized(draw) -> dict:
    sides = {name: draw(_POSITIVE) for name in ("h", "w", "height", "width")}
    return dict(b=draw(_SMALL), c=draw(_POSITIVE), **sides, raw=draw(_FLAG))


# The keywords of an operator's ``make``, drawn from everything that its documentation allows.
_SIZES: dict[str, Callable[..., dict]] = {
    "sample_masks": lambda draw: dict(b=draw(_SMALL), n=draw(st.integers(2, 70))),
    "gather_tokens": _tokens,
    "scatter_tokens": _tokens,
    "gather_patches": lambda draw: _patches(draw, "k"),
    "restore_tokens": _restored,
    "restore_tokens_backward": _restored,
    "attention": _attention,
    "attention_backward": _attention,
    "attention_queries": _attention_queries,
    "attention_queries_backward": _attention_queries,
    "attention_varlen": _attention_varlen,
    "attention_varlen_backward": _attention_varlen,
    "norm": _rows,
    "norm_backward": _rows,
    "norm_linear": _rows,
    "bias_gelu": _rows,
    "bias_gelu_backward": _rows,
    "bias_gelu_linear": _rows,
    "linear": _linear,
    "linear_weight_grad": _linear,
    "patch_loss": _patch_loss,
    "scale": _rows,
    "feature_loss": _feature_loss,
    "sample_crops": lambda draw: dict(b=draw(_SMALL), h=draw(_POSITIVE), w=draw(_POSITIVE)),
    "crop_resize": _resized,
    "ema_update_": lambda draw: _lists(draw, "teachers", "students"),
    "adamw_ema_": lambda draw: _lists(draw, "params", "teachers"),
}


def _takes(op: Op, sizes: dict, dtype: torch.dtype) -> bool:
    if op.name in IN_PLACE:
        split = "split" in sizes.values()  # halves of float32
        return dtype == torch.float32 or (dtype == torch.float64 and not split)
    # Bytes become float32: a float64 result from them has errors of float32.
    return dtype != torch.float64 or not (sizes.get("uint8") or op.name == "crop_resize")


@dataclass(frozen=True)
class Call:
    """A call of random sizes, dtype and layouts; its values follow from a seed."""

    op: Op
    sizes: dict
    dtype: torch.dtype
    variant: int
    layouts: list[Callable[[Tensor], Tensor]]
    seed: int

    def arguments(self, draw: int = 0) -> tuple:
        """The arguments; every ``draw`` has other values and ids."""
        torch.manual_seed(self.seed + draw)
        args = self.op.make(**self.sizes, device=DEVICE, dtype=self.dtype)
        args = variants(self.op, args)[self.variant]
        layouts = itertools.cycle(self.layouts)
        # Of an update the lists alone: whoever calls it hands its scalars over as they must be.
        return tuple(
            tree_map(lambda leaf: next(layouts)(leaf) if isinstance(leaf, Tensor) else leaf, arg)
            if isinstance(arg, list) or self.op.name not in IN_PLACE
            else arg
            for arg in args
        )


@st.composite
def _calls(draw, op: Op) -> Call:
    sizes = _SIZES[op.name](draw)
    dtype = draw(st.sampled_from([d for d in _DTYPES if _takes(op, sizes, d)]))
    variant = 0
    if op.name != "feature_loss" or sizes["m"] == sizes["n"]:  # without ids it is row by row
        variant = draw(st.integers(0, len(variants(op, make(op, "edge", "cpu", dtype))) - 1))
    # All or none: what was computed from an expanded tensor must be expanded with it. Starts of
    # sequences cannot be: they would all be 0.
    if op.name not in IN_PLACE and "varlen" not in op.name and draw(_FLAG):
        layouts = [expanded]
    else:
        layouts = draw(st.lists(st.sampled_from(_LAYOUTS), min_size=1, max_size=7))
    return Call(op, sizes, dtype, variant, layouts, seed=draw(st.integers(0, 2**32)))


def fuzz(op: Op, check: Callable[[Call], None], examples: int) -> None:
    """Check random calls of ``op``; the simplest that fails is reported."""

    @settings(_SETTINGS, max_examples=examples)
    @given(_calls(op))
    def draw_and_check(call):
        check(call)

    draw_and_check()


def assert_right(call: Call, backend: str) -> None:
    """The result is that of the reference, if the backend takes the call."""
    op = call.op
    if refusal(op, backend, call.arguments()) is not None:
        return

    def outcome(draw: int) -> list[tuple[Tensor, ...]]:
        args = call.arguments(draw)
        results = run(op, backend, args)
        contiguous = tree_map(lambda a: a.contiguous() if isinstance(a, Tensor) else a, args)
        truth = truths(op, contiguous, call.dtype)
        assert [r.shape for r in results] == [t.shape for t in truth[0]]
        return list(zip(results, *truth, strict=True))

    def judge(draws: int) -> None:
        for results in zip(*map(outcome, range(draws)), strict=True):
            joined = (torch.cat([r.flatten() for r in rs]) for rs in zip(*results, strict=True))
            assert_class(op, *joined)

    try:
        judge(1)
    except AssertionError:
        # PyTorch may by luck be exact where there are few values: then more draws show its error.
        judge(_DRAWS)


@pytest.mark.parametrize(
    ("op", "backend"),
    [pytest.param(op, b, id=f"{op.name}-{b}") for op in OPS.values() for b in op.backends],
)
def test_any_call_is_right_on_every_backend(op, backend):
    reason = op.unavailable(backend, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    examples = _EXAMPLES // _INTERPRETED if backend == "triton" else _EXAMPLES
    fuzz(op, lambda call: assert_right(call, backend), examples)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_shape_rule_foretells_every_result(op):
    def check(call):
        args = call.arguments()
        results = run(op, "reference", args)
        with FakeTensorMode() as mode:
            given = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fakes = op(*given)
        for fake, real in zip(tree_leaves(fakes), results, strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            assert fake.is_contiguous() == real.is_contiguous()

    if op.name in IN_PLACE:
        pytest.skip("it returns nothing")
    fuzz(op, check, _EXAMPLES)


def _wrong_beyond_64(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids.clamp(max=63).unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _wrong_unless_contiguous(x: Tensor, ids: Tensor) -> Tensor:
    x = x.as_strided(x.shape, torch.empty(x.shape).stride())
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@pytest.mark.parametrize("wrong", [_wrong_beyond_64, _wrong_unless_contiguous])
def test_a_planted_fault_is_found(wrong, monkeypatch):
    op = OPS["gather_tokens"]
    monkeypatch.setitem(op._implementations, "cpp", Implementation(wrong))
    monkeypatch.setitem(op._loaded, "cpp", wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        fuzz(op, lambda call: assert_right(call, "cpp"), 200)
