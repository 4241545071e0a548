"""Suite ``step``: one optimizer step of every method against the peers."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from capacity import memory_in_use, total_memory
from measure import (
    Lost,
    Timing,
    attempt,
    free_memory,
    in_fresh_process,
    interleave,
    judged,
    peak_memory,
    saved_bytes,
    speedup,
    synchronize,
)
from peers import OWN, PEERS, PROGRAMS, Batch, Case, Parts, StepProgram
from roofline import step_parts, step_total
from suite import CHECKS, FLOOR, TIMES, Column, Options, images_per_second
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
CHECKED_IMAGES = 2
_USED = 0.9  # part of the memory that programs timed in turns may take together
# Relative error (Euclidean norm) of the loss and of every gradient tensor against plain PyTorch in
# float64. Plain PyTorch's own largest, on the CPU at both shapes: 5e-7 in fp32, 1.1e-2 in bf16.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp64": 1e-12}
# What float32 may be off after an update: its rounding, and this part of what the update changed.
_ROUNDING, _OF_UPDATE = 2**-23, 1e-5

Variant = tuple[str, str]  # program, dtype
Memory = dict | Lost  # fields of a row, or why there are none
Timed = tuple[dict[Variant, Timing], dict[Variant, dict]]  # and fields of the rows


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
    truth = attempt(truth_of, PEERS["plain"], case)
    footprints: dict[Variant, Memory] = {key: {} for key in variants}
    if options.memory:
        for key, variant in variants.items():
            options.say(f"{title}: memory of {' '.join(key)}")
            footprints[key] = in_fresh_process(footprint, key[0], variant)

    def timed(group: list[Variant]) -> Timed:
        options.say(f"{title}: timing {len(group)} programs in turns")
        return _timed({key: variants[key] for key in group}, truth, options)

    timings, found = in_groups(footprints, options.device, timed)
    for key, variant in variants.items():
        error = found.get(key, {}).pop("error", None)
        yield {
            **_row(key[0], variant, timings[key], timings, options),
            **judged(timings[key].lost, error, TOLERANCE[key[1]]),
            "shape": shape,
            "update_error": None,
            **found.get(key, {}),
            **footprint_fields(footprints[key]),
            **({"absent": absent} if key[0] == "fastmim" else {}),
        }


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


def in_groups(
    footprints: Mapping[Variant, Memory],
    device: torch.device,
    timed: Callable[[list[Variant]], Timed],
) -> Timed:
    """Time programs in groups that fit into memory together.

    Args:
        footprints: Of each program; empty if unknown. One that does not fit alone is lost.
        device: Whose memory is shared.
        timed: Times a group in turns.
    """
    timings = {key: Timing(lost=made) for key, made in footprints.items() if isinstance(made, Lost)}
    found: dict[Variant, dict] = {}
    fitting = {key: made for key, made in footprints.items() if key not in timings}
    free_memory()
    waiting = _groups(fitting, device)
    while waiting:
        group = waiting.pop(0)
        made, fields = timed(group)
        timings |= made
        found |= fields
        free_memory()
        if len(group) > 1:  # what does not fit beside the others may fit alone
            waiting += [[key] for key in group if (timings[key].lost or ("",))[0] == "oom"]
    return timings, found


def _groups(footprints: Mapping[Variant, dict], device: torch.device) -> list[list[Variant]]:
    """Programs that fit into memory together: all at rest but one, which is at its peak."""
    limit = _USED * total_memory(device, host_share=1.0)  # what they take has been measured
    groups: list[list[Variant]] = []
    resting = highest = float("inf")
    for key, taken in footprints.items():
        rest = taken.get("resting_memory_gib") or 0.0
        rise = taken.get("rising_memory_gib") or 0.0
        if resting + rest + max(highest, rise) > limit:
            groups.append([])
            resting = highest = 0.0
        groups[-1].append(key)
        resting, highest = resting + rest, max(highest, rise)
    return groups


def _timed(
    variants: Mapping[Variant, Case], truth: Mapping[str, Tensor] | Lost, options: Options
) -> Timed:
    """Timings in turns; how far each is off, and the parts of those steps."""
    batches = next(iter(variants.values())).batches()
    programs: dict[Variant, Parts] = {}
    timings, found = {}, {}
    for key, case in variants.items():
        made = attempt(_checked, PROGRAMS[key[0]], case, truth)
        if isinstance(made, Lost):
            timings[key] = Timing(lost=made)
        else:
            program, found[key] = made
            programs[key] = Parts(program, options.device)
    calls = {key: _endless(program.step, batches) for key, program in programs.items()}
    timings |= interleave(calls, **options.timing(), warm_up=1)
    synchronize(options.device)
    for key, program in programs.items():
        if timings[key].blocks:
            found[key] |= program.row()
    return timings, found


def _checked(
    kind: type[StepProgram], case: Case, truth: Mapping[str, Tensor] | Lost
) -> tuple[StepProgram, dict]:
    """A program, and its error at the shapes that are timed."""
    program = kind(case)
    return program, errors_of(program, case, truth)


def errors_of(
    program: StepProgram,
    case: Case,
    truth: Mapping[str, Tensor] | Lost,
    *,
    together: bool = False,
) -> dict:
    """Errors of a program's first step.

    Args:
        program: That has done no step.
        case: At whose batch it is checked.
        truth: Loss and gradients; without it they are not checked.
        together: Compare all gradients as one vector, not one by one.

    Returns:
        ``error`` of loss and gradients, infinite if the update is wrong, and ``update_error`` of
        weights and teacher, 1 being the most that is right.
    """
    values = loss_and_gradients(program, case)
    update_error = _update_error(program, case)
    error = None if isinstance(truth, Lost) else _error(values, truth, together)
    wrong = not update_error <= 1
    return dict(error=float("inf") if wrong else error, update_error=update_error)


@torch.no_grad()
def _update_error(program: StepProgram, case: Case) -> float:
    """How far AdamW's first update and the EMA are off, in multiples of what float32 may be.

    The program's own gradients, which have been checked, are what it starts from.
    """
    recipe = case.recipe
    params = [p for p in program.student.parameters() if p.grad is not None]
    before = [(p.clone(), p.grad.clone()) for p in params]
    teachers = [(teacher, teacher.clone(), p) for teacher, p in program.followed()]
    program.update()
    ratios = [torch.zeros((), dtype=torch.float64, device=case.device)]
    for param, (old, grad) in zip(params, before, strict=True):
        old, grad = old.double(), grad.double()
        decay = recipe.weight_decay if param.ndim > 1 else 0.0
        expected = old * (1 - recipe.lr * decay) - recipe.lr * grad / (grad.abs() + recipe.adam_eps)
        ratios.append(_off(param, expected, old))
    for teacher, old, param in teachers:
        ratios.append(_off(teacher, old.double().lerp(param.double(), 1 - recipe.momentum), old))
    return float(torch.stack(ratios).max())


def _off(value: Tensor, expected: Tensor, old: Tensor) -> Tensor:
    allowed = _ROUNDING * expected.norm() + _OF_UPDATE * (expected - old).norm()
    return (value - expected).norm() / allowed.clamp(min=1e-300)


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
        **PROGRAMS[name].backend(case),
        **measured,
        images_per_second=images_per_second(case.batch, ms),
        **options.against_floor(ms, total.floor, total.bytes, total.flops, case.dtype),
        vs_official=ratio(timing, timings.get(("official", case.dtype))),
        vs_peer=ratio(timing, timings.get(("plain", case.dtype))),
        vs_compiled=ratio(timing, timings.get(("compiled", case.dtype))),
        vs_fp32=ratio(timing, timings.get((name, "fp32"))),
    )


def ratio(timing: Timing, peer: Timing | None) -> float | None:
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


def truth_of(kind: type[StepProgram], case: Case) -> dict[str, Tensor]:
    """Loss and gradients of a program in float64, in the host's memory."""
    exact = dataclasses.replace(case, dtype="fp64", batch=CHECKED_IMAGES)
    values = loss_and_gradients(kind(exact), exact)
    return {name: value.cpu() for name, value in values.items()}


