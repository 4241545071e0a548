"""Who serves attention on a GPU: a committed table, or what FASTMIM_ATTENTION asks for."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastmim.ops import _attention_libraries as libraries
from fastmim.ops._attention_libraries import Call
from fastmim.ops._registry import forced_backend


class Choice(NamedTuple):
    """What ``auto`` takes on a GPU for shapes up to these, if it can serve them.

    Attributes:
        tokens: N, at most.
        head_dim: D, at most.
        backend: "triton", or "cuda" for PyTorch's kernels.
        evidence: "measured" and where, or "predicted" and by what.
    """

    tokens: int
    head_dim: int
    backend: str
    evidence: str


# The first row that covers N and D counts. A row without a measurement says so. Float32 is not in
# it: PyTorch's kernels take that.
GPU_TABLE = (
    Choice(64, 128, "triton", "predicted by a roofline model at (50, 64): 2.2 and 4.5 times flash"),
    Choice(80, 80, "triton", "predicted by a roofline model at (65, 80): 1.8 and 4.0 times flash"),
    Choice(
        208, 64, "triton", "predicted by a roofline model at (197, 32): 1.4 and 1.8 times flash"
    ),
    Choice(272, 32, "triton", "predicted by a roofline model at (257, 32): 1.9 times flash"),
)
# Words of FASTMIM_ATTENTION to the backend, and to the library where that is a choice.
WORDS: dict[str, tuple[str, str | None]] = {
    "triton": ("triton", None),
    "sdpa": ("cuda", None),
    "flash": ("cuda", "flash"),
    "cudnn": ("cuda", "cudnn"),
    "efficient": ("cuda", "efficient"),
    "xformers": ("cuda", "xformers"),
    "reference": ("reference", None),
}
# Of the Triton kernels: the most tokens by padded head dim, for which a chunk of queries with all
# its scores fits in registers; see docs/kernels.md.
_TRITON_TOKENS = {16: 272, 32: 272, 64: 208, 128: 208}
# Exact products of float32 take a minute to compile for long sequences, and spill.
_TRITON_TOKENS_FLOAT32 = {16: 80, 32: 80, 64: 80}
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _parse(asked: str | None) -> str | None:
    if asked in (None, "", "auto"):
        return None
    if asked not in WORDS:
        raise ValueError(
            f"unknown attention '{asked}'; FASTMIM_ATTENTION takes auto, {', '.join(WORDS)}"
        )
    return asked


_asked = _parse(os.environ.get("FASTMIM_ATTENTION"))


@contextlib.contextmanager
def use_attention(word: str) -> Iterator[None]:
    """Serve attention on a GPU as FASTMIM_ATTENTION=``word`` would, inside the block.

    Args:
        word: "auto", or one of :data:`WORDS`.

    Raises:
        ValueError: At once, if there is no such word.
        RuntimeError: At the first call that it cannot serve, with why.
    """
    global _asked
    previous, _asked = _asked, _parse(word)
    try:
        yield
    finally:
        _asked = previous


def override() -> tuple[str, str] | None:
    """The backend asked for by FASTMIM_ATTENTION, and the words for it."""
    return None if _asked is None else (WORDS[_asked][0], f"FASTMIM_ATTENTION={_asked}")


def library(call: Call) -> str:
    """The library asked for, or PyTorch's usual choice for the call."""
    return libraries.library_for(None if _asked is None else WORDS[_asked][1], call)


def gpu_choice(tokens: int, head_dim: int) -> Choice:
    """What ``auto`` takes on a GPU for 16-bit calls of this shape, and why.

    Args:
        tokens: N.
        head_dim: D.

    Returns:
        The row of :data:`GPU_TABLE`; without one, PyTorch's kernels.
    """
    for choice in GPU_TABLE:
        if tokens <= choice.tokens and head_dim <= choice.head_dim:
            return choice
    return Choice(tokens, head_dim, "cuda", "not in the table")


def triton_refuses(call: Call) -> str | None:
    """Why the Triton kernels cannot serve; None if they can."""
    m, n, d = call.queries, call.keys, call.head_dim
    if call.dtype not in _TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32, not {call.dtype}"
    limits = _TRITON_TOKENS_FLOAT32 if call.dtype == torch.float32 else _TRITON_TOKENS
    most = next((tokens for width, tokens in limits.items() if d <= width), 0)
    if not (m >= 1 and n >= 1 and d >= 1 and max(m, n) <= most):
        return f"{m} queries and {n} keys of head dim {d} do not fit in its registers"
    if not call.scale > 0:
        return f"it needs a positive scale, not {call.scale}"
    return None


def library_refuses(call: Call) -> str | None:
    """Why PyTorch's and xformers' kernels cannot, or under ``auto`` need not; None if they do."""
    reason = libraries.refuses(library(call), call)
    if reason is None and _asked is None and forced_backend() is None:
        choice = gpu_choice(call.keys, call.head_dim)
        half = call.dtype != torch.float32
        if choice.backend == "triton" and half and triton_refuses(call) is None:
            return f"auto takes triton here: {choice.evidence}"
    return reason


def refuses(word: str, call: Call) -> str | None:
    """Why what FASTMIM_ATTENTION=``word`` asks for cannot serve on the right device, or None."""
    backend, name = WORDS[word]
    if backend == "triton":
        return triton_refuses(call)
    if backend == "cuda":
        return libraries.refuses(libraries.library_for(name, call), call)
    return None
