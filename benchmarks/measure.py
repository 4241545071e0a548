"""Interleaved timing with the quiet rule, ceilings, saved-for-backward bytes, and peak memory."""

import contextlib
import ctypes
import gc
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from capacity import gib_of, memory_in_use
from roofline import Ceilings
from torch import Tensor

Result = TypeVar("Result")

_FLUSHED = 2**28  # bytes cleared before a call on a GPU: beyond any second-level cache
_MAX_LEAD = 64  # clears before a call
# Cores that other processes may take during a block that counts. The rule looks at load, never at
# the result.
QUIET_CORES = 0.1
_TICKS_PER_SECOND = 100  # USER_HZ of /proc/stat, a constant of Linux
_FIRST_IDLE, _LAST_IDLE, _STEAL = 3, 4, 7  # columns of /proc/stat: idle, iowait, ..., steal


@dataclass(frozen=True)
class Block:
    """Calls made in one go.

    Attributes:
        seconds: Of each call.
        others: Cores that other processes took meanwhile.
    """

    seconds: list[float]
    others: float

    @property
    def quiet(self) -> bool:
        return self.others <= QUIET_CORES


_TURNS = itertools.count(1)


class Lost(NamedTuple):
    """Why a program has no figures.

    Attributes:
        status: "oom": memory did not suffice; "failed": anything else.
        reason: A line.
    """

    status: str
    reason: str


@dataclass
class Timing:
    """The blocks of one program, one per round.

    Attributes:
        blocks: None of a program that is lost.
        timed_by: clock: the host's; events: of the stream; graph: the same, replayed at once.
        turns: The same number for programs that took turns.
        lost: Why there are no blocks.
    """

    blocks: list[Block] = field(default_factory=list)
    timed_by: str = "clock"
    turns: int = 0
    lost: Lost | None = None

    def lose(self, why: Lost) -> None:
        self.blocks.clear()
        self.lost = why

    def row(self) -> dict:
        """Median and spread in ms. If no block was quiet all count, and ``quiet`` is false."""
        quiet = [s for block in self.blocks if block.quiet for s in block.seconds]
        every = [s for block in self.blocks for s in block.seconds]
        p20, p50, p80 = _quantiles(quiet or every) if every else (None, None, None)
        return dict(
            **status_of(self.lost),
            metric_name="ms",
            y_value_50=p50,
            y_value_20=p20,
            y_value_80=p80,
            block_ms=[round(1e3 * statistics.median(b.seconds), 6) for b in self.blocks],
            n=len(quiet or every),
            kept=len(quiet),
            total=len(every),
            quiet=bool(quiet),
            timed_by=self.timed_by,
        )


def _quantiles(seconds: list[float]) -> list[float]:
    ms = torch.tensor(seconds, dtype=torch.float64) * 1e3
    return ms.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()


def speedup(timing: Timing, peer: Timing) -> float | None:
    """How many times as fast as the peer: median over rounds, so that drift cancels.

    Rounds in which both were quiet; all rounds if there is none. None if one is lost.
    """
    if not timing.blocks or not peer.blocks:
        return None
    pairs = list(zip(timing.blocks, peer.blocks, strict=True))
    quiet = [(mine, other) for mine, other in pairs if mine.quiet and other.quiet]
    return statistics.median(
        statistics.median(other.seconds) / statistics.median(mine.seconds)
        for mine, other in quiet or pairs
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    # Through PyTorch's stable ABI a C++ kernel hears that an allocation failed, but not why.
    unnamed = "API call failed" in text and ("aten::empty" in text or "aten::new_empty" in text)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or unnamed)


def attempt(function: Callable[..., Result], *args) -> Result | Lost:
    """What the call returns; if it fails, why, and its memory is free again.

    What went wrong, other than a lack of memory, is printed with its traceback.
    """
    try:
        return function(*args)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        lost = Lost(
            "oom" if out_of_memory(error) else "failed", f"{type(error).__name__}: {lines[0]}"
        )
        if lost.status == "failed":
            traceback.print_exc()
    free_memory()
    return lost


