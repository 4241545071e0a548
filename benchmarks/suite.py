"""What a suite is to ``run.py``: a module with the attributes of :class:`Suite`.

A suite yields one row per program and case. ``run.py`` adds the machine, the commit and the time
to each row, writes, prints and plots it. Fields that its pictures and the report read:

- ``suite``, ``shape``, ``kernel_name`` (what is computed), ``kernel_provider`` (by whom),
  ``dtype``, ``x_name`` and ``x_value`` (batch, or number of parameters);
- those of ``Timing.row()``: ``status`` ("ok", or "oom" and "failed" with every figure None and a
  ``reason``), ``y_value_50``, ``y_value_20``, ``y_value_80`` in ms, ``n``;
- those of ``measure.judged()``: ``match``, whether this very case computes what it should, None of
  one that ran out of memory, and ``error``;
- ``images_per_second``, ``peak_memory_gib``, ``peak_reserved_gib``;
- ``bytes``, ``flops``, ``percent_of_floor`` and ``mfu_percent``, by :meth:`Options.against_floor`;
- ``backend``: what computes inside the program; ``libraries``: their versions;
- a step: ``method``, ``model`` and ``parts_ms``, part to ms;
- ``absent``, of one row of a case: programs that cannot run here, and why.

``EVERY_ROW`` names what no row may lack, be it None.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from roofline import Ceilings

# Header, field of the row, format; words have no format.
Column = tuple[str, str, str]

EVERY_ROW = frozenset((
    *("suite", "shape", "kernel_name", "kernel_provider", "kernel_operation_mode", "dtype"),
    *("metric_name", "x_name", "x_value", "y_value_20", "y_value_50", "y_value_80", "n"),
    *("status", "reason", "match", "error", "backend", "libraries"),
    *("images_per_second", "peak_memory_gib", "peak_reserved_gib"),
    *("bytes", "flops", "floor_ms", "percent_of_floor", "mfu_percent"),
))  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        device: Where everything runs.
        shapes: Names in the suite's ``SHAPES``, in its order.
        methods: Names of methods, for suites that train.
        dtypes: "fp32", "bf16".
        models: Instead of the models of the shapes; None: theirs.
        batch: Images per step instead of the shapes' own; None: theirs.
        peers: Programs to compare with; None: all that are cheap to start.
        operators: Names in OPS; None: all.
        images: uint8, as a loader gives them, or float, normalised.
        compiled: Also programs under torch.compile, which take half a minute to start.
        rounds: Blocks of each program at most.
        block_seconds: Least length of a block.
        seconds: After so many no round of a group of programs is begun, but two are made.
        memory: Also measure memory, in a process of its own.
        ceilings: Of this machine, measured in the same run.
        smoke: Everything as small and short as it goes; the figures mean nothing.
        say: Takes a line about progress.
    """

    device: torch.device
    shapes: Sequence[str]
    methods: Sequence[str]
    dtypes: Sequence[str]
    models: Sequence[str] | None
    batch: Sequence[int] | None
    peers: Sequence[str] | None
    operators: Sequence[str] | None
    images: str
    compiled: bool
    rounds: int
    block_seconds: float
    seconds: float
    memory: bool
    ceilings: Ceilings
    smoke: bool
    say: Callable[[str], None]

    def cases(self, known: Mapping[str, tuple[str, int]]) -> Iterator[tuple[str, str, int]]:
        """Name, model and batch of every training step asked for.

        Args:
            known: Shape to its model and batch.
        """
        chosen = [(shape, *known[shape]) for shape in self.shapes]
        if self.models is not None:
            chosen = [(model, model, 8) for model in self.models]
        for shape, model, batch in chosen:
            for count in self.batch or [batch]:
                yield shape, model, count

    def timing(self) -> dict:
        """Arguments of measure.interleave."""
        return dict(
            rounds=self.rounds,
            block_seconds=self.block_seconds,
            seconds=self.seconds,
            device=self.device,
        )

    def against_floor(
        self, ms: float | None, floor: float, num_bytes: float, flops: float, dtype: str
    ) -> dict:
        """Fields of a row: how near a time is to the least.

        Args:
            ms: Median time; None of a program without one.
            floor: Least seconds, by ``ceilings``.
            num_bytes: That must be moved.
            flops: That must be done in matrix products.
            dtype: Of these products.
        """
        rate = None if ms is None else flops / ms * 1e3
        counted = rate is not None and flops > 0
        return dict(
            bytes=num_bytes,
            flops=flops,
            floor_ms=floor * 1e3,
            percent_of_floor=None if ms is None else 1e5 * floor / ms,
            mfu_percent=100 * rate / self.ceilings.matmul[dtype] if counted else None,
            gb_per_second=None if ms is None else num_bytes / ms / 1e6,
            tflops=None if rate is None else rate / 1e12,
        )

    def wants(self, program: str) -> bool:
        """Whether a program is to be compared; fastmim always is."""
        return self.peers is None or program == "fastmim" or program in self.peers


class Suite(Protocol):
    """A module of benchmarks.

    Attributes:
        NAME: Word of ``--suite``.
        SHAPES: Name of a shape to what it is.
        DEFAULT: "cpu" and "cuda" to the shapes that run if none is asked for.
        COLUMNS: Of the printed table.
        WORDS: Of the options "method", "peer" and "op" to what this suite accepts there.
    """

    NAME: str
    SHAPES: Mapping[str, Any]
    DEFAULT: Mapping[str, Sequence[str]]
    COLUMNS: Sequence[Column]
    WORDS: Mapping[str, Sequence[str]]

    def run(self, options: Options) -> Iterator[dict]:
        """A row for every case and program, each as soon as it is known."""

    def describe(self) -> list[str]:
        """Lines for ``--list``: shapes, programs, and which programs are absent and why."""


# fmt: off
TIMES: list[Column] = [
    ("ms", "y_value_50", ".2f"), ("p20", "y_value_20", ".2f"), ("p80", "y_value_80", ".2f"),
]
FLOOR: list[Column] = [("GB/s", "gb_per_second", ".1f"), ("% of floor", "percent_of_floor", ".0f")]
PEAK: Column = ("peak MB", "peak_mb", ".1f")
CHECKS: list[Column] = [("error", "error", ".0e"), ("match", "match", ""), ("kept", "kept_of", "")]
# fmt: on


def images_per_second(images: int, ms: float | None) -> float | None:
    """None of a program without a time."""
    return None if ms is None else images / ms * 1e3


def known_words(suites: Sequence[Suite], option: str) -> list[str]:
    """What any of the suites accepts for an option, in order, each once."""
    return list(dict.fromkeys(itertools.chain(*(s.WORDS.get(option, ()) for s in suites))))
