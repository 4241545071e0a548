"""Rows of results: JSONL and CSV files, and tables for a terminal or a page."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from suite import Column

# What a row is about: rows that agree in these measured the same thing.
KEY = (
    *("suite", "shape", "kernel_name", "kernel_provider", "kernel_operation_mode"),
    *("method", "model", "case", "dtype", "images", "x_name", "x_value", "processes", "stage"),
)


def keyed(rows: Iterable[dict]) -> dict[tuple, dict]:
    """Rows by what they are about; the last one of each counts."""
    return {tuple(row.get(field) for field in KEY): row for row in rows}


def standing(rows: Sequence[dict]) -> list[dict]:
    """The latest rows of every case; an older one brings along those of its own run.

    Two runs are two hours of a machine: a row is compared with those of its own run alone.

    Args:
        rows: In the order of time.
    """
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        case = [row.get(field) for field in ("suite", "shape", "method")]
        runs.setdefault((*case, row.get("run", row.get("commit"))), []).append(row)
    kept: set[int] = set()
    seen: set[tuple] = set()
    for run in reversed(runs.values()):
        latest = keyed(run)
        if not latest.keys() <= seen:
            kept |= {id(row) for row in latest.values()}
        seen |= latest.keys()
    return [row for row in rows if id(row) in kept]


def append(path: Path, row: dict) -> None:
    """Add a row to a JSONL file; it is there even if the next one fails.

    JSON knows no infinity and no NaN: an error that is none is None beside a false ``match``.
    """
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    with path.open("a") as out:
        print(json.dumps(known, allow_nan=False), file=out)


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """All rows under the union of their fields; lists and the like as JSON."""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with path.open("w", newline="") as out:
        table = csv.DictWriter(out, fields)
        table.writeheader()
        for row in rows:
            table.writerow(
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
            )


def text(rows: Sequence[dict], columns: Sequence[Column]) -> str:
    """A table for a terminal: words to the left, numbers to the right."""
    lines = [[header for header, _, _ in columns], *cells(rows, columns)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if form else cell.ljust(width)
            for cell, width, (_, _, form) in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[dict], columns: Sequence[Column]) -> str:
    """A table for a page, without the columns in which no row has anything."""
    shown = [c for c in columns if any(_shown(row).get(c[1]) is not None for row in rows)]
    lines = [
        [header for header, _, _ in shown],
        ["---:" if form else "---" for _, _, form in shown],
        *cells(rows, shown),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(rows: Iterable[dict], columns: Sequence[Column]) -> list[list[str]]:
    """What each row says in each column; "-" where it says nothing."""
    return [[_cell(_shown(row).get(key), form) for _, key, form in columns] for row in rows]


def _cell(value: object, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shown(row: dict) -> dict:
    """A row with what is computed for the eye."""
    shown = dict(row)
    saved = row.get("saved_bytes_per_image")
    shown["saved_mb_per_image"] = None if saved is None else saved / 1e6
    peak = row.get("peak_memory_gib")
    shown["peak_mb"] = None if peak is None else peak * 2**30 / 1e6
    if row.get("match") is not None:
        shown["match"] = "yes" if row["match"] else "NO"
    if row.get("status") not in (None, "ok"):
        shown["kept_of"] = row["status"]
    elif row.get("kept") is not None:
        shown["kept_of"] = f"{row['kept']}/{row['total']}" + ("" if row["quiet"] else " all")
    return shown
