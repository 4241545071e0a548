"""The same run on two commits in turns, A B A B: how many times as fast, with its confidence.

The benchmarks are those of this checkout; only the library is of the other commit, in a temporary
git worktree. Each turn is a process of its own.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import environ, pathsep
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rows as rows_of
from machine import git
from suite import Column

import fastmim

_OWN_OPTIONS = ("--compare", "--turns", "--json", "--csv", "--plot")
_NATIVE = ("csrc", "CMakeLists.txt", "setup.py")  # of which the compiled part is made
_RESAMPLES = 2000
_END = "\nwritten:"  # begins the last line of run.py
# Of the rows of this side, about all.
_ABOUT = ("gpu_name", "cpu_name", "threads", "torch", "triton", "cuda", "commit", "run")
# fmt: off
COLUMNS: list[Column] = [
    ("suite", "suite", ""), ("shape", "shape", ""), ("what", "kernel_name", ""),
    ("program", "kernel_provider", ""), ("dtype", "dtype", ""), ("at", "x_value", ",d"),
    ("this ms", "this_ms", ".3f"), ("other ms", "other_ms", ".3f"),
    ("times as fast", "ratio", ".3f"), ("from", "low", ".3f"), ("to", "high", ".3f"),
    ("verdict", "verdict", ""),
]
# fmt: on


class Side(NamedTuple):
    """One of the two commits.

    Attributes:
        name: this or other.
        folder: Where its library is imported from; None: as it is imported here.
    """

    name: str
    folder: Path | None


def main(
    revision: str,
    words: Sequence[str],
    turns: int,
    json: Path | None,
    table: Path | None,
    say: Callable[[str], None],
) -> int:
    """Measure both, print the ratios and write them; 1 if a run fails.

    Args:
        revision: The other commit.
        words: Of the command line.
        turns: Runs of each side.
        json: File to which the ratios are appended.
        table: File for them as CSV.
        say: Takes a line about progress.
    """
    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        print(f"--compare: git knows no commit '{revision}' in this checkout", file=sys.stderr)
        return 2
    words = without(words, _OWN_OPTIONS)
    with tempfile.TemporaryDirectory() as folder, worktree(commit, Path(folder) / "tree") as tree:
        compiled(tree, commit, say)
        sides = [Side("this", None), Side("other", tree)]
        results: dict[str, list[list[dict]]] = {"this": [], "other": []}
        for turn in range(turns):
            for side in sides:
                say(f"turn {turn + 1} of {turns}: {side.name}")
                path = Path(folder) / f"{side.name}-{turn}.jsonl"
                try:
                    results[side.name].append(_measured(side, words, path))
                except subprocess.CalledProcessError as error:
                    print(f"{side.name} ({error.returncode}): {error.stderr}", file=sys.stderr)
                    return 1
    ratios = compared(results["this"], results["other"])
    print(f"\nthis checkout against {commit[:10]}, {turns} turns each; 95 % by bootstrap")
    print(rows_of.text(ratios, COLUMNS))
    about = {field: results["this"][0][0].get(field) for field in _ABOUT}
    ratios = [{**about, "other_commit": commit[:10], "turns": turns, **row} for row in ratios]
    if json is not None:
        for row in ratios:
            rows_of.append(json, row)
    if table is not None:
        rows_of.write_csv(table, ratios)
    return 0


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The words of a command line but these options and their values."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, for a while."""
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        kernels = folder / "fastmim" / "kernels"
        if not kernels.exists():
            kernels.symlink_to(Path("..") / "kernels")
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def compiled(tree: Path, commit: str, say: Callable[[str], None]) -> None:
    """Give a worktree what is compiled here: this very one if its sources are the same."""
    libraries = list(Path(fastmim.__file__).parent.glob("*.so"))
    if not libraries:
        say("nothing is compiled here, so nothing is compiled for the other commit")
        return
    root = Path(__file__).parents[1]
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", *_NATIVE], cwd=root)
    if same.returncode == 0:
        for library in libraries:
            shutil.copy(library, tree / "fastmim")
        return
    say("compiling the other commit")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)


def _measured(side: Side, words: Sequence[str], path: Path) -> list[dict]:
    """The rows of one turn. A program that does not match is a row, not a failure."""
    program = Path(__file__).with_name("run.py")
    search = filter(None, [side.folder and str(side.folder), environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, str(program), *words, "--json", str(path)],
        env={**environ, "PYTHONPATH": pathsep.join(search)},
        capture_output=True,
        text=True,
        check=False,
    )
    if not path.exists() or _END not in done.stdout:  # a run that broke off has only some rows
        raise subprocess.CalledProcessError(done.returncode, program, stderr=done.stderr)
    return rows_of.read(path)


def compared(this: list[list[dict]], other: list[list[dict]]) -> list[dict]:
    """A row for each program that both have measured in every turn.

    Args:
        this: The rows of each turn.
        other: The same of the other commit.
    """
    turns = list(zip(map(rows_of.keyed, this), map(rows_of.keyed, other), strict=True))
    return [
        _ratio(turns[0][0][key], [(a[key], b[key]) for a, b in turns])
        for key in turns[0][0]
        if all(key in side for turn in turns for side in turn)
    ]


def _ratio(about: dict, pairs: list[tuple[dict, dict]]) -> dict:
    row = {field: about.get(field) for field in rows_of.KEY}
    if not all(_has_time(side) for pair in pairs for side in pair):
        return {**row, "verdict": "no time: wrong, lost, or of memory alone"}
    ours, theirs = (
        [np.array(side["block_ms"]) for side in sides] for sides in zip(*pairs, strict=True)
    )
    ratio, low, high = confidence(ours, theirs)
    return {
        **row,
        "this_ms": float(np.median(np.concatenate(ours))),
        "other_ms": float(np.median(np.concatenate(theirs))),
        "ratio": ratio,
        "low": low,
        "high": high,
        "verdict": "faster" if low > 1 else "slower" if high < 1 else "no difference",
    }


def _has_time(row: dict) -> bool:
    return row["match"] is not False and bool(row.get("block_ms"))


def confidence(this: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float, float]:
    """How many times as fast this is, and between which values with 95 % confidence.

    The median over turns of the ratio of medians over blocks. Turns are drawn anew, and blocks
    within them: both vary, and turns more.

    Args:
        this: For each turn the times of its blocks.
        other: The same of the other commit.
    """
    random = np.random.default_rng(0)

    def medians(blocks: np.ndarray) -> np.ndarray:
        drawn = random.integers(len(blocks), size=(_RESAMPLES, len(blocks)))
        return np.median(blocks[drawn], axis=1)

    logs = np.stack(
        [np.log(medians(b) / medians(a)) for a, b in zip(this, other, strict=True)], axis=1
    )
    turns = random.integers(len(this), size=logs.shape)
    drawn = np.median(np.take_along_axis(logs, turns, axis=1), axis=1)
    point = np.median(
        [np.log(np.median(b) / np.median(a)) for a, b in zip(this, other, strict=True)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.exp(point)), float(np.exp(low)), float(np.exp(high))
