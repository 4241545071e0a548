"""What a suite is to ``run.py``: a module with the attributes of :class:`Suite`.

A suite yields one row per program and case. ``run.py`` adds the machine, the commit and the time
to each row, writes, prints and plots it. Fields that its pictures and the report read:

- ``suite``, ``shape``, ``kernel_name`` (what is computed), ``kernel_provider`` (by whom),
  ``dtype``, ``x_name`` and ``x_value`` (batch, or number of parameters);
- those of ``Timing.row()``: ``status`` ("ok", or "oom" with every figure None), ``y_value_50``,
  ``y_value_20``, ``y_value_80`` in ms, ``n``;
- ``match``: this very case computes what it should (true of an "oom" row: nothing is claimed);
- a step: ``method``, ``model``, ``images_per_second``, ``peak_memory_gib``, ``peak_reserved_gib``,
  and ``parts_ms``, part to ms;
- ``bytes``, ``flops`` and ``percent_of_floor``, by :meth:`Options.against_floor`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from roofline import Ceilings

# Header, field of the row, format; words have no format.
Column = tuple[str, str, str]


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

    def against_floor(self, ms: float | None, floor: float, num_bytes: float, flops: float) -> dict:
        """Fields of a row: how near a time is to the least.

        Args:
            ms: Median time; None of a program that ran out of memory.
            floor: Least seconds, by ``ceilings``.
            num_bytes: That must be moved.
            flops: That must be done.
        """
        return dict(
            bytes=num_bytes,
            flops=flops,
            floor_ms=floor * 1e3,
            percent_of_floor=None if ms is None else 1e5 * floor / ms,
            gb_per_second=None if ms is None else num_bytes / ms / 1e6,
            tflops=None if ms is None else flops / ms / 1e9,
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
CHECKS: list[Column] = [("error", "error", ".0e"), ("match", "match", ""), ("kept", "kept_of", "")]
# fmt: on


def known_words(suites: Sequence[Suite], option: str) -> list[str]:
    """What any of the suites accepts for an option, in order, each once."""
    return list(dict.fromkeys(itertools.chain(*(s.WORDS.get(option, ()) for s in suites))))
