"""Suite ``step``: one optimizer step of every method against the peers."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from capacity import memory_in_use, total_memory
from measure import (
    Timing,
    in_fresh_process,
    interleave,
    peak_memory,
    saved_bytes,
    speedup,
    synchronize,
    unless_out_of_memory,
)
from peers import OWN, PEERS, PROGRAMS, Batch, Case, Parts, StepProgram
from roofline import step_parts, step_total
from suite import CHECKS, FLOOR, TIMES, Column, Options
from torch import Tensor

NAME = "step"
# Shape to model and batch. tiny32 is bound by small operators, the others by matrix products.
SHAPES = {
    "tiny32": ("mae_vit_micro_patch4", 64),
    "small224": ("mae_vit_small_patch16_dec512d8b", 8),
    "base224": ("mae_vit_base_patch16", 256),
    "large224": ("mae_vit_large_patch16", 64),
}
DEFAULT = {"cpu": ["tiny32", "small224"], "cuda": ["base224", "large224"]}
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("method", "method", ""), ("program", "kernel_provider", ""),
    ("dtype", "dtype", ""), ("batch", "x_value", "d"), *TIMES,
    ("img/s", "images_per_second", ".2f"), *FLOOR[1:], ("MFU %", "mfu_percent", ".0f"),
    ("vs official", "vs_official", ".2f"), ("vs plain", "vs_peer", ".2f"),
    ("vs compiled", "vs_compiled", ".2f"), ("vs fp32", "vs_fp32", ".2f"),
    ("saved MB/img", "saved_mb_per_image", ".2f"), ("peak GiB", "peak_memory_gib", ".2f"),
    *CHECKS,
]
# fmt: on
WORDS = {"method": ["rc_mae", "mae", "dbot", "sdae"], "peer": [*PEERS, *list(OWN)[1:]]}
# Take half a minute or more to start, or are asked for by name alone.
_COMPILED = ("fastmim-compiled", "compiled", "hf-compiled")
_BY_NAME = ("compiled-max-autotune", *(name for name in list(OWN)[1:] if name not in _COMPILED))
_IN_SMOKE = ("fastmim", "plain")
_SMOKE_BATCH = 8
_CHECKED_IMAGES = 2
_USED = 0.9  # part of the memory that programs timed in turns may take together
# Relative error (Euclidean norm) of the loss and of every gradient tensor against plain PyTorch in
# float64. Plain PyTorch's own largest, on the CPU at both shapes: 5e-7 in fp32, 1.1e-2 in bf16.
_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}

Variant = tuple[str, str]  # program, dtype


def describe() -> list[str]:
    shapes = [f"  {name:10} {model}, batch {batch}" for name, (model, batch) in SHAPES.items()]
    return [
        f"suite step   methods {','.join(WORDS['method'])}   programs {','.join(PROGRAMS)}",
        *shapes,
        *(f"  {name:10} absent: {why}" for name, why in _absent_here().items()),
    ]


def _absent_here() -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(SHAPES["tiny32"][0], 1, "mae", "bf16", device)
    reasons = {name: program.missing(case) for name, program in PEERS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def run(options: Options) -> Iterator[dict]:
    """A row for every shape, batch, method, program and dtype; a short run has two methods."""
    short = options.smoke or options.seconds < math.inf
    methods = options.methods[:2] if short else options.methods
    for (shape, model, batch), method in itertools.product(options.cases(SHAPES), methods):
        batch = _SMOKE_BATCH if options.smoke else batch
        case = Case(model, batch, method, "fp64", options.device.type, options.images)
        yield from _compare(shape, case, options)


def _compare(shape: str, case: Case, options: Options) -> Iterator[dict]:
    title = f"step {shape} {case.method} batch {case.batch}"
    variants, absent = _variants(case, options)
    truth = _loss_and_gradients(PEERS["plain"](case), case, 1)
    footprints: dict[Variant, dict | None] = {key: {} for key in variants}
    if options.memory:
        for key, variant in variants.items():
            options.say(f"{title}: memory of {' '.join(key)}")
            footprints[key] = in_fresh_process(footprint, key[0], variant)
    fitting = [key for key in variants if footprints[key] is not None]
    timings = {key: Timing() for key in variants}
    found: dict[Variant, dict] = {}
    for group in _groups(fitting, footprints, options.device):
        options.say(f"{title}: timing {len(group)} programs in turns")
        made, fields = _timed({key: variants[key] for key in group}, truth, options)
        timings |= made
        found |= fields
    for (name, dtype), timing in timings.items():
        row = _row(name, variants[name, dtype], timing, timings, options)
        row |= {"shape": shape, "error": None, "match": True, **found.get((name, dtype), {})}
        row |= {f: (footprints[name, dtype] or {}).get(f) for f in _FOOTPRINT}
        yield {**row, "absent": absent} if name == "fastmim" else row


def _variants(case: Case, options: Options) -> tuple[dict[Variant, Case], dict[str, str]]:
    """What can be run, and why the rest that was asked for cannot."""
    names = ["fastmim", *(n for n in options.peers or PROGRAMS if n in PROGRAMS)]
    if options.peers is None:
        left_out = {*_BY_NAME, *(() if options.compiled else _COMPILED)}
        kept = _IN_SMOKE if options.smoke else PROGRAMS
        names = [name for name in names if name in kept and name not in left_out]
    variants, absent = {}, {}
    for name, dtype in itertools.product(dict.fromkeys(names), options.dtypes):
        variant = dataclasses.replace(case, dtype=dtype)
        reason = PROGRAMS[name].missing(variant)
        if reason is None:
            variants[name, dtype] = variant
        else:
            absent[name] = reason
    return variants, absent


def _groups(
    keys: Sequence[Variant], footprints: Mapping[Variant, dict | None], device: torch.device
) -> list[list[Variant]]:
    """Programs that fit into memory together: all at rest but one, which is at its peak."""
    limit = _USED * total_memory(device, host_share=1.0)  # what they take has been measured
    groups: list[list[Variant]] = []
    resting = highest = float("inf")
    for key in keys:
        rest = footprints[key].get("resting_memory_gib") or 0.0
        rise = (footprints[key].get("peak_memory_gib") or 0.0) - rest
        if resting + rest + max(highest, rise) > limit:
            groups.append([])
            resting = highest = 0.0
        groups[-1].append(key)
        resting, highest = resting + rest, max(highest, rise)
    return groups


def _timed(
    variants: Mapping[Variant, Case], truth: Mapping[str, Tensor], options: Options
) -> tuple[dict[Variant, Timing], dict[Variant, dict]]:
    """Timings in turns; whether each is correct, and the parts of those steps."""
    batches = next(iter(variants.values())).batches()
    programs, found = {}, {}
    for key, case in variants.items():
        made = unless_out_of_memory(_checked, PROGRAMS[key[0]], case, truth)
        if made is not None:
            program, error = made
            programs[key] = Parts(program, options.device)
            found[key] = dict(error=error, match=error <= _TOLERANCE[key[1]])
    calls = {key: _endless(program.step, batches) for key, program in programs.items()}
    timings = interleave(calls, **options.timing(), warm_up=1)
    synchronize(options.device)
    for key, timing in timings.items():
        if timing.blocks:
            found[key] |= programs[key].row()
    return timings, found


def _checked(
    kind: type[StepProgram], case: Case, truth: Mapping[str, Tensor]
) -> tuple[StepProgram, float]:
    """A program, and its error at the shapes that are timed."""
    program = kind(case)
    copies = case.batch // _CHECKED_IMAGES if case.batch % _CHECKED_IMAGES == 0 else 1
    error = _error(_loss_and_gradients(program, case, copies), truth)
    program.student.zero_grad(set_to_none=True)
    return program, error


def _row(
    name: str,
    case: Case,
    timing: Timing,
    timings: Mapping[Variant, Timing],
    options: Options,
) -> dict:
    measured = timing.row()
    ms = measured["y_value_50"]
    needed = step_parts(
        case.model,
        case.method,
        case.batch,
        case.dtype,
        pixel_bytes=1 if case.images == "uint8" else 4,
    )
    total = step_total(needed, options.ceilings, case.dtype)
    peak = options.ceilings.matmul[case.dtype]
    return dict(
        suite=NAME,
        kernel_name=f"{case.method}_step",
        kernel_provider=name,
        kernel_operation_mode="step",
        model=case.model,
        method=case.method,
        dtype=case.dtype,
        images=case.images,
        x_name="batch",
        x_value=case.batch,
        **measured,
        images_per_second=None if ms is None else case.batch / ms * 1e3,
        mfu_percent=None if ms is None else 1e5 * total.flops / peak / ms,
        **options.against_floor(ms, total.floor, total.bytes, total.flops),
        vs_official=_ratio(timing, timings.get(("official", case.dtype))),
        vs_peer=_ratio(timing, timings.get(("plain", case.dtype))),
        vs_compiled=_ratio(timing, timings.get(("compiled", case.dtype))),
        vs_fp32=_ratio(timing, timings.get((name, "fp32"))),
    )


def _ratio(timing: Timing, peer: Timing | None) -> float | None:
    """How many times as fast as the peer; by medians if they did not take turns."""
    if peer is None or not timing.blocks or not peer.blocks:
        return None
    if timing.turns == peer.turns:
        return speedup(timing, peer)
    mine, other = (
        statistics.median(s for b in t.blocks for s in b.seconds) for t in (timing, peer)
    )
    return other / mine


def _endless(step: Callable[[Batch], None], batches: Sequence[Batch]) -> Callable[[], None]:
    turns = itertools.cycle(batches)
    return lambda: step(next(turns))


def _order(case: Case, count: int) -> Tensor:
    """Masks: (B, N) patch positions in shuffle order."""
    noise = torch.rand(count, case.num_patches, generator=torch.Generator().manual_seed(0))
    return noise.argsort(dim=1).to(case.device)


def _loss_and_gradients(program: StepProgram, case: Case, copies: int) -> dict[str, Tensor]:
    """For a few images, each as often as asked for: the means over a batch stay the same."""
    few = dataclasses.replace(case, batch=_CHECKED_IMAGES)
    imgs, order = few.batches()[0].imgs, _order(case, _CHECKED_IMAGES)
    loss = program.loss(imgs.repeat(copies, 1, 1, 1), order.repeat(copies, 1))
    loss.backward()
    return {"loss": loss.detach(), **program.gradients()}


def _error(values: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Largest relative error of the loss and of all gradients, as Euclidean norms."""
    if values.keys() != truth.keys() or any(value is None for value in values.values()):
        return float("inf")
    ratios = [(values[n].double() - t).norm() / t.norm() for n, t in truth.items()]
    return float(torch.stack(ratios).max())  # NaN stays NaN, which no tolerance admits


_FOOTPRINT = (
    "saved_bytes_per_image", "peak_memory_gib", "peak_reserved_gib", "resting_memory_gib"
)  # fmt: skip


def footprint(name: str, case: Case) -> dict:
    """Memory of one program; to be called in a process of its own."""
    return footprint_of(PROGRAMS[name](case), case)


def footprint_of(program: StepProgram, case: Case) -> dict:
    """What the program's steps keep for the backward pass, take at their peak, and leave."""
    device = torch.device(case.device)
    batches = case.batches()
    for batch in batches[:2]:  # the optimizer makes its state in the first
        program.step(batch)
    synchronize(device)
    measured = dict(**peak_memory(device), resting_memory_gib=memory_in_use(device))
    imgs = batches[0].imgs
    ids_shuffle = _order(case, case.batch)
    total = saved_bytes(
        lambda: program.loss(imgs, ids_shuffle), [imgs, *program.student.parameters()]
    )
    return dict(saved_bytes_per_image=total / case.batch, **measured)
