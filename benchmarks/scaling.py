"""Suite ``scaling``: what further processes add to a training step, under torchrun.

Every process trains on its own batch, gradients are averaged by DistributedDataParallel. Timed in
turns: the step of one process while the others wait; of all; of all without the average; and the
average of as many values alone. What of the average the backward pass does not hide is the
difference of the second and the third.
"""

import contextlib
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import steps
import torch
import torch.distributed as dist
from measure import Lost, attempt, judged, peak_of_call, status_of, synchronize
from peers import Case, FastMIM
from roofline import step_parts, step_total
from suite import FLOOR, PEAK, Column, Options, Suite
from torch import Tensor, nn

from fastmim.train.distributed import World

NAME = "scaling"
SHAPES = steps.SHAPES
DEFAULT = {"cpu": ["tiny32"], "cuda": ["base224", "large224"]}
WORDS = {"method": steps.WORDS["method"]}
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("method", "method", ""), ("dtype", "dtype", ""),
    ("processes", "processes", "d"), ("batch each", "x_value", "d"),
    ("ms", "y_value_50", ".2f"), ("alone ms", "alone_ms", ".2f"),
    ("without average ms", "unsynchronised_ms", ".2f"), ("average alone ms", "average_ms", ".2f"),
    ("img/s", "images_per_second", ".2f"), *FLOOR[1:], ("MFU %", "mfu_percent", ".0f"),
    ("efficiency", "efficiency", ".2f"), ("average hidden", "overlap", ".2f"),
    PEAK, ("match", "match", ""), ("status", "status", ""),
]
# fmt: on
_SMOKE_BATCH = 8


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine."""
    if device.type == "cuda" and world_size() > 1:
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[int]:
    """The rank of this process; without torchrun 0, and no group."""
    if world_size() == 1:
        yield 0
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def suites(asked: Sequence[Suite], step: ModuleType) -> list[Suite]:
    """This suite, if it was asked for as it must be.

    Raises:
        ValueError: If there is one process, or a suite was asked for that knows only one.
    """
    this = sys.modules[__name__]
    if world_size() == 1:
        raise ValueError(
            "--suite scaling needs several processes: "
            "torchrun --nproc-per-node=2 benchmarks/run.py --suite step"
        )
    if not set(asked) <= {step, this}:
        raise ValueError("under torchrun only a step is measured: --suite step")
    return [this]


def describe() -> list[str]:
    return ["suite scaling   of a step, under torchrun --nproc-per-node=N: --suite step"]


def run(options: Options) -> Iterator[dict]:
    """A row for every shape, method and dtype; each process must come here."""
    for (shape, model, batch), method, dtype in itertools.product(
        options.cases(SHAPES), options.methods, options.dtypes
    ):
        batch = _SMOKE_BATCH if options.smoke else batch
        case = Case(model, batch, method, dtype, options.device.type, options.images)
        options.say(f"scaling {shape} {method} {dtype}: {world_size()} processes")
        alone, lost = _rehearsed(case)
        times = {} if lost else _measured(case, alone, options)
        yield _row(shape, case, times, lost, options)


def _rehearsed(case: Case) -> tuple[FastMIM | None, Lost | None]:
    """A program that has done a step by itself in every process, or why there is none."""
    made = attempt(_stepped, case)
    statuses = ("ok", "oom", "failed")
    mine = made.status if isinstance(made, Lost) else "ok"
    worst = statuses[int(_greatest(statuses.index(mine)))]
    if worst == "ok":
        return made, None
    return None, made if worst == mine else Lost(worst, "another process is lost")


def _stepped(case: Case) -> FastMIM:
    """With as much memory taken beside it as all that is measured needs.

    Later, in the midst of an average, a process that runs out of memory would leave the others
    waiting.
    """
    program, beside = FastMIM(case), FastMIM(case)
    for each in (program, beside):
        each.step(case.batches()[0])
    trained = sum(p.numel() for p in program.student.parameters() if p.requires_grad)
    buckets = torch.empty(2 * trained, device=case.device)  # DDP's, and those of the average alone
    beside.step(case.batches()[1])
    del buckets
    return program


def _measured(case: Case, alone: FastMIM, options: Options) -> dict:
    """Fields of a row: times, memory, and whether all processes agree."""
    together = _Together(case, options.device)
    equal = together.equal_everywhere()
    block_seconds = max(options.block_seconds, 0.02)
    programs = _programs(together, _calls(alone, case))
    times = _interleave(programs, options.rounds, block_seconds, options.device)
    median = {name: statistics.median(of_blocks) for name, of_blocks in times.items()}
    return dict(
        **_quantiles(times["together"]),
        alone_ms=1e3 * median["alone"],
        unsynchronised_ms=1e3 * median["unsynchronised"],
        average_ms=1e3 * median["average"],
        images_per_second=world_size() * case.batch / median["together"],
        efficiency=median["alone"] / median["together"],
        overlap=_overlap(median),
        **peak_of_call(together.synchronised, options.device),
        error=0.0 if equal else math.inf,
    )


_MEASURED = (
    "y_value_20", "y_value_50", "y_value_80", "n", "alone_ms", "unsynchronised_ms", "average_ms",
    "images_per_second", "efficiency", "overlap", "peak_memory_gib", "peak_reserved_gib",
)  # fmt: skip


def _row(shape: str, case: Case, times: dict, lost: Lost | None, options: Options) -> dict:
    """Of all processes; the floor is that of one."""
    total = step_total(
        step_parts(case.model, case.method, case.batch, case.dtype), options.ceilings, case.dtype
    )
    floor = (total.floor, total.bytes, total.flops, case.dtype)
    return dict(
        suite=NAME,
        kernel_name=f"{case.method}_step",
        kernel_provider="fastmim",
        kernel_operation_mode="step",
        shape=shape,
        model=case.model,
        method=case.method,
        dtype=case.dtype,
        images=case.images,
        x_name="batch",
        x_value=case.batch,
        processes=world_size(),
        metric_name="ms",
        **FastMIM.backend(case),
        **status_of(lost),
        **{field: times.get(field) for field in _MEASURED},
        **options.against_floor(times.get("y_value_50"), *floor),
        **judged(lost, times.get("error"), 0.0),
    )


def _overlap(median: dict[str, float]) -> float:
    """The part of the average that the step hides: 1 if it takes no longer with it."""
    shown = max(0.0, median["together"] - median["unsynchronised"])
    return max(0.0, 1 - shown / median["average"])


def _quantiles(seconds: list[float]) -> dict:
    ms = 1e3 * torch.tensor(seconds, dtype=torch.float64)
    p20, p50, p80 = ms.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return dict(y_value_50=p50, y_value_20=p20, y_value_80=p80, n=len(seconds))


class _World(World):
    """Averages gradients unless it is told not to."""

    averaging = True

    def accumulating(
        self, module: nn.Module, last: bool
    ) -> contextlib.AbstractContextManager[None]:
        return super().accumulating(module, last and self.averaging)


class _Together(FastMIM):
    """fastmim's step in every process, with averaged gradients."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case)
        self._next_step = _calls(self, case)
        self._trained = [p for p in self.student.parameters() if p.requires_grad]
        self._values = torch.zeros(sum(p.numel() for p in self._trained), device=device)

    def world(self) -> World:
        self._world = _World(timeout_minutes=30)
        self._world.choose("ddp")
        return self._world

    def equal_everywhere(self) -> bool:
        """Whether equal students are equal after steps on images that are not."""
        for _ in range(2):
            self.synchronised()
        return all(_same(p.detach()) for p in self._trained)

    def synchronised(self) -> None:
        self._next_step()

    def unsynchronised(self) -> None:
        self._world.averaging = False
        self._next_step()
        self._world.averaging = True

    def average(self) -> None:
        dist.all_reduce(self._values)


