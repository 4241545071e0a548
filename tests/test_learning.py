"""benchmarks/learning.py: every network gets a row, and the table says what the rows say."""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

from tests.training import MODELS

_FILE = Path(__file__).parent.parent / "benchmarks" / "learning.py"


@pytest.fixture(scope="module")
def learning():
    spec = importlib.util.spec_from_file_location("learning", _FILE)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def rows(learning, tmp_path_factory):
    """Of one epoch of the smallest network on the digits, by MAE and RC-MAE."""
    folder = tmp_path_factory.mktemp("learning")
    out = folder / "rows.jsonl"
    words = f"--train digits --test digits --epochs 1 --runs {folder} --json {out}"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setitem(MODELS, "mae_nano", MODELS["nano"])
        for method in ("mae", "rc_mae"):
            patch.setitem(learning._CHANGES, method, dict(model="mae_nano", batch_size=256))
        for chosen in ("rc_mae", "mae --probe-at 0.5"):
            patch.setattr(sys, "argv", ["learning.py", *f"{words} --methods {chosen}".split()])
            learning.main()
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert learning.table(found[2:]) in said.getvalue()
    return found


def test_every_network_has_a_row(learning, rows):
    assert [(row["method"], row["network"], row["meant"], row.get("share")) for row in rows] == [
        ("rc_mae", "student", False, 1),
        ("rc_mae", "teacher", True, 1),
        ("mae", "student", True, 0.5),
        ("mae", "student", True, 1),
        (None, "untrained", False, None),
        (None, "raw pixels", False, None),
    ]
    assert {(row["steps"], row["train_images"], row["suite"]) for row in rows} == {
        (7, 1797, "learning")
    }
    pixels = rows[-1]
    assert pixels["knn_accuracy"] > 0.9  # the digits are told by their pixels
    assert pixels["linear_accuracy"] > 0.9
    assert set(pixels["linear_held_out"]) > {f"{pixels['linear_lr']:g}"}


def test_the_table_has_the_newest_row_of_a_network_in_the_order_of_the_papers(learning, rows):
    again = {**rows[3], "knn_accuracy": 0.123, "linear_accuracy": 0.9876}
    lines = learning.table([*rows, again]).splitlines()
    assert "7 steps of 256 images (1 epochs)" in lines[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [tuple(row[:2]) for row in cells] == [
        ("MAE", "student (meant to be used) after 50%"),
        ("MAE", "student (meant to be used)"),
        ("RC-MAE", "teacher (meant to be used)"),
        ("RC-MAE", "student"),
        ("-", "untrained"),
        ("-", "raw pixels"),
    ]
    assert cells[1][2:] == ["12.3", "98.8"]
    for line, row in ((0, 2), (5, 5)):
        assert cells[line][2:] == [
            f"{100 * rows[row][f'{kind}_accuracy']:.1f}" for kind in ("knn", "linear")
        ]


def test_other_runs_have_tables_of_their_own(learning, rows):
    longer = [{**row, "steps": 14, "epochs": 2} for row in rows]
    assert learning.table(rows + longer).count("| method |") == 2
    assert learning.table([{"suite": "ops"}]) == ""


def test_dbot_has_two_stages_and_all_methods_as_many_steps(learning, tmp_path, monkeypatch):
    words = f"learning.py --train digits --test digits --epochs 4 --runs {tmp_path}".split()
    runs = []
    monkeypatch.setattr(learning, "_rows", lambda options: runs.append(options) or ())
    monkeypatch.setattr(sys, "argv", words)
    learning.main()
    configs = [learning.run_of(method, runs[0]) for method in runs[0].methods]
    assert [config.method for config in configs] == ["mae", "rc_mae", "dbot", "sdae"]
    assert {(c.recipe.epochs, c.recipe.batch_size, c.recipe.lr) for c in configs} == {(4, 64, 1e-3)}
    assert [len(config.recipe.stages) for config in configs] == [1, 1, 2, 1]
