"""Suite ``attention``: forward and backward alone and together, against every peer at its best.

A peer is called through its own best entry, packed where it has one; what is copied around it
counts. Ours are the words of FASTMIM_ATTENTION, and ``auto``.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import interleave, saved_bytes, speedup
from suite import CHECKS, FLOOR, TIMES, Column, Options
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmim import ops
from fastmim.ops.attention import attention_backends, use_attention

NAME = "attention"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Relative error (Euclidean norm) of the result and of the gradients against PyTorch in float64.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_CHECKED = 2  # images
_MODES = ("forward", "backward", "both")
_SMOKE_BATCH = 2
Program = Callable[..., Tensor]


class Sizes(NamedTuple):
    """One call.

    Attributes:
        batch: B.
        tokens: N, keys of an image.
        num_heads: H.
        head_dim: D.
        dtype: Of queries, keys and values.
        queries: M, if these are fewer than the tokens.
        lengths: Tokens of each sequence of a pack, repeated ``batch`` times, in place of N.
    """

    batch: int
    tokens: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    queries: int | None = None
    lengths: tuple[int, ...] | None = None

    def inputs(self, device: torch.device, batch: int) -> tuple[Tensor, ...]:
        """qkv; or queries and the packed keys and values."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(self.dtype)

        parts = (self.num_heads, self.head_dim)
        if self.lengths is not None:
            return (normal(batch * sum(self.lengths), 3, *parts),)
        if self.queries is not None:
            return normal(batch, self.queries, *parts), normal(batch, self.tokens, 2, *parts)
        return (normal(batch, self.tokens, 3, *parts),)

    def scores(self, batch: int) -> int:
        """Of all queries with all keys, over heads."""
        pairs = (self.queries or self.tokens) * self.tokens
        if self.lengths is not None:
            pairs = sum(length**2 for length in self.lengths)
        return batch * self.num_heads * pairs

    def starts(self, device: torch.device, batch: int) -> Tensor:
        """(B + 1,), first rows of the sequences."""
        lengths = torch.tensor([0, *self.lengths * batch], dtype=torch.int32)
        return lengths.cumsum(0, dtype=torch.int32).to(device)


_FP32 = torch.float32
SHAPES = {
    "cpu17": Sizes(64, 17, 4, 32, _FP32),
    "cpu50": Sizes(8, 50, 6, 64, _FP32),
    "cpu65": Sizes(64, 65, 4, 16, _FP32),
    "cpu65_masked": Sizes(64, 65, 4, 16, _FP32, queries=48),
    "cpu197": Sizes(8, 197, 16, 32, _FP32),
    "cpu_crops": Sizes(16, 0, 6, 64, _FP32, lengths=(64, 50, 37, 17)),
    "encoder_b": Sizes(256, 50, 12, 64),
    "encoder_l": Sizes(256, 50, 16, 64),
    "encoder_l_1024": Sizes(1024, 50, 16, 64),
    "encoder_h14": Sizes(256, 65, 16, 80),
    "decoder": Sizes(256, 197, 16, 32),
    "decoder_1024": Sizes(1024, 197, 16, 32),
    "decoder_masked": Sizes(256, 197, 16, 32, queries=147),
    "decoder_h14": Sizes(256, 257, 16, 32),
    "image_l": Sizes(256, 197, 16, 64),
    "image_h14": Sizes(256, 257, 16, 80),
    "crops": Sizes(256, 0, 16, 64, lengths=(64, 50, 37, 17)),
}
DEFAULT = {
    "cpu": [name for name in SHAPES if name.startswith("cpu")],
    "cuda": [name for name in SHAPES if not name.startswith("cpu")],
}
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("pass", "kernel_operation_mode", ""),
    ("program", "kernel_provider", ""), ("dtype", "dtype", ""), ("batch", "x_value", "d"),
    *((header, field, ".3f") for header, field, _ in TIMES), *FLOOR,
    ("vs sdpa", "vs_peer", ".2f"), ("vs best peer", "vs_best_peer", ".2f"),
    ("kept MB", "saved_mb", ".1f"), ("peak MB", "peak_mb", ".1f"), *CHECKS,
]
# fmt: on