def _same(tensor: Tensor) -> bool:
    """Whether a tensor is equal in all processes."""
    least, most = tensor.clone(), tensor.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return torch.equal(least, most)


def _calls(program: FastMIM, case: Case) -> Callable[[], None]:
    """The step on batches that are others in each process."""
    batches = itertools.cycle(case.batches())
    for _ in range(dist.get_rank()):
        next(batches)
    return lambda: program.step(next(batches))


def _programs(together: _Together, alone: Callable[[], None]) -> dict[str, Callable[[], None]]:
    first = dist.get_rank() == 0
    return {
        "together": together.synchronised,
        "unsynchronised": together.unsynchronised,
        "alone": alone if first else lambda: None,
        "average": together.average,
    }


def _interleave(
    programs: dict[str, Callable[[], None]], rounds: int, block_seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a call in each round: of the slowest process, the same everywhere.

    All processes make the same number of calls, which the first has chosen.
    """
    counts = {}
    for name, program in programs.items():
        program()
        seconds = _greatest(_timed(program, 1, device))
        counts[name] = max(1, math.ceil(block_seconds / max(seconds, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(_greatest(_timed(program, counts[name], device)))
    return times


def _timed(program: Callable[[], None], count: int, device: torch.device) -> float:
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        program()
    synchronize(device)
    return (time.perf_counter() - start) / count


def _greatest(value: float) -> float:
    """Of all processes: the seconds of the slowest."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.item()
