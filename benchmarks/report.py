"""``run.py report``: docs/results.md out of the rows under benchmarks/results.

What was measured and what is predicted stand under headings of their own and are never mixed.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import rows as rows_of
from roofline import H200, METHODS, saved_bytes_per_image, step_parts, step_total
from suite import Column, Suite

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_HEAD = """\
# Results

Made by `python benchmarks/run.py report` out of the rows in `benchmarks/results/`; do not edit it.
Medians of interleaved rounds; `kept` 0 of a row says that the machine was busy with other things
and that its times are no finding. "% of floor" is the least time that bytes and FLOPs allow at the
rates this very machine reached in the same run. Columns are explained in `benchmarks/README.md`.
"""
_PREDICTED = """\
## Predicted, not measured

By `benchmarks/roofline.py`, for one H200 with 4.3 TB/s of copy and 790 TFLOP/s of bf16 products
(both measured on such a card): the least time of a step in bf16 with a residual stream of fp32,
visible patches embedded and masked ones predicted. No training step was timed to make this table.
"""
_NAMES = {"mae": "MAE", "rc_mae": "RC-MAE", "dbot": "dBOT", "sdae": "SdAE"}
_MODELS = {"B/16": "base_patch16", "L/16": "large_patch16", "H/14": "huge_patch14"}
_BATCH = 256
# fmt: off
_FLOORS: list[Column] = [
    ("ViT", "model", ""), ("method", "method", ""), ("batch", "batch", "d"),
    ("TFLOP", "tflop", ".1f"), ("GB", "gb", ".0f"), ("floor ms", "floor", ".1f"),
    ("images/s at the floor", "rate", ",.0f"), ("at 80 % of it", "aim", ",.0f"),
    ("saved MB/image, lean", "saved", ".0f"),
]
# fmt: on


def write_report(words: Sequence[str], suites: Sequence[Suite]) -> int:
    """Write the page; 1 if it was only to be checked and differs."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    asked = parser.parse_args(words)
    if not asked.results.is_dir():
        parser.error(f"--results: {asked.results} is no folder")
    page = render(asked.results, suites)
    if asked.check:
        return int(not asked.page.exists() or asked.page.read_text() != page)
    asked.page.write_text(page)
    return 0


def render(results: Path, suites: Sequence[Suite]) -> str:
    """The page.

    Args:
        results: Folder of folders named after machines, with files named after dates.
        suites: Whose columns are shown, in order.
    """
    parts = [_HEAD, "## Measured\n"]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        dated = [path for path in sorted(folder.glob("*.jsonl")) if _DATE.fullmatch(path.stem)]
        if dated:
            parts += _machine(folder.name, dated, suites)
    parts += [_PREDICTED, rows_of.markdown(list(_floors()), _FLOORS) + "\n"]
    return "\n".join(parts)


def _machine(name: str, dated: Sequence[Path], suites: Sequence[Suite]) -> Iterator[str]:
    """What the files of a machine say, of which the latest word on every case counts."""
    rows = [row for path in dated for row in rows_of.read(path) if not row.get("smoke")]
    rows = [row for row in rows if "other_commit" not in row]  # comparisons
    yield f"### {name}, {' and '.join(path.stem for path in dated)}\n"
    for suite in suites:
        of_suite = rows_of.standing([row for row in rows if row["suite"] == suite.NAME])
        if of_suite:
            yield f"#### {suite.NAME}\n"
            yield _about(of_suite) + "\n"
            yield rows_of.markdown(of_suite, [*suite.COLUMNS, *_runs(of_suite)]) + "\n"
    learning = [row for row in rows if row["suite"] == "learning"]
    if learning:
        from learning import table  # sets how threads wait, which must not touch timings

        yield "#### What the methods learn\n"
        yield table(learning) + "\n"


def _runs(rows: list[dict]) -> list[Column]:
    """A column for the run of a row, if there are several: times of two are not comparable."""
    several = len({row.get("run", row.get("commit")) for row in rows}) > 1
    return [("run of commit", "commit", "")] if several else []


def _about(rows: list[dict]) -> str:
    """Machine, versions and commits of some rows, and how quiet it was."""

    def all_of(field: str) -> str:
        return ", ".join(dict.fromkeys(str(row[field]) for row in rows if row.get(field)))

    busy = sum(row.get("quiet") is False for row in rows if row.get("status", "ok") == "ok")
    machine = all_of("gpu_name") or f"{all_of('cpu_name')}, {all_of('threads')} threads"
    words = [machine, f"torch {all_of('torch')}", f"commit {all_of('commit')}"]
    if all_of("copy_gb_per_second"):
        words.append(f"copy {_rates(rows, 'copy_gb_per_second')} GB/s")
        words += [
            f"{dtype} product {_rates(rows, f'matmul_{dtype}_tflops')} TFLOP/s"
            for dtype in ("fp32", "bf16")
        ]
    if busy:
        words.append(f"**{busy} of {len(rows)} rows on a busy machine**")
    return ", ".join(words) + "."


def _rates(rows: list[dict], field: str) -> str:
    values = [row[field] for row in rows if row.get(field)]
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _floors() -> Iterator[dict]:
    for model, size in _MODELS.items():
        for method in METHODS:
            name = f"{'mae' if method == 'rc_mae' else method}_vit_{size}"
            total = step_total(step_parts(name, method, _BATCH, "bf16"), H200, "bf16")
            yield dict(
                model=model,
                method=_NAMES[method],
                batch=_BATCH,
                tflop=total.flops / 1e12,
                gb=total.bytes / 1e9,
                floor=1e3 * total.floor,
                rate=_BATCH / total.floor,
                aim=0.8 * _BATCH / total.floor,
                saved=saved_bytes_per_image(name) / 1e6,
            )
