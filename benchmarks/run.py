"""What this machine does, against whom, and how far from its limit: ``python benchmarks/run.py``.

Without arguments: a selection of less than five minutes. See benchmarks/README.md.
"""

import argparse
import dataclasses
import datetime
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # last: an installed fastmim comes first

import attention
import compare
import ema
import gpu_check
import loader
import machine
import memory
import ops
import plots
import rows as rows_of
import scaling
import stepcost
import steps
import torch
from measure import measure_ceilings, start_server
from progress import Progress
from report import write_report
from roofline import Ceilings
from suite import Options, Suite, known_words

from fastmim.models import MODELS, did_you_mean
from fastmim.train.engine import resolve_device, resolve_precision

# The one list of suites, in the order in which they run.
SUITES: list[Suite] = [ops, attention, steps, ema, stepcost, memory, loader]
# Only when asked for by name: it checks and takes ten minutes; under torchrun alone.
APART: list[Suite] = [gpu_check, scaling]
FOLDER = "benchmark-results"
# On a GPU nobody else takes part of a block, and a call is short.
_BLOCK_SECONDS = {"cpu": 0.6, "cuda": 0.1}
_SMALL = "tiny32"  # shape of the suites that have it
_NOTES = (
    "vs: times as fast, median over rounds. % of floor: by arithmetic and this run's copy and\n"
    "matrix product. kept: of all calls those in blocks in which other processes took at most 0.1\n"
    "core; with 'all', none was quiet and every call counts."
)


def main() -> int:
    """Run, write, print and plot; 1 if a program computes something else than its peer."""
    if sys.argv[1:2] == ["report"]:
        return write_report(sys.argv[2:], [*SUITES, *APART])
    asked = parse(sys.argv[1:])
    if asked.list:
        print("\n".join(line for suite in [*SUITES, *APART] for line in suite.describe()))
        return 0
    if asked.compare is not None:
        json, table = (path and path.resolve() for path in (asked.json, asked.csv))
        return compare.main(asked.compare, sys.argv[1:], asked.turns, json, table, Progress())
    device = resolve_device(asked.device)
    if asked.smoke:  # on a busy machine, threads waiting for each other cost 50 times the work
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that measure memory
        start_server([suite.__name__ for suite in SUITES])
    with scaling.process_group(device) as rank:
        device = scaling.own_device(device)
        cores = None if asked.smoke else machine.pin(torch.get_num_threads(), scaling.local_rank())
        return measure(asked, device, cores) if rank == 0 else follow(asked, device)


def measure(asked: argparse.Namespace, device: torch.device, cores: list[int] | None) -> int:
    """Every row that was asked for, written as soon as it is known; then tables and pictures."""
    progress = Progress()
    gc.freeze()  # what is imported need not be looked through between the rounds
    json_file, folder = _targets(asked)
    environment = {**machine.environment(device, smoke=asked.smoke), "pinned_cores": cores}
    progress("copy and matrix product")
    ceilings = measure_ceilings(device, smoke=asked.smoke)
    environment |= {"copy_gb_per_second": ceilings.copy / 1e9}
    environment |= {f"matmul_{name}_tflops": rate / 1e12 for name, rate in ceilings.matmul.items()}
    clocks = machine.Clocks(device)
    rows = []
    for row in _rows(asked, device, ceilings, progress):
        rows.append({**environment, **clocks.stamp(), **row})
        if json_file is not None:
            rows_of.append(json_file, rows[-1])
    progress.clear()
    _print(rows, environment)
    written = [json_file, *_write_rest(asked, rows, folder)]
    print("\nwritten:", ", ".join(str(path) for path in written if path is not None) or "nothing")
    return _verdict(rows)


def follow(asked: argparse.Namespace, device: torch.device) -> int:
    """What the other processes of torchrun do: the same, without a word."""
    ceilings = Ceilings(copy=math.inf, matmul={"fp32": math.inf, "bf16": math.inf})
    for _ in _rows(asked, device, ceilings, lambda text: None):
        pass
    return 0


def _rows(
    asked: argparse.Namespace,
    device: torch.device,
    ceilings: Ceilings,
    say: Callable[[str], None],
) -> Iterator[dict]:
    for suite, options in selection(asked, device, ceilings, say):
        yield from suite.run(options)


