"""Suite ``ops``: every operator but the optimizer's against PyTorch and its floor.

Forward and backward together where there is a backward pass.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import torch
from machine import libraries
from measure import Lost, Timing, attempt, interleave, judged, peak_of_call, speedup
from problems import Calls, Inputs, Problem, Sizes, problems
from suite import CHECKS, FLOOR, PEAK, TIMES, Column, Options, images_per_second
from torch import Tensor

from fastmim.ops import OPS, use_backend

NAME = "ops"
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("operator", "kernel_name", ""), ("case", "case", ""),
    ("program", "kernel_provider", ""), ("dtype", "dtype", ""), *TIMES, *FLOOR,
    ("vs torch", "vs_peer", ".2f"), ("vs compiled", "vs_compiled", ".2f"), PEAK, *CHECKS,
]
# fmt: on
WORDS = {
    "op": [
        "sample_crops",
        "crop_resize",
        "sample_masks",
        "gather_patches",
        "gather_tokens",
        "scatter_tokens",
        "restore_tokens",
        "patch_loss",
        "feature_loss",
        "scale",
        "norm",
        "norm_linear",
        "bias_gelu",
        "bias_gelu_linear",
        "attention",
        "linear",
    ]
}  # fmt: skip
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Relative error (Euclidean norm) of every result against PyTorch in float64.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Decoders at 224 pixels are 512 wide.
SHAPES = {
    "tiny32": Sizes(64, 32, 4, 128, 4, 64, 4, torch.float32),
    "small224": Sizes(8, 224, 16, 384, 6, 512, 16, torch.float32),
    "large224": Sizes(256, 224, 16, 1024, 16, 512, 16, torch.bfloat16),
}
DEFAULT = {"cpu": ["tiny32", "small224"], "cuda": ["large224"]}
_SMOKE_BATCH = 2
_BY_PYTORCH = ("torch", "compiled")
Key = TypeVar("Key", bound=Hashable)


def describe() -> list[str]:
    return [
        "suite ops    operators of fastmim.ops   programs torch, compiled and every backend",
        *(
            f"  {name:10} batch {sizes.batch}, {sizes.img_size} px, width {sizes.embed_dim}"
            for name, sizes in SHAPES.items()
        ),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every operator, size and program."""
    for shape in options.shapes:
        sizes = SHAPES[shape]._replace(**(dict(batch=_SMOKE_BATCH) if options.smoke else {}))
        for problem in problems(sizes, options.device):
            if options.operators is None or problem.operator in options.operators:
                options.say(f"ops {shape} {problem.operator}")
                yield from _compare(shape, sizes, problem, options)


def _compare(shape: str, sizes: Sizes, problem: Problem, options: Options) -> Iterator[dict]:
    names = [*serving(problem.operator, options.device), "torch"]
    names += ["compiled"] if options.compiled else []
    calls = attempt(problem.make, Inputs(sizes, options.device))
    if isinstance(calls, Lost):
        programs = errors = dict.fromkeys(names, calls)
    else:
        programs = {name: program_of(name, calls) for name in names}
        errors = errors_of(problem, programs, calls)
    timings, peaks = timed(programs, errors, options)
    dtype = _NAMES[sizes.dtype]
    floor = options.ceilings.floor(problem.bytes, problem.flops, dtype)
    for name, timing in timings.items():
        measured = timing.row()
        ms = measured["y_value_50"]
        tolerance = problem.tolerance or TOLERANCE[sizes.dtype]
        yield dict(
            suite=NAME,
            kernel_name=problem.operator,
            kernel_provider=name,
            kernel_operation_mode="full",
            case=problem.case,
            shape=shape,
            dtype=dtype,
            x_name="batch",
            x_value=sizes.batch,
            **served_by(name),
            **measured,
            images_per_second=images_per_second(sizes.batch, ms),
            **options.against_floor(ms, floor, problem.bytes, problem.flops, dtype),
            vs_peer=speedup(timing, timings["torch"]),
            vs_compiled=speedup(timing, timings["compiled"]) if options.compiled else None,
            **peaks[name],
            **verdict(timing, errors[name], tolerance),
        )


def serving(operator: str, device: torch.device) -> list[str]:
    """Backends that can serve on the device, best first; the reference if there is no other."""
    op = OPS[operator]
    found = [backend for backend in op.backends if op.unavailable(backend, device) is None]
    return [backend for backend in found if backend != "reference"] or found


def served_by(provider: str) -> dict:
    """Fields of a row: what computes, and versions of its libraries."""
    backend = "torch" if provider in _BY_PYTORCH else provider
    return dict(backend=backend, libraries=libraries(["triton"] if backend == "triton" else []))


def program_of(name: str, calls: Calls) -> Callable[[], list[Tensor]]:
    """Ours by a backend, or PyTorch's."""
    if name == "torch":
        return calls.plain
    if name == "compiled":
        torch._dynamo.reset()  # what was compiled for other problems counts towards a limit
        return calls.compiled() if calls.compiled else torch.compile(calls.plain, dynamic=False)
    return functools.partial(_served, name, calls.ours)


def _served(backend: str, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    with use_backend(backend):
        return call()


def errors_of(
    problem: Problem, programs: Mapping[str, Callable[[], list[Tensor]]], calls: Calls
) -> dict[str, float | Lost]:
    """Error of the first call of each program, or why there is none."""
    truth = attempt(calls.truth)
    return {name: attempt(_error, problem, truth, name, call) for name, call in programs.items()}


def _error(
    problem: Problem, truth: list[Tensor] | Lost, name: str, call: Callable[[], list[Tensor]]
) -> float | Lost:
    results = call()  # without a truth too: whoever is timed has been called
    if isinstance(truth, Lost):
        return truth
    return problem.error_of(results, truth, ours=name not in _BY_PYTORCH)


_NO_PEAK = dict(peak_memory_gib=None, peak_reserved_gib=None)


def timed(
    programs: Mapping[Key, Callable[[], object] | Lost],
    errors: Mapping[Key, float | Lost],
    options: Options,
) -> tuple[dict[Key, Timing], dict[Key, dict]]:
    """Timings in turns, and the peak of one call of each program.

    Args:
        programs: That have been called before, or why there is none.
        errors: Of each program. One whose check failed is not called again; one whose check did
            not fit into memory may fit itself.
        options: How long.
    """
    ready, lost, peaks = {}, {}, dict.fromkeys(programs, _NO_PEAK)
    for name, program in programs.items():
        found = errors[name] if failed(errors[name]) else program
        if not isinstance(found, Lost):
            found = attempt(peak_of_call, program, options.device)
        if isinstance(found, Lost):
            lost[name] = Timing(lost=found)
        else:
            ready[name], peaks[name] = program, found
    timings = lost | interleave(ready, **options.timing(), kernels=True)
    return {name: timings[name] for name in programs}, peaks


def failed(error: float | Lost) -> bool:
    return isinstance(error, Lost) and error.status == "failed"


def verdict(timing: Timing, error: float | Lost, tolerance: float) -> dict:
    """Fields of a row: whether a program is right; its check alone may not have fitted."""
    unchecked = error if isinstance(error, Lost) else None
    return judged(timing.lost or unchecked, error, tolerance)
