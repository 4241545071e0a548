"""Suite ``memory``: what a step takes at its peak, by batch, and the largest batch that fits.

Each measurement is a process of its own that builds the program and does two steps. On a GPU the
limit is its memory; on a CPU it is a few GiB, which the row names, so that nobody else suffers.
Memory grows by the same for every image: the largest batch is guessed from two others and then
sought around the guess until one fits and the next does not.
"""

import dataclasses
import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from capacity import limited_memory, total_memory
from measure import (
    Lost,
    attempt,
    in_fresh_process,
    judged,
    peak_memory,
    status_of,
    synchronize,
)
from peers import OWN, PEERS, PROGRAMS, Case, StepProgram
from roofline import least_memory, step_parts, step_total
from steps import CHECKED_IMAGES, TOLERANCE, loss_and_gradients, truth_of
from suite import Column, Options
from torch import Tensor

NAME = "memory"
SHAPES = {
    "tiny32": ("mae_vit_micro_patch4", 64),
    "small224": ("mae_vit_small_patch16_dec512d8b", 4),
    "base224": ("mae_vit_base_patch16", 128),
    "large224": ("mae_vit_large_patch16", 64),
}
DEFAULT = {"cpu": ["tiny32"], "cuda": ["base224", "large224"]}
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("method", "method", ""), ("program", "kernel_provider", ""),
    ("dtype", "dtype", ""), ("what", "kernel_operation_mode", ""), ("batch", "x_value", "d"),
    ("peak GiB", "peak_memory_gib", ".2f"), ("reserved GiB", "peak_reserved_gib", ".2f"),
    ("% of least", "percent_of_floor", ".0f"), ("limit GiB", "limit_gib", ".1f"),
    ("error", "error", ".0e"), ("match", "match", ""), ("status", "status", ""),
]
# fmt: on
WORDS = {"method": ["rc_mae", "mae", "dbot", "sdae"], "peer": [*PEERS, *list(OWN)[1:]]}
_BY_DEFAULT = (
    "fastmim", "fastmim-lean", "fastmim-recompute-mlp", "fastmim-checkpoint",
    "fastmim-lean-bf16-residual", "official", "plain", "hf",
)  # fmt: skip
_IN_QUICK = ("fastmim", "fastmim-lean", "plain")
_IN_SMOKE = ("fastmim", "plain")
_CPU_LIMIT_GIB = {"tiny32": 1.0}
_OTHER_CPU_LIMIT_GIB = 3.0
_SMOKE_BATCH = 8
# What ends a process without memory: the system, or C++ when an allocation throws in a thread.
_ENDED = (signal.SIGKILL, signal.SIGABRT)
_FINENESS = 8  # the largest batch is sought to a power of two of at most this part of it