def selection(
    asked: argparse.Namespace,
    device: torch.device,
    ceilings: Ceilings,
    say: Callable[[str], None],
) -> Iterator[tuple[Suite, Options]]:
    """Suites with what each is to run."""
    for suite in asked.suite:
        options = Options(
            device=device,
            shapes=_shapes(suite, asked, device),
            methods=asked.method or suite.WORDS.get("method", ()),
            dtypes=asked.dtype or _native_dtypes(device),
            models=asked.model,
            batch=asked.batch,
            peers=asked.peer,
            operators=asked.op,
            images=asked.images,
            compiled=asked.compile,
            rounds=asked.rounds,
            block_seconds=asked.block_seconds or _BLOCK_SECONDS[device.type],
            seconds=asked.seconds,
            memory=not asked.no_memory,
            ceilings=ceilings,
            smoke=asked.smoke,
            say=say,
        )
        yield suite, options
        own = not (asked.batch or asked.model)
        if asked.quick and own and suite is steps:  # for the picture of throughput
            _, batch = suite.SHAPES[options.shapes[0]]
            yield (
                suite,
                dataclasses.replace(
                    options,
                    batch=[batch // 4, batch // 2],
                    methods=options.methods[:1],
                    dtypes=options.dtypes[-1:],
                    peers=options.peers or ["plain"],
                    memory=False,
                ),
            )


def _shapes(suite: Suite, asked: argparse.Namespace, device: torch.device) -> list[str]:
    """What was asked for; else what is made for the device, of which a short run takes one."""
    shapes = asked.shape or suite.DEFAULT[device.type]
    if not asked.shape and (asked.smoke or asked.quick):
        small = asked.smoke or device.type == "cpu"
        shapes = [_SMALL] if small and _SMALL in suite.SHAPES else shapes[:1]
    return [shape for shape in suite.SHAPES if shape in shapes]


def _native_dtypes(device: torch.device) -> list[str]:
    """bf16 only where the hardware computes it: elsewhere it is a hundred times as slow."""
    native = resolve_precision("auto", device, width=2**20) == "bf16"
    return ["fp32", "bf16"] if native else ["fp32"]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line, checked; SystemExit with a message if something in it is unknown."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py", description=__doc__, allow_abbrev=False
    )
    named = {suite.NAME: suite for suite in [*SUITES, *APART]}

    def several(name: str, known: Sequence[str], text: str, **about) -> None:
        def parse(value: str) -> list[str]:
            for word in value.split(","):
                if word not in known:
                    raise argparse.ArgumentTypeError(did_you_mean(name.lstrip("-"), word, known))
            return value.split(",")

        parser.add_argument(name, type=parse, metavar="A,B", help=text, **about)

    def counts(value: str) -> list[int]:
        numbers = [int(word) if word.isdecimal() else 0 for word in value.split(",")]
        if min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"expected numbers of images from 1, got '{value}'")
        return numbers

    shapes = list(dict.fromkeys(name for suite in SUITES for name in suite.SHAPES))
    several(
        "--suite", [*named, "all"], f"default: a short run of {','.join(s.NAME for s in SUITES)}"
    )
    several("--shape", shapes, "default: those made for the device, see --list")
    several("--op", known_words(SUITES, "op"), "operators; default: all")
    several("--method", known_words(SUITES, "method"), "methods of a step; default: all")
    several("--model", list(MODELS), "models of a step, in place of those of the shapes")
    parser.add_argument("--batch", type=counts, metavar="N,M", help="images of a step")
    several("--dtype", ["fp32", "bf16"], "precisions of a step; default: fp32, bf16 if native")
    several("--peer", known_words(SUITES, "peer"), "programs to compare with; default: all")
    parser.add_argument("--images", choices=["uint8", "float"], default="uint8", help="of a step")
    parser.add_argument("--rounds", type=int, help="blocks of each program; default: 10")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--compile", action="store_true", help="also time what is under torch.compile"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip memory, and save its time")
    parser.add_argument("--smoke", action="store_true", help="all code, no meaningful figures")
    parser.add_argument("--compare", metavar="REV", help="the same on another commit, in turns")
    parser.add_argument("--turns", type=int, default=5, help="of --compare; default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows as JSONL")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures into this folder")
    parser.add_argument("--list", action="store_true", help="print suites, shapes and programs")
    asked = parser.parse_args(words)
    for option in ("rounds", "turns"):
        if getattr(asked, option) is not None and getattr(asked, option) < 1:
            parser.error(f"--{option}: expected at least 1, got {getattr(asked, option)}")
    asked.quick = not (asked.suite or asked.smoke)
    everything = not asked.suite or "all" in asked.suite
    asked.named = not everything
    asked.suite = SUITES if everything else [named[name] for name in asked.suite]
    if everything:  # those that know what was asked for
        asked.suite = [suite for suite in SUITES if _refusal(suite, asked) is None]
    try:
        _fit_together(asked)
    except ValueError as error:
        parser.error(str(error))
    _set_lengths(asked)
    return asked


