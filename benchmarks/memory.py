"""Suite ``memory``: what a step takes at its peak, by batch, and the largest batch that fits.

Each measurement is a process of its own that builds the program and does two steps. On a GPU the
limit is its memory; on a CPU it is a few GiB, which the row names, so that nobody else suffers.
Memory grows by the same for every image: the largest batch is guessed from two others and then
sought around the guess until one fits and the next does not.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from capacity import limited_memory, total_memory
from measure import in_fresh_process, peak_memory, synchronize
from peers import OWN, PEERS, PROGRAMS, Case
from suite import Column, Options

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
    ("limit GiB", "limit_gib", ".1f"), ("status", "status", ""),
]
# fmt: on
WORDS = {"method": ["rc_mae", "mae", "dbot", "sdae"], "peer": [*PEERS, *list(OWN)[1:]]}
_BY_DEFAULT = (
    "fastmim", "fastmim-lean", "fastmim-recompute-mlp", "fastmim-checkpoint",
    "fastmim-lean-bf16-residual", "official", "plain", "hf",
)  # fmt: skip
_IN_QUICK = ("fastmim", "fastmim-lean", "plain")
_CPU_LIMIT_GIB = {"tiny32": 1.0}
_OTHER_CPU_LIMIT_GIB = 3.0
_SMOKE_BATCH = 8
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
        limit = _limit(shape, options.device)
        for name in _programs(options, short):
            if PROGRAMS[name].missing(case) is not None:
                continue
            options.say(f"{NAME} {shape} {method} {dtype}: {name}")
            peaks = _Peaks(name, case, limit)
            for count in (batch, 2 * batch):
                yield _row(shape, case, name, "peak", count, peaks)
            if not short:
                largest = find_largest(peaks.gib, (batch, 2 * batch), limit)
                yield _row(shape, case, name, "largest batch", largest, peaks)


def _programs(options: Options, short: bool) -> Sequence[str]:
    if options.peers is not None:
        asked = (name for name in options.peers if name in PROGRAMS)
        return list(dict.fromkeys(["fastmim", *asked]))
    return _IN_QUICK if short else _BY_DEFAULT


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
    """

    def __init__(self, name: str, case: Case, limit: float) -> None:
        self._name, self._case, self.limit = name, case, limit
        self._known: dict[int, dict | None] = {}

    def __call__(self, batch: int) -> dict | None:
        """Peak of a batch; None if it does not fit."""
        if batch not in self._known:
            case = dataclasses.replace(self._case, batch=batch)
            self._known[batch] = in_fresh_process(_peak, self._name, case, self.limit)
        return self._known[batch]

    def gib(self, batch: int) -> float | None:
        measured = self(batch)
        return None if measured is None else measured["peak_memory_gib"]


def _peak(name: str, case: Case, limit: float) -> dict:
    """Of two steps, in a process of its own.

    Raises:
        MemoryError: If the limit does not suffice.
    """
    device = torch.device(case.device)
    with limited_memory(device, limit):
        try:
            program = PROGRAMS[name](case)
            for batch in case.batches()[:2]:
                program.step(batch)
            synchronize(device)
        except RuntimeError as error:
            # oneDNN's and the C++ library's words for it.
            if any(words in str(error) for words in ("could not create a", "bad_alloc")):
                raise MemoryError(str(error)) from error
            raise
        measured = peak_memory(device)
    if (measured["peak_memory_gib"] or 0.0) > limit:  # the host gives pages without asking
        raise MemoryError(f"{measured['peak_memory_gib']:.2f} GiB are more than {limit:.2f}")
    return measured


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


def _row(shape: str, case: Case, name: str, mode: str, batch: int, peaks: _Peaks) -> dict:
    measured = peaks(batch) if batch else None
    return dict(
        suite=NAME,
        shape=shape,
        kernel_name=f"{case.method}_step",
        kernel_provider=name,
        kernel_operation_mode=mode,
        metric_name="GiB",
        model=case.model,
        method=case.method,
        dtype=case.dtype,
        images=case.images,
        x_name="batch",
        x_value=batch,
        limit_gib=peaks.limit,
        status="oom" if measured is None else "ok",
        match=True,  # the suite of steps compares the results of the same programs
        **(measured or dict(peak_memory_gib=None, peak_reserved_gib=None)),
    )