def free_memory() -> None:
    """Give back what nothing refers to: another program, or another process, may need it."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a kernel that failed ends every later call
            torch.cuda.empty_cache()


def status_of(lost: Lost | None) -> dict:
    """Fields of a row: whether it has figures, and why not."""
    status, reason = lost or ("ok", None)
    return dict(status=status, reason=reason)


def judged(lost: Lost | None, error: float | None, tolerance: float) -> dict:
    """Fields of a row: whether this very case was computed rightly.

    Args:
        lost: A failure is wrong; of what ran out of memory nothing is said.
        error: Relative, to what is held to be right.
        tolerance: Largest error that is right. NaN never is.
    """
    if lost is not None:
        return dict(error=None, match=None if lost.status == "oom" else False)
    return dict(error=error, match=None if error is None else error <= tolerance)


def interleave(
    programs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    block_seconds: float,
    device: torch.device,
    warm_up: int = 2,
    seconds: float = math.inf,
    kernels: bool = False,
) -> dict[str, Timing]:
    """Time programs in turns, A B C, B C A, ...: all of them meet the same noise.

    Args:
        programs: Name to a call that is timed.
        rounds: Blocks of each program.
        block_seconds: Least length of a block; it holds at least one call.
        device: Synchronised after every call.
        warm_up: Calls of each program that are not timed.
        seconds: After so many no round is begun, but two are made.
        kernels: On a GPU, time what it does and not the wait for the host: between two events on
            the stream, from a cold cache. Otherwise the whole call is timed by the host's clock.

    Returns:
        A timing without blocks of a program that ran out of memory or failed.
    """
    stopwatch = _Events if kernels and device.type == "cuda" else _Clock
    turns = next(_TURNS)
    timings = {name: Timing(turns=turns) for name in programs}
    timed = {}
    for name, program in programs.items():
        ready = attempt(_warmed, stopwatch, program, device, warm_up)
        if isinstance(ready, Lost):
            timings[name].lose(ready)
        else:
            timed[name] = ready
            timings[name].timed_by = ready.timed_by
    order = list(timed)
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        for i in range(rounds):
            if i >= 2 and time.perf_counter() - begin > seconds:
                break
            for name in tuple(order):
                block = attempt(_block, timed[name], block_seconds, device)
                if isinstance(block, Lost):
                    timings[name].lose(block)
                    order.remove(name)
                else:
                    timings[name].blocks.append(block)
            order = order[1:] + order[:1]
            gc.collect()
    finally:
        gc.enable()
    return timings


def _warmed(
    stopwatch: "type[_Clock | _Events]",
    program: Callable[[], object],
    device: torch.device,
    warm_up: int,
) -> "_Clock | _Events":
    for _ in range(warm_up):
        program()
    return stopwatch(program, device)


class _Clock:
    """Seconds of one call by the host's clock, up to the end of what it started."""

    timed_by = "clock"

    def __init__(self, program: Callable[[], object], device: torch.device) -> None:
        self._program, self._device = program, device

    def __call__(self) -> float:
        start = time.perf_counter()
        self._program()
        synchronize(self._device)
        return time.perf_counter() - start


class _Events:
    """Seconds that a GPU needs for one call whose inputs are not in its cache.

    Clearing a buffer empties the cache and keeps the GPU busy meanwhile: as often as it takes for
    the host to have submitted the whole call before the first event is reached. What takes the host
    longer than the GPU is captured and replayed, if it can be: then launches do not count.
    """

    def __init__(self, program: Callable[[], object], device: torch.device) -> None:
        self.timed_by = "events"
        self._program, self._device = program, device
        self._buffer = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        begin = time.perf_counter()
        program()
        submitted = time.perf_counter() - begin
        synchronize(device)
        self._clears = 1
        clear = min(self._between(self._buffer.zero_) for _ in range(3))
        self._clears = min(1 + math.ceil(2 * submitted / clear), _MAX_LEAD)
        if submitted > self():
            replay = _captured(program, device)
            if replay is not None:
                self.timed_by, self._program, self._clears = "graph", replay, 1

    def __call__(self) -> float:
        return self._between(self._program)

    def _between(self, program: Callable[[], object]) -> float:
        for _ in range(self._clears):
            self._buffer.zero_()
        self._start.record()
        program()
        self._end.record()
        synchronize(self._device)
        return self._start.elapsed_time(self._end) / 1e3


