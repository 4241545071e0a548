"""Suite ``attention``: forward and backward alone and together, against every peer at its best.

A peer is called through its own best entry, packed where it has one; what is copied around it
counts. Ours are the words of FASTMIM_ATTENTION, and ``auto``.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import libraries
from measure import Lost, Timing, attempt, out_of_memory, saved_bytes, speedup
from ops import failed, served_by, timed, verdict
from problems import relative
from suite import CHECKS, FLOOR, PEAK, TIMES, Column, Options, images_per_second
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmim import ops
from fastmim.ops import OPS
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

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Of qkv; or of queries and the packed keys and values."""
        parts = (self.num_heads, self.head_dim)
        if self.lengths is not None:
            return [(batch * sum(self.lengths), 3, *parts)]
        if self.queries is not None:
            return [(batch, self.queries, *parts), (batch, self.tokens, 2, *parts)]
        return [(batch, self.tokens, 3, *parts)]

    def inputs(self, device: torch.device, batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        return tuple(
            torch.randn(shape, generator=generator, device=device).to(self.dtype)
            for shape in self.shapes(batch)
        )

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
    ("kept MB", "saved_mb", ".1f"), PEAK, *CHECKS,
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

    torch._dynamo.reset()
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
_ALWAYS = ("plain", "sdpa", *_OURS)  # that these fail is no refusal
_LIBRARIES = {"xformers": "xformers", "flash-attn": "flash_attn"}  # peer to its module


def _asked(word: str, attention: Program, *given: Tensor) -> Tensor:
    with use_attention(word):
        return attention(*given)


def _gradients(program: Program, given: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    out = program(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _errors(
    names: Iterable[str], sizes: Sizes, device: torch.device, batch: int
) -> tuple[dict[str, float | Lost], dict[str, str]]:
    """Largest relative error of the result and of the gradients, and which peers do not serve.

    A few images are repeated to the batch that is timed.
    """
    few = min(_CHECKED, batch)
    given = sizes.inputs(device, few)
    grad = torch.randn_like(given[0] if sizes.queries else given[0].select(-3, 0))
    plain = programs(sizes, device, few)["plain"]
    truth = attempt(_gradients, plain, tuple(t.double() for t in given), grad.double())
    copies = batch // few
    *given, grad = (t.repeat(copies, *(1,) * (t.ndim - 1)) for t in (*given, grad))
    every = programs(sizes, device, copies * few)
    errors, absent = {}, {}
    for name in names:
        found = attempt(
            _error, name, functools.partial(_gradients, every[name], given, grad), truth
        )
        if isinstance(found, str):
            absent[name] = found
        else:
            errors[name] = found
    return errors, absent


def _error(
    name: str, call: Callable[[], list[Tensor]], truth: list[Tensor] | Lost
) -> float | Lost | str:
    """Of a program's first call; of a peer that does not serve, why."""
    try:
        results = call()  # without a truth too: whoever is timed has been called
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as refusal:
        if name in _ALWAYS or out_of_memory(refusal):
            raise
        return next(iter(str(refusal).strip().splitlines()), type(refusal).__name__)
    if isinstance(truth, Lost):
        return truth
    copies = len(results[0]) // len(truth[0])
    results = [result.unflatten(0, (copies, -1)) for result in results]
    return relative(results, [right.expand(copies, *right.shape) for right in truth])


def _stand_ins(sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Of one image, to be asked who can serve: shapes without the memory."""
    value = torch.empty((), dtype=sizes.dtype, device=device)
    return [value.expand(shape) for shape in sizes.shapes(1)]


def _refused(sizes: Sizes, device: torch.device) -> dict[str, str]:
    """Of ours, those that cannot serve, and what PyTorch does not have on a CPU."""
    longest = None if sizes.lengths is None else max(sizes.lengths)
    found = attention_backends(*_stand_ins(sizes, device), max_seqlen=longest)
    refused = {f"fastmim {name}": why for name, why in found.items() if why is not None}
    if device.type == "cpu":
        refused["flex"] = "FlexAttention has no backward pass on a CPU"
        for name in ("sdpa-cudnn", "sdpa-efficient"):
            refused[name] = "PyTorch has it on GPUs alone"
    return refused


def _backend(name: str, sizes: Sizes, device: torch.device) -> dict:
    """Fields of a row: what computes, and versions of its libraries."""
    if name in _LIBRARIES:
        return dict(backend=name, libraries=libraries([_LIBRARIES[name]]))
    if name not in _OURS:
        return served_by("torch")
    call = (*_stand_ins(sizes, device), sizes.head_dim**-0.5)
    if sizes.lengths is not None:
        call = (call[0], sizes.starts(device, 1), max(sizes.lengths), call[1])
    word = name.split()[1]
    with use_attention(word):
        served = served_by(OPS[_operator(sizes)].choose(device, call))
    return served | (dict(libraries=libraries([word])) if word in _LIBRARIES else {})


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
    for shape in options.shapes:
        sizes = SHAPES[shape]
        if options.operators is None or _operator(sizes) in options.operators:
            options.say(f"attention {shape}")
            yield from _compare(shape, sizes, options)


def _compare(shape: str, sizes: Sizes, options: Options) -> Iterator[dict]:
    device, batch = options.device, _SMOKE_BATCH if options.smoke else sizes.batch
    _compiled_flex.cache_clear()  # what was compiled for other shapes counts towards a limit
    every = programs(sizes, device, batch)
    asked = [name for name in every if name in ("sdpa", *_OURS) or options.wants(name)]
    refused = _refused(sizes, device)
    absent = {name: refused[name] for name in asked if name in refused}
    left = [name for name in asked if name not in absent]
    found = attempt(_errors, left, sizes, device, batch)
    errors, declined = (dict.fromkeys(left, found), {}) if isinstance(found, Lost) else found
    given = attempt(sizes.inputs, device, batch)
    lost = {name: error for name, error in errors.items() if failed(error)}
    if isinstance(given, Lost):
        lost = dict.fromkeys(errors, given)
    kept = {name: attempt(_kept_mb, every[name], given) for name in errors if name not in lost}
    once = dict(absent=absent | declined)
    for mode in _MODES:
        calls = {
            name: lost.get(name) or attempt(_call, mode, every[name], given) for name in errors
        }
        timings, peaks = timed(calls, errors, options)
        best = _best_peer(timings)
        for name, timing in timings.items():
            yield dict(
                suite=NAME,
                shape=shape,
                kernel_provider=name,
                **_row(mode, sizes, batch, timing, options),
                **_backend(name, sizes, device),
                vs_peer=speedup(timing, timings.get("sdpa", Timing())),
                vs_best_peer=speedup(timing, timings[best]) if best else None,
                best_peer=best,
                **peaks[name],
                saved_mb=kept[name] if isinstance(kept.get(name), float) else None,
                **verdict(timing, errors[name], _TOLERANCE[sizes.dtype]),
                **once,
            )
            once = {}


def _best_peer(timings: Mapping[str, Timing]) -> str | None:
    medians = {name: timing.row()["y_value_50"] for name, timing in timings.items()}
    peers = [name for name, ms in medians.items() if name not in _OURS and ms is not None]
    return min(peers, key=medians.__getitem__, default=None)


def _row(mode: str, sizes: Sizes, batch: int, timing: Timing, options: Options) -> dict:
    """What is computed, how fast, and how near to the least."""
    measured, dtype = timing.row(), _DTYPES[sizes.dtype]
    ms, moved = measured["y_value_50"], _bytes(mode, sizes, batch)
    flops = _FLOPS[mode] * sizes.scores(batch) * sizes.head_dim
    floor = options.ceilings.floor(moved, flops, dtype)
    return dict(
        kernel_name=_operator(sizes),
        kernel_operation_mode=mode,
        case=mode,
        dtype=dtype,
        x_name="batch",
        x_value=batch,
        **measured,
        images_per_second=images_per_second(batch, ms),
        **options.against_floor(ms, floor, moved, flops, dtype),
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


def _bytes(mode: str, sizes: Sizes, batch: int) -> int:
    """That must be moved: inputs read and result written; these and gradients; both passes."""
    values = [math.prod(shape) for shape in sizes.shapes(batch)]
    inputs = sum(values) * sizes.dtype.itemsize
    out = values[0] // (3 if len(values) == 1 else 1) * sizes.dtype.itemsize
    passes = {"forward": inputs + out, "backward": 2 * inputs + out}
    return passes.get(mode, sum(passes.values()))


def _kept_mb(program: Program, given: tuple[Tensor, ...]) -> float:
    """Kept for the backward pass beside the inputs."""
    leaves = [t.detach().requires_grad_() for t in given]
    return saved_bytes(lambda: program(*leaves).float().sum(), leaves) / 1e6