def loss_and_gradients(program: StepProgram, case: Case) -> dict[str, Tensor]:
    """For a few images, repeated to the batch if they divide it: means over it stay the same."""
    few = dataclasses.replace(case, batch=CHECKED_IMAGES)
    copies = case.batch // CHECKED_IMAGES if case.batch % CHECKED_IMAGES == 0 else 1
    imgs, order = few.batches()[0].imgs, _order(case, CHECKED_IMAGES)
    loss = program.loss(imgs.repeat(copies, 1, 1, 1), order.repeat(copies, 1))
    loss.backward()
    return {"loss": loss.detach(), **program.gradients()}


def _error(
    values: Mapping[str, Tensor], truth: Mapping[str, Tensor], together: bool = False
) -> float:
    """Largest relative error of the loss and of all gradients, as Euclidean norms."""
    if values.keys() != truth.keys() or any(value is None for value in values.values()):
        return float("inf")
    off = torch.stack([(values[n].double().cpu() - t).norm() for n, t in truth.items()])
    size = torch.stack([t.norm() for t in truth.values()])
    if together:  # the loss comes first
        off, size = (torch.stack([v[0], v[1:].norm()]) for v in (off, size))
    return float((off / size).max())  # NaN stays NaN, which no tolerance admits


_FOOTPRINT = (
    "saved_bytes_per_image", "peak_memory_gib", "peak_reserved_gib", "resting_memory_gib",
    "rising_memory_gib",
)  # fmt: skip


def footprint_fields(made: Memory) -> dict:
    """Fields of a row: memory, or None of a program whose is not known."""
    return {name: None if isinstance(made, Lost) else made.get(name) for name in _FOOTPRINT}


def footprint(name: str, case: Case) -> dict:
    """Memory of one program; to be called in a process of its own."""
    return footprint_of(PROGRAMS[name], case)


def footprint_of(kind: type[StepProgram], case: Case) -> dict:
    """What the program's steps keep for the backward pass, take at their peak, and leave.

    What it has at rest and how far it rises is without Python and PyTorch, of which there is one.
    """
    device = torch.device(case.device)
    before = memory_in_use(device)
    program = kind(case)
    batches = case.batches()
    for batch in batches[:2]:  # the optimizer makes its state in the first
        program.step(batch)
    synchronize(device)
    measured = peak_memory(device)
    if before is not None:
        after = memory_in_use(device)
        measured["resting_memory_gib"] = after - before
        measured["rising_memory_gib"] = (measured["peak_memory_gib"] or after) - after
    imgs = batches[0].imgs
    ids_shuffle = _order(case, case.batch)
    total = saved_bytes(
        lambda: program.loss(imgs, ids_shuffle), [imgs, *program.student.parameters()]
    )
    return dict(saved_bytes_per_image=total / case.batch, **measured)