def _captured(program: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """The replay of a program as a CUDA graph; None if it cannot be captured."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            program()
    torch.cuda.current_stream(device).wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream):
            program()
    except RuntimeError:  # it waits for the device, or its optimizer's state is the host's
        synchronize(device)
        return None
    return graph.replay


def _block(timed: Callable[[], float], block_seconds: float, device: torch.device) -> Block:
    synchronize(device)
    seconds = []
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    while not seconds or time.perf_counter() - start < block_seconds:
        seconds.append(timed())
    length = time.perf_counter() - start
    others = _busy_seconds() - busy - (time.process_time() - own)
    return Block(seconds, others / length)


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used, and that its host has stolen."""
    try:
        first_line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:  # another operating system: only our own time is known, every block counts
        return time.process_time()
    ticks = [int(word) for word in first_line.split()[1 : _STEAL + 2]]
    return (sum(ticks) - sum(ticks[_FIRST_IDLE : _LAST_IDLE + 1])) / _TICKS_PER_SECOND


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_COPIED = {"cpu": 2**26, "cuda": 2**28}  # float32 values of the copy: beyond any cache
_LARGEST = {"cpu": 2048, "cuda": 8192}  # side of the square product
_LONGEST = 0.1  # seconds that it may take
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_ceilings(device: torch.device, *, smoke: bool) -> Ceilings:
    """What copies and matrix products reach here at best, on random data."""
    values = 2**20 if smoke else _COPIED[device.type]
    source, target = torch.ones(values, device=device), torch.zeros(values, device=device)
    programs = {"copy": lambda: target.copy_(source)}
    sides = {}
    for name, dtype in _DTYPES.items():
        sides[name], programs[name] = _product(dtype, device, 256 if smoke else None)
    timings = interleave(programs, rounds=3, block_seconds=0.2, device=device, kernels=True)
    best = {n: min(s for b in t.blocks for s in b.seconds) for n, t in timings.items()}
    return Ceilings(
        copy=2 * source.nbytes / best["copy"],
        matmul={name: 2 * sides[name] ** 3 / best[name] for name in _DTYPES},
    )


def _product(
    dtype: torch.dtype, device: torch.device, side: int | None
) -> tuple[int, Callable[[], Tensor]]:
    """A square product and its side: the largest that is not too long here, unless it is given."""
    largest, side, seconds = side or _LARGEST[device.type], side or 128, 0.0
    while seconds == 0.0 or (side < largest and 8 * seconds < _LONGEST):
        side = min(2 * side, largest)
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        a @ b
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds = time.perf_counter() - start
    return side, lambda: a @ b


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass: each storage once, without ``exclude``.

    Args:
        forward: Returns the loss.
        exclude: Parameters and inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept alive: no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(saved.values())
    loss.backward()
    return total


def peak_memory(device: torch.device) -> dict:
    """Peak of this process so far in GiB: resident on a CPU, allocated and reserved on a GPU."""
    if device.type == "cuda":
        return dict(
            peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30,
            peak_reserved_gib=torch.cuda.max_memory_reserved(device) / 2**30,
        )
    # Not ru_maxrss: a child inherits its parent's.
    return dict(peak_memory_gib=gib_of("/proc/self/status", "VmHWM:"), peak_reserved_gib=None)


def peak_of_call(call: Callable[[], object], device: torch.device) -> dict:
    """Peak of one call in GiB, without what was there before it.

    Allocated and reserved on a GPU; on a CPU resident, to about a quarter of a MiB, and None where
    the system does not forget an earlier peak.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        call()
        synchronize(device)
        peak = peak_memory(device)
        return {name: peak[name] - b / 2**30 for name, b in zip(peak, before, strict=True)}
    before = memory_in_use(device) if _forget_peak() else None
    call()
    peak = None if before is None else gib_of("/proc/self/status", "VmHWM:") - before
    return dict(peak_memory_gib=peak, peak_reserved_gib=None)


def _forget_peak() -> bool:
    """Give freed memory back and let the peak begin here; False if the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def in_fresh_process(
    function: Callable[..., Result], *args, out_of_memory_by: Collection[int] = (signal.SIGKILL,)
) -> Result | Lost:
    """Call an importable function where nothing else has been allocated yet.

    Args:
        function: To be called.
        out_of_memory_by: Signals that end a process whose memory does not suffice. Without a limit
            of its own that is the system's; under one, libraries give up in other ways.
    """
    free_memory()
    context = start_server([function.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        pass  # it has ended without an answer
    finally:
        process.join()
    if -process.exitcode in out_of_memory_by:
        return Lost("oom", f"the process was ended by signal {-process.exitcode}")
    return Lost("failed", f"the process ended with exit status {process.exitcode}")


def start_server(modules: Sequence[str]) -> BaseContext:
    """Let a server begin to import what fresh processes need; once, if it is called again.

    It runs nothing else, so its children start in milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    # PyTorch's optimizers import torch._dynamo, 0.15 GiB, where others do not: all have it.
    context.set_forkserver_preload(["torch._dynamo", *modules])
    with _search_path_for_children():
        forkserver.ensure_running()
    return context


def _answer(sender: Connection, function: Callable, args: tuple) -> None:
    sender.send(attempt(function, *args))


@contextlib.contextmanager
def _search_path_for_children() -> Iterator[None]:
    """Let a server that is started here find the modules that this process finds."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
