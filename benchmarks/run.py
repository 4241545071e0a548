"""What this machine does, against whom: ``python benchmarks/run.py``. See benchmarks/README.md."""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # last: an installed fastmim comes first

import ema
import gpu_check
import ops
import steps
import torch
from stages import run_stages
from suite import Column, Options, Suite, known_words

from fastmim.info import report
from fastmim.train.engine import resolve_device

# The one list of suites, in the order in which they run.
SUITES: list[Suite] = [ops, steps, ema]
_BY_NAME = {suite.NAME: suite for suite in SUITES}
# fmt: off
_STAGES: list[Column] = [
    ("stage", "stage", ""), ("status", "status", ""), ("passed", "passed", "d"),
    ("failed", "failed", "d"), ("skipped", "skipped", "d"), ("seconds", "seconds", ".0f"),
    ("reason", "reason", ""),
]
# fmt: on
# On a GPU nobody else takes part of a block, and a call is short.
_BLOCK_SECONDS = {"cpu": 0.6, "cuda": 0.1}
_NOTES = (
    "vs: times as fast, median over rounds. kept: calls in blocks in which other processes took "
    "at most 0.1 core,\nof all; with 'all', none was quiet and every call counts."
)


def main() -> int:
    """Run the suites, print their tables; 1 if a program computes something else than its peer."""
    options = _parse()
    if options.list:
        _print_list()
        return 0
    if options.suite == [gpu_check.NAME]:
        return _check_gpu(options)
    if options.smoke:  # on a busy machine, threads waiting for each other cost 50 times the work
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that measure memory
    device = resolve_device(options.device)
    environment = _environment(device, options.smoke)
    rows = []
    out = open(options.json, "a") if options.json else None  # noqa: SIM115
    try:
        for row in _rows(options, device):
            rows.append({**row, **environment})
            if out is not None:
                print(json.dumps(rows[-1]), file=out, flush=True)
    finally:
        if out is not None:
            out.close()
    _print_rows(rows, environment)
    wrong = [row for row in rows if not row["match"]]
    if wrong:
        print(f"\n{len(wrong)} rows do not match their peer: their times mean nothing")
    return 1 if wrong else 0


def _check_gpu(options: argparse.Namespace) -> int:
    """Run every stage of gpu-check, print what came of it; 1 if any of it is not good."""
    device = resolve_device(options.device)
    environment = _environment(device, smoke=False)
    path = options.json or Path(os.environ.get("OUT", ".")) / f"{gpu_check.NAME}.jsonl"
    path = path.resolve()
    before = len(path.read_text().splitlines()) if path.exists() else 0

    def write(row: dict) -> None:
        with path.open("a") as out:
            print(json.dumps({**row, **environment}), file=out)

    with tempfile.TemporaryDirectory() as folder:
        stages = gpu_check.plan(Path(folder), path, device)
        results = run_stages(stages, seconds=gpu_check.SECONDS, write=write, say=_say)
    rows = [json.loads(line) for line in path.read_text().splitlines()[before:]]
    _print_rows(rows, environment)
    for name, result in results.items():
        for failure in result.failures:
            print(f"{name}: {failure}")
    print(f"\nrows: {path}")
    return 0 if all(result.good for result in results.values()) else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_rows(rows: list[dict], about: dict) -> None:
    """A table for each suite, with the machine above and the notes below."""
    print(f"\n{about['gpu_name'] or about['cpu_name']}, {about['threads']} threads, ", end="")
    print(f"torch {about['torch']}, commit {about['commit']}, {about['timestamp']}")
    tables = {**{s.NAME: s.COLUMNS for s in SUITES}, gpu_check.NAME: _STAGES}
    for suite, columns in tables.items():
        of_suite = [row for row in rows if row["suite"] == suite]
        if of_suite:
            print(f"\nsuite {suite}")
            _print_table(of_suite, columns)
    print(f"\n{_NOTES}")