def describe() -> list[str]:
    return [
        f"suite {NAME}   peak by batch and largest batch; programs {','.join(_BY_DEFAULT)}",
        *(f"  {name:10} {model}, batch {b} and {2 * b}" for name, (model, b) in SHAPES.items()),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every program and batch, and one for the largest batch of each program.

    A short run has one method, one precision, few programs, and seeks no largest batch.
    """
    short = options.smoke or options.seconds < math.inf
    methods = options.methods[:1] if short else options.methods
    dtypes = options.dtypes[-1:] if short else options.dtypes
    for (shape, model, batch), method, dtype in itertools.product(
        options.cases(SHAPES), methods, dtypes
    ):
        batch = _SMOKE_BATCH if options.smoke else batch
        case = Case(model, batch, method, dtype, options.device.type, options.images)
        truth = attempt(_true_norms, case)
        limit = _limit(shape, options.device)
        programs, absent = [], {}
        for name in _programs(options):
            reason = PROGRAMS[name].missing(case)
            if reason is None:
                programs.append(name)
            else:
                absent[name] = reason
        for name in programs:
            options.say(f"{NAME} {shape} {method} {dtype}: {name}")
            peaks = _Peaks(name, case, limit, truth)
            found = [("peak", count, peaks(count)) for count in (batch, 2 * batch)]
            if not short:
                found.append(("largest batch", *_largest(peaks, batch)))
            for mode, count, measured in found:
                about = dataclasses.replace(case, batch=count)
                row = _row(shape, about, name, mode, measured, limit, options)
                yield {**row, "absent": absent} if name == "fastmim" else row


def _programs(options: Options) -> Sequence[str]:
    if options.peers is not None:
        asked = (name for name in options.peers if name in PROGRAMS)
        return list(dict.fromkeys(["fastmim", *asked]))
    if options.smoke:
        return _IN_SMOKE
    return _IN_QUICK if options.seconds < math.inf else _BY_DEFAULT


def _limit(shape: str, device: torch.device) -> float:
    """GiB that a step may take."""
    available = total_memory(device)
    if device.type == "cuda":
        return available
    return min(available, _CPU_LIMIT_GIB.get(shape, _OTHER_CPU_LIMIT_GIB))


class _Peaks:
    """Peaks of a program by batch, each measured once.

    Args:
        name: Of the program.
        case: With any batch.
        limit: GiB.
        truth: What its losses and gradients are compared with.
    """

    def __init__(self, name: str, case: Case, limit: float, truth: dict[str, float] | Lost) -> None:
        self._name, self._case, self.limit, self._truth = name, case, limit, truth
        self._known: dict[int, dict | Lost] = {}

    def __call__(self, batch: int) -> dict | Lost:
        """Peak of a batch and its error."""
        if batch not in self._known:
            case = dataclasses.replace(self._case, batch=batch)
            limited = _ENDED if case.device == "cpu" else _ENDED[:1]
            self._known[batch] = in_fresh_process(
                _peak, self._name, case, self.limit, self._truth, out_of_memory_by=limited
            )
        return self._known[batch]

    def gib(self, batch: int) -> float | None:
        """Peak of a batch; None if it does not fit.

        Raises:
            _Failed: If it fails in another way: then nothing is known of larger ones.
        """
        measured = self(batch)
        if not isinstance(measured, Lost):
            return measured["peak_memory_gib"]
        if measured.status == "failed":
            raise _Failed(batch, measured)
        return None


class _Failed(Exception):
    """A batch, and how it failed."""


def _largest(peaks: _Peaks, batch: int) -> tuple[int, dict | Lost]:
    """The largest batch that fits and its peak; or one that failed while it was sought."""
    try:
        largest = find_largest(peaks.gib, (batch, 2 * batch), peaks.limit)
    except _Failed as failure:
        return failure.args
    return largest, peaks(largest) if largest else Lost("oom", "not even one image fits")


def _peak(name: str, case: Case, limit: float, truth: dict[str, float] | Lost) -> dict:
    """Of two steps, in a process of its own, which first computes what can be compared.

    Raises:
        MemoryError: If the limit does not suffice.
    """
    device = torch.device(case.device)
    with limited_memory(device, limit):
        try:
            program = PROGRAMS[name](case)
            error = _error(program, case, truth)
            for batch in case.batches()[:2]:
                program.step(batch)
            synchronize(device)
        except RuntimeError as refusal:
            # oneDNN's and the C++ library's words for it.
            if any(words in str(refusal) for words in ("could not create a", "bad_alloc")):
                raise MemoryError(str(refusal)) from refusal
            raise
        measured = peak_memory(device)
    if (measured["peak_memory_gib"] or 0.0) > limit:  # the host gives pages without asking
        raise MemoryError(f"{measured['peak_memory_gib']:.2f} GiB are more than {limit:.2f}")
    return dict(**measured, error=error)


def _true_norms(case: Case) -> dict[str, float]:
    """Norms of the loss and of every gradient: all of them would be a network to send."""
    return _norms(truth_of(PROGRAMS["plain"], case))


def _norms(values: Mapping[str, Tensor | None]) -> dict[str, float]:
    return {name: float(value.double().norm()) for name, value in values.items()}


def _error(program: StepProgram, case: Case, truth: dict[str, float] | Lost) -> float | None:
    """Largest relative error of a norm; None if there is nothing to compare."""
    if isinstance(truth, Lost) or case.batch < CHECKED_IMAGES:
        return None
    norms = _norms(loss_and_gradients(program, case))
    program.student.zero_grad(set_to_none=True)
    if norms.keys() != truth.keys():
        return math.inf
    return max(abs(norms[name] - size) / size for name, size in truth.items())


def find_largest(
    peak: Callable[[int], float | None], batches: tuple[int, int], limit: float
) -> int:
    """The largest batch that fits, to one part in eight or so.

    Args:
        peak: GiB of a batch, or None if it does not fit.
        batches: Two to extrapolate from.
        limit: GiB.

    Returns:
        0 if not even one image fits.
    """
    small, large = peak(batches[0]), peak(batches[1])
    guess = batches[0]
    if small is not None and large is not None and large > small:
        per_image = (large - small) / (batches[1] - batches[0])
        guess = int(batches[1] + (limit - large) / per_image)
    step = max(1, 2 ** (int(math.log2(max(guess, 1) / _FINENESS)))) if guess >= _FINENESS else 1
    batch = max(guess // step * step, 1)
    if peak(batch) is None:
        while batch > 0 and peak(batch) is None:
            batch -= step
        return max(batch, 0)
    while peak(batch + step) is not None:
        batch += step
    return batch


def _row(
    shape: str,
    case: Case,
    name: str,
    mode: str,
    measured: dict | Lost,
    limit: float,
    options: Options,
) -> dict:
    lost = measured if isinstance(measured, Lost) else None
    found = {} if lost else measured
    peak = found.get("peak_memory_gib")
    total = step_total(
        step_parts(case.model, case.method, case.batch, case.dtype), options.ceilings, case.dtype
    )
    against = options.against_floor(None, total.floor, total.bytes, total.flops, case.dtype)
    least = least_memory(case.model, case.method, case.batch, case.dtype) / 2**30
    return dict(
        suite=NAME,
        shape=shape,
        kernel_name=f"{case.method}_step",
        kernel_provider=name,
        kernel_operation_mode=mode,
        model=case.model,
        method=case.method,
        dtype=case.dtype,
        images=case.images,
        x_name="batch",
        x_value=case.batch,
        limit_gib=limit,
        **PROGRAMS[name].backend(case),
        **status_of(lost),
        metric_name="GiB",
        y_value_20=peak,
        y_value_50=peak,
        y_value_80=peak,
        n=0 if peak is None else 1,
        images_per_second=None,
        peak_memory_gib=peak,
        peak_reserved_gib=found.get("peak_reserved_gib"),
        **{**against, "floor_gib": least, "percent_of_floor": peak and 100 * least / peak},
        **judged(lost, found.get("error"), TOLERANCE[case.dtype]),
    )