def _fit_together(asked: argparse.Namespace) -> None:
    """ValueError if words that are known do not go together."""
    apart = [suite for suite in asked.suite if suite in APART]
    if gpu_check in apart:
        gpu_check.refuse_unless_possible(asked.suite, asked.device)
    if scaling.world_size() > 1 or scaling in apart:
        asked.suite = scaling.suites(asked.suite, steps)
    for refusal in filter(None, (_refusal(suite, asked) for suite in asked.suite)):
        raise ValueError(refusal)
    if asked.compare is not None and asked.plot is not None:
        raise ValueError("--plot: a comparison has no pictures; its table goes to --json and --csv")
    if asked.named:
        _refuse_what_is_of_steps(asked)
    if not asked.suite:
        raise ValueError("no suite knows all of what was asked for; see --list")


def _refuse_what_is_of_steps(asked: argparse.Namespace) -> None:
    """ValueError if a suite that was named would not hear of an option."""
    of_steps = [steps, memory, stepcost, scaling]
    takers = {"model": of_steps, "dtype": of_steps, "batch": [*of_steps, loader]}
    for option, suites in takers.items():
        deaf = [suite.NAME for suite in asked.suite if suite not in suites]
        if getattr(asked, option) and deaf:
            raise ValueError(
                f"--{option}: suite {deaf[0]} has its own; it is for "
                f"{','.join(suite.NAME for suite in suites)}"
            )


def _refusal(suite: Suite, asked: argparse.Namespace) -> str | None:
    """Why a suite cannot do what was asked for."""
    if asked.shape and not set(asked.shape) & set(suite.SHAPES):
        return f"--shape: suite {suite.NAME} has {','.join(suite.SHAPES) or 'none'}"
    for option in ("method", "peer", "op"):
        known, words = suite.WORDS.get(option, ()), getattr(asked, option) or ()
        if words and not set(words) & set(known):
            return f"--{option}: suite {suite.NAME} knows {','.join(known) or 'none'}"
    return None


def _set_lengths(asked: argparse.Namespace) -> None:
    """How long everything takes."""
    asked.rounds = asked.rounds or (2 if asked.smoke else 5 if asked.quick else 10)
    asked.block_seconds = 0.02 if asked.smoke else 0.2 if asked.quick else None
    asked.seconds = 8.0 if asked.quick else math.inf


def _targets(asked: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """File of rows and folder of pictures; a fresh folder for both if nothing was named."""
    if asked.json or asked.csv or asked.plot:
        return asked.json and asked.json.resolve(), asked.plot
    folder = (
        Path(os.environ.get("OUT", ".")) / FOLDER / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    )
    folder.mkdir(parents=True)
    return folder / "results.jsonl", folder


def _write_rest(asked: argparse.Namespace, rows: list[dict], folder: Path | None) -> list[Path]:
    """CSV and pictures."""
    written = []
    if asked.csv:
        rows_of.write_csv(asked.csv, rows)
        written.append(asked.csv)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        written += plots.draw(rows, folder)
    return written


def _print(rows: list[dict], about: dict) -> None:
    """A table for each suite, with the machine above and the notes below."""
    print(f"\n{about['gpu_name'] or about['cpu_name']}, {about['threads']} threads, ", end="")
    print(f"torch {about['torch']}, commit {about['commit']}, {machine.timestamp()}")
    rates = (f"{name} {about[f'matmul_{name}_tflops']:.3g} TFLOP/s" for name in ("fp32", "bf16"))
    print(f"copy {about['copy_gb_per_second']:.3g} GB/s, matrix product {', '.join(rates)}")
    for suite in [*SUITES, *APART]:
        of_suite = [row for row in rows if row["suite"] == suite.NAME]
        if of_suite:
            print(f"\nsuite {suite.NAME}\n{rows_of.text(of_suite, suite.COLUMNS)}")
            absent = {n: why for row in of_suite for n, why in row.get("absent", {}).items()}
            lost = {row["kernel_provider"]: row["reason"] for row in of_suite if row.get("reason")}
            for word, names in (("absent", absent), ("no figures", lost)):
                for name, why in names.items():
                    print(f"{word}: {name}: {why}")
    print(f"\n{_NOTES}")


def _verdict(rows: list[dict]) -> int:
    wrong = [row for row in rows if row["match"] is False]
    for row in wrong:
        for failure in row.get("failures", ()):
            print(f"{row['stage']}: {failure}")
    if wrong:
        print(f"\n{len(wrong)} rows do not match their peer or failed: their times mean nothing")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
