"""benchmarks/run.py: the smoke run is complete and correct; the measures measure."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_FOLDER = Path(__file__).parent.parent / "benchmarks"
_EVERY_ROW = {
    "suite", "shape", "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name",
    "x_name", "x_value", "y_value_20", "y_value_50", "y_value_80", "n", "kept", "total", "quiet",
    "match", "dtype", "vs_peer", "gpu_name", "cpu_name", "threads", "torch", "triton", "commit",
    "timestamp", "fastmim_version",
}  # fmt: skip
_STEP_ROW = {"images_per_second", "saved_bytes_per_image", "peak_memory_gib", "vs_fp32", "method"}


def _run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(_FOLDER / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("measure", _FOLDER / "measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["measure"]


def test_the_smoke_run_is_complete_and_every_program_matches(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = _run("--smoke", "--device", "cpu", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["match"] for row in rows)
    assert all(row.keys() >= _EVERY_ROW for row in rows)
    steps = [row for row in rows if row["suite"] == "step"]
    assert {(r["method"], r["kernel_provider"], r["dtype"]) for r in steps} == {
        (method, program, dtype)
        for method in ("mae", "rc_mae")
        for program in ("fastmim", "plain")
        for dtype in ("fp32", "bf16")
    }
    for row in steps:
        assert all(row[field] is not None for field in _STEP_ROW)
    operators = {r["kernel_name"] for r in rows if r["suite"] == "ema"}
    assert operators == {"adamw_ema_", "ema_update_", "copy"}
    assert "vs plain" in done.stdout
    assert "% of copy" in done.stdout


def test_list_names_suites_shapes_and_programs():
    done = _run("--list")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("step", "ema", "tiny32", "small224", "plain"))


def test_an_unknown_shape_is_named_with_the_known_ones():
    done = _run("--shape", "tiny33")
    assert done.returncode == 2
    assert "tiny33" in done.stderr
    assert "tiny32" in done.stderr


def test_saved_bytes_count_each_storage_once_without_parameters_and_inputs(measure):
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4)

    def forward():
        y = (x @ weight).exp()  # exp keeps y, 8 * 4 * 4 bytes; so do both factors of the product
        return (y * y).sum()

    assert measure.saved_bytes(forward, [weight, x]) == 128


def test_busy_blocks_do_not_count_unless_there_is_no_other(measure):
    busy, quiet = measure.Block([9.0, 9.0], others=0.5), measure.Block([1.0, 2.0, 3.0], others=0.0)
    row = measure.Timing([busy, quiet]).row()
    assert (row["y_value_50"], row["kept"], row["total"], row["quiet"]) == (2000, 3, 5, True)
    row = measure.Timing([busy]).row()
    assert (row["y_value_50"], row["kept"], row["total"], row["quiet"]) == (9000, 0, 2, False)


def test_speedup_compares_within_rounds(measure):
    blocks = [measure.Block([seconds], others=0.0) for seconds in (1.0, 10.0, 100.0)]
    slower = [measure.Block([2 * b.seconds[0]], others=0.0) for b in blocks]
    assert measure.speedup(measure.Timing(blocks), measure.Timing(slower)) == 2.0