def _apart(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, (B, tokens, H, D) each."""
    return given[0].unbind(2) if len(given) == 1 else (given[0], *given[1].unbind(2))


def _sdpa(backend: SDPBackend | None, *given: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in _apart(*given))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(*given: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in _apart(*given))
    return _compiled_flex()(q, k, v).transpose(1, 2)


def _xformers(*given: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*_apart(*given))


def _flash_attn(*given: Tensor) -> Tensor:
    from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func

    return (flash_attn_qkvpacked_func if len(given) == 1 else flash_attn_kvpacked_func)(*given)


def _plain(*given: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in _apart(*given))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v).transpose(1, 2)


def _each_sequence(attention: Program, starts: list[int], qkv: Tensor) -> Tensor:
    return torch.cat([attention(qkv[None, a:b])[0] for a, b in pairwise(starts)])


def _varlen_peers(sizes: Sizes, device: torch.device, batch: int) -> dict[str, Program]:
    starts, longest = sizes.starts(device, batch), max(sizes.lengths)
    known = starts.tolist()

    def flash(qkv: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(*qkv.unbind(1), starts, starts, longest, longest)

    def xformers(qkv: Tensor) -> Tensor:
        from xformers.ops import fmha

        mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(
            sizes.lengths * batch, device=qkv.device
        )
        q, k, v = (t[None] for t in qkv.unbind(1))
        return fmha.memory_efficient_attention(q, k, v, attn_bias=mask)[0]

    return {
        "plain": functools.partial(_each_sequence, _plain, known),
        "sdpa": functools.partial(_each_sequence, functools.partial(_sdpa, None), known),
        "varlen_attn": flash,
        "xformers": xformers,
    }


_PEERS: dict[str, Program] = {
    "plain": _plain,
    "sdpa": functools.partial(_sdpa, None),
    "sdpa-flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex,
    "xformers": _xformers,
    "flash-attn": _flash_attn,
}


def programs(sizes: Sizes, device: torch.device, batch: int) -> dict[str, Program]:
    """Every peer and every implementation of ours, by name; they may turn out not to serve."""
    if sizes.lengths is not None:
        starts, longest = sizes.starts(device, batch), max(sizes.lengths)
        peers = _varlen_peers(sizes, device, batch)

        def ours(qkv: Tensor) -> Tensor:
            return ops.attention_varlen(qkv, starts, longest)
    else:
        peers = _PEERS
        ours = ops.attention if sizes.queries is None else ops.attention_queries
    words = {name: functools.partial(_asked, name.split()[1], ours) for name in _OURS}
    return {**peers, **words}


_OURS = tuple(
    f"fastmim {word}"
    for word in ("auto", "triton", "sdpa", "flash", "cudnn", "efficient", "xformers")
)


def _asked(word: str, attention: Program, *given: Tensor) -> Tensor:
    with use_attention(word):
        return attention(*given)


def _gradients(program: Program, given: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    out = program(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _error(program: Program, sizes: Sizes, device: torch.device) -> float:
    """Largest relative error of the result and of the gradients."""
    given = sizes.inputs(device, _CHECKED)
    plain = programs(sizes, device, _CHECKED)["plain"]
    grad = torch.randn_like(plain(*given))
    truth = _gradients(plain, tuple(t.double() for t in given), grad.double())
    ratios = [
        (got.double() - right).norm() / right.norm()
        for got, right in zip(_gradients(program, given, grad), truth, strict=True)
    ]
    return float(torch.stack(ratios).max())


def _serving(sizes: Sizes, device: torch.device, say: Callable[[str], None]) -> dict[str, float]:
    """Error of each program that serves; the others are said, with the reason."""
    errors = {}
    refused = _refused(sizes, device)
    for name, program in programs(sizes, device, _CHECKED).items():
        reason = refused.get(name)
        if reason is None:
            try:
                errors[name] = _error(program, sizes, device)
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as refusal:
                reason = str(refusal).strip().splitlines()[0]
        if reason is not None:
            say(f"  {name}: not here: {reason}")
    return errors


def _refused(sizes: Sizes, device: torch.device) -> dict[str, str]:
    """Of ours, those that cannot serve, and FlexAttention where it has no gradient."""
    given = sizes.inputs(device, 1)
    longest = None if sizes.lengths is None else max(sizes.lengths)
    found = attention_backends(*given, max_seqlen=longest)
    refused = {f"fastmim {name}": why for name, why in found.items() if why is not None}
    if device.type == "cpu":
        refused["flex"] = "FlexAttention has no backward pass on a CPU"
        for name in ("sdpa-cudnn", "sdpa-efficient"):
            refused[name] = "PyTorch has it on GPUs alone"
    return refused


WORDS = {"op": ["attention", "attention_queries", "attention_varlen"], "peer": list(_PEERS)}
_FLOPS = {"forward": 4, "backward": 10, "both": 14}  # per score and value of a head


def describe() -> list[str]:
    return [
        f"suite attention   programs {','.join(_PEERS)} and ours by word of FASTMIM_ATTENTION",
        *(
            f"  {name:14} batch {sizes.batch}, {sizes.num_heads} heads of {sizes.head_dim}, "
            + (f"{sizes.tokens} tokens" if sizes.lengths is None else f"packed {sizes.lengths}")
            + (f", {sizes.queries} queries" if sizes.queries else "")
            for name, sizes in SHAPES.items()
        ),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every shape, pass and program that serves."""
    device = options.device
    for shape in options.shapes:
        sizes = SHAPES[shape]
        if options.operators is not None and _operator(sizes) not in options.operators:
            continue
        batch = _SMOKE_BATCH if options.smoke else sizes.batch
        options.say(f"attention {shape}")
        errors = {
            name: error
            for name, error in _serving(sizes, device, options.say).items()
            if name in ("sdpa", *_OURS) or options.wants(name)
        }
        given = sizes.inputs(device, batch)
        every = programs(sizes, device, batch)
        memory = {name: _memory(every[name], given, device) for name in errors}
        for mode in _MODES:
            calls = {name: _call(mode, every[name], given) for name in errors}
            timings = interleave(calls, **options.timing(), kernels=True)
            rows = {name: timing.row() for name, timing in timings.items()}
            peers = [n for n, row in rows.items() if n not in _OURS and row["status"] == "ok"]
            best = min(peers, key=lambda name: rows[name]["y_value_50"], default=None)
            moved, dtype = _bytes(mode, given), _DTYPES[sizes.dtype]
            flops = _FLOPS[mode] * sizes.scores(batch) * sizes.head_dim
            floor = options.ceilings.floor(moved, flops, dtype)
            for name, measured in rows.items():
                yield dict(
                    suite=NAME,
                    kernel_name=_operator(sizes),
                    kernel_provider=name,
                    kernel_operation_mode=mode,
                    case=mode,
                    shape=shape,
                    dtype=dtype,
                    x_name="batch",
                    x_value=batch,
                    **measured,
                    **options.against_floor(measured["y_value_50"], floor, moved, flops),
                    vs_peer=speedup(timings[name], timings["sdpa"]),
                    vs_best_peer=speedup(timings[name], timings[best]) if best else None,
                    best_peer=best,
                    **memory[name],
                    error=errors[name],
                    match=errors[name] <= _TOLERANCE[sizes.dtype],
                )


def _operator(sizes: Sizes) -> str:
    """Of fastmim, which serves these sizes."""
    if sizes.lengths is not None:
        return "attention_varlen"
    return "attention" if sizes.queries is None else "attention_queries"


def _call(mode: str, program: Program, given: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_() for t in given]
    out = program(*leaves)
    grad = torch.randn_like(out)
    if mode == "forward":
        return lambda: program(*leaves)
    if mode == "backward":
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(program(*leaves), leaves, grad)


def _bytes(mode: str, given: tuple[Tensor, ...]) -> int:
    """That must be moved: inputs read and result written; these and gradients; both passes."""
    inputs = sum(t.nbytes for t in given)
    out = given[0].nbytes // (3 if len(given) == 1 else 1)
    passes = {"forward": inputs + out, "backward": 2 * inputs + out}
    return passes.get(mode, sum(passes.values()))


def _memory(program: Program, given: tuple[Tensor, ...], device: torch.device) -> dict:
    """Kept for the backward pass beside the inputs; peak of both passes beside them on a GPU."""
    leaves = [t.detach().requires_grad_() for t in given]
    kept = saved_bytes(lambda: program(*leaves).float().sum(), leaves)
    if device.type != "cuda":
        return dict(saved_mb=kept / 1e6, peak_mb=None)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    program(*leaves).sum().backward()
    peak = torch.cuda.max_memory_allocated(device) - before
    return dict(saved_mb=kept / 1e6, peak_mb=peak / 1e6)