def _parse() -> argparse.Namespace:
    known_shapes = list(dict.fromkeys(name for suite in SUITES for name in suite.SHAPES))
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)

    def several(name: str, known: list[str], default: list[str] | None, text: str) -> None:
        def parse(value: str) -> list[str]:
            values = value.split(",")
            unknown = [v for v in values if v not in known]
            if unknown:
                raise argparse.ArgumentTypeError(
                    f"unknown {', '.join(unknown)}; expected some of {','.join(known)}"
                )
            return values

        parser.add_argument(name, type=parse, default=default, metavar="A,B", help=text)

    suites = [*_BY_NAME, gpu_check.NAME]
    several("--suite", suites, list(_BY_NAME), f"suites; default: all but {gpu_check.NAME}")
    several("--shape", known_shapes, None, "shapes; default: those made for the device, see --list")
    methods = known_words(SUITES, "method")
    several("--op", known_words(SUITES, "op"), None, "operators; default: all")
    several("--method", methods, methods, "methods of the step")
    several("--peer", known_words(SUITES, "peer"), None, "programs to compare with; default: all")
    several("--dtype", ["fp32", "bf16"], ["fp32", "bf16"], "precisions of the step")
    parser.add_argument("--images", choices=["uint8", "float"], default="uint8", help="of the step")
    parser.add_argument("--rounds", type=int, help="blocks of each program; default: 10")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--compile", action="store_true", help="also time PyTorch's side under torch.compile"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip memory, and save its time")
    parser.add_argument("--smoke", action="store_true", help="all code, no meaningful figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows as JSONL")
    parser.add_argument("--list", action="store_true", help="print suites, shapes and programs")
    options = parser.parse_args()
    if gpu_check.NAME in options.suite:
        if len(options.suite) > 1:
            parser.error(f"--suite: {gpu_check.NAME} times the other suites itself")
        problem = report()["cuda"]["problem"]
        if options.device == "cpu" or problem:
            parser.error(
                f"--suite {gpu_check.NAME} needs a CUDA GPU ({problem or '--device cpu'}): run it "
                "on a machine with one and a CUDA build of torch; `pytest` makes the CPU's checks"
            )
        return options
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: expected at least 1")
    if options.smoke:
        options.shape = options.shape or ["tiny32"]
    options.rounds = options.rounds or (2 if options.smoke else 10)
    for suite in options.suite:
        if options.shape is not None and not set(options.shape) & set(_BY_NAME[suite].SHAPES):
            parser.error(f"--shape: suite {suite} has {','.join(_BY_NAME[suite].SHAPES)}")
    return options


def _rows(asked: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    for name in asked.suite:
        suite = _BY_NAME[name]
        chosen = asked.shape or suite.DEFAULT[device.type]
        options = Options(
            device=device,
            shapes=[shape for shape in suite.SHAPES if shape in chosen],
            methods=asked.method,
            dtypes=asked.dtype,
            models=None,
            batch=None,
            peers=asked.peer,
            operators=asked.op,
            images=asked.images,
            compiled=asked.compile,
            rounds=asked.rounds,
            block_seconds=0.02 if asked.smoke else _BLOCK_SECONDS[device.type],
            memory=not asked.no_memory,
            smoke=asked.smoke,
            say=_say,
        )
        yield from suite.run(options)


def _print_list() -> None:
    for suite in SUITES:
        print("\n".join(suite.describe()))
    print(f"suite {gpu_check.NAME}   the checkout on a GPU: build, tests, compute-sanitizer, times")


def _environment(device: torch.device, smoke: bool) -> dict:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    about = report()
    return dict(
        device=device.type,
        gpu_name=gpu,
        cpu_name=about["cpu"]["model"],
        threads=torch.get_num_threads(),
        **_gpu_state(device),
        torch=torch.__version__,
        triton=about["packages"]["triton"],
        cuda=torch.version.cuda,
        fastmim_version=about["fastmim"]["version"],
        commit=_commit(),
        timestamp=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        smoke=smoke,
    )


# field of the row, of nvidia-smi
_GPU_STATE = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_limit_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def _gpu_state(device: torch.device) -> dict:
    """Driver, clocks and limits at the start; None where nvidia-smi does not tell."""
    state: dict[str, str | None] = dict.fromkeys(_GPU_STATE)
    tool = shutil.which("nvidia-smi")
    if device.type == "cuda" and tool is not None:
        uuid = torch.cuda.get_device_properties(device).uuid
        query = f"--query-gpu={','.join(_GPU_STATE.values())}"
        words = [tool, f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        values = [value.strip() for value in done.stdout.split(",")]
        if len(values) == len(state):
            state = dict(zip(state, values, strict=True))
    return state


def _commit() -> str | None:
    """Short hash, "+changes" if the checkout differs from it; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        folder = Path(__file__).parent
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _print_table(rows: list[dict], columns: list[tuple[str, str, str]]) -> None:
    cells = [[header for header, _, _ in columns]]
    for row in rows:
        saved = row.get("saved_bytes_per_image")
        shown = {
            **row,
            "saved_mb_per_image": None if saved is None else saved / 1e6,
        }
        if "match" in row:
            shown["match"] = "yes" if row["match"] else "NO"
            shown["kept_of"] = f"{row['kept']}/{row['total']}" + ("" if row["quiet"] else " all")
        values = [(shown[key], form) for _, key, form in columns]
        cells.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        # Words to the left, numbers to the right.
        padded = [
            cell.rjust(width) if form else cell.ljust(width)
            for cell, width, (_, _, form) in zip(line, widths, columns, strict=True)
        ]
        print("  ".join(padded).rstrip())


if __name__ == "__main__":
    sys.exit(main())
