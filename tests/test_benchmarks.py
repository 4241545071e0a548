"""benchmarks/run.py: the smoke run is complete and correct; the measures measure."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import benchmark_module

measure, compare, machine, ops, plots, report, rows_of, run, steps, suite = (
    benchmark_module(name)
    for name in (
        "measure",
        "compare",
        "machine",
        "ops",
        "plots",
        "report",
        "rows",
        "run",
        "steps",
        "suite",
    )
)
_ROOT = Path(__file__).parents[1]
_PROGRAM = _ROOT / "benchmarks" / "run.py"
_OF_THE_RUN = {
    "gpu_name", "cpu_name", "threads", "torch", "triton", "cuda", "commit", "driver",
    "sm_clock_mhz", "sm_clock_mhz_end", "copy_gb_per_second", "matmul_bf16_tflops", "timestamp",
    "run", "fastmim_version",
}  # fmt: skip
_TIMED_ROW = {"kept", "total", "quiet", "timed_by", "block_ms", "gb_per_second", "tflops"}
_STEP_ROW = {
    "images_per_second", "saved_bytes_per_image", "peak_memory_gib", "mfu_percent", "method",
    "parts_ms", "model",
}  # fmt: skip
_CHECKOUT = (_ROOT / ".git").exists()


def _run(*words: str, program: Path = _PROGRAM, launch: tuple[str, ...] = ()):
    command = [sys.executable, *launch, str(program), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # of the tests; its times are none
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def test_the_smoke_run_is_complete_and_every_program_matches(tmp_path):
    path, table, pictures = tmp_path / "rows.jsonl", tmp_path / "rows.csv", tmp_path / "pictures"
    words = ["--json", path, "--csv", table, "--plot", pictures, "--dtype", "fp32"]
    done = _run("--smoke", "--device", "cpu", *map(str, words))
    assert done.returncode == 0, done.stderr
    rows = rows_of.read(path)
    assert all(row["match"] for row in rows)
    assert {row["suite"] for row in rows} == {known.NAME for known in run.SUITES}
    for row in rows:
        assert row.keys() >= suite.EVERY_ROW | _OF_THE_RUN, row["suite"]
        assert row["status"] == "ok"
        assert row["suite"] in ("loader", "memory") or row.keys() >= _TIMED_ROW
        assert row["bytes"] > 0 < row["floor_ms"]
    timed = [row for row in rows if row["suite"] == "step"]
    assert {row["method"] for row in timed} >= {"mae", "rc_mae"}
    assert {row["kernel_provider"] for row in timed} >= {"fastmim", "plain"}
    for row in timed:
        assert all(row[field] is not None for field in _STEP_ROW)
    operators = {r["kernel_name"] for r in rows if r["suite"] == "ema"}
    assert operators == {"adamw_ema_", "ema_update_"}
    assert "% of floor" in done.stdout
    with table.open() as file:
        assert [line["suite"] for line in csv.DictReader(file)] == [row["suite"] for row in rows]
    if importlib.util.find_spec("matplotlib"):
        assert (pictures / "operators.png").stat().st_size > 10_000


def test_an_older_row_stands_with_its_own_run_alone():
    def row(program, commit, ms, shape="tiny32", **run):
        case = dict(suite="step", shape=shape, method="mae", kernel_provider=program)
        return dict(**case, commit=commit, y_value_50=ms, **run)

    once = [row("fastmim", "a", 1), row("plain", "a", 2), row("hf", "a", 3)]
    assert rows_of.standing(once) == once
    again = [row("fastmim", "b", 4), row("plain", "b", 5)]
    assert rows_of.standing(once + again) == once + again
    all_again = [*again, row("hf", "b", 6)]
    assert rows_of.standing(once + all_again) == all_again
    assert rows_of.standing([*again, row("plain", "b", 7)])[1]["y_value_50"] == 7
    first, second = (row("plain", "b", ms, run=f"at {ms}") for ms in (7, 8))
    turns = row("fastmim", "b", 9, run="at 7")
    assert rows_of.standing([first, turns, second]) == [first, turns, second]
    elsewhere = row("fastmim", "a", 1, shape="small224")
    assert rows_of.standing([elsewhere, *all_again]) == [elsewhere, *all_again]


def test_without_a_file_named_rows_go_to_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    done = _run("--smoke", "--device", "cpu", "--suite", "ema")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("benchmark-results/*/results.jsonl")
    assert str(path) in done.stdout.splitlines()[-1]
    assert rows_of.read(path)


def test_list_names_suites_shapes_and_programs():
    done = _run("--list")
    assert done.returncode == 0, done.stderr
    words = ("step", "ema", "gpu-check", "scaling", "tiny32", "small224", "plain")
    assert all(word in done.stdout for word in words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "stp"], "unknown suite 'stp'; did you mean step"),
        (["--shape", "tiny33"], "unknown shape 'tiny33'; did you mean tiny32"),
        (["--method", "mea"], "unknown method 'mea'; did you mean mae"),
        (["--model", "mae_vit_bass_patch16"], "did you mean mae_vit_base_patch16"),
        (["--peer", "plian"], "unknown peer 'plian'; did you mean plain"),
        (["--op", "atention"], "unknown op 'atention'; did you mean attention"),
        (["--batch", "64,0"], "expected numbers of images from 1, got '64,0'"),
        (["--suite", "step,ops", "--dtype", "bf16"], "--dtype: suite ops has its own"),
        (["--suite", "ema", "--batch", "8"], "it is for step,memory,distillation,scaling,loader"),
        (["--suite", "ops", "--op", "norm_linaer"], "did you mean norm_linear"),
        (["--suite", "ops", "--compare", "HEAD", "--plot", "."], "its table goes to --json"),
        (["--compa", "HEAD"], "unrecognized arguments: --compa HEAD"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--suite", "ema", "--method", "mae"], "--method: suite ema knows none"),
        (["--suite", "ema", "--shape", "base224"], "--shape: suite ema has tiny32,"),
        (["--suite", "scaling"], "torchrun --nproc-per-node=2 benchmarks/run.py --suite step"),
    ],
)
def test_words_that_are_unknown_or_do_not_fit_are_refused_with_the_remedy(words, said, capsys):
    with pytest.raises(SystemExit) as refused:
        run.parse(words)
    assert refused.value.code == 2
    assert said in capsys.readouterr().err


def test_operators_that_can_be_named_are_those_that_are_timed():
    sizes = ops.SHAPES["tiny32"]._replace(batch=1)
    timed = [problem.operator for problem in ops.problems(sizes, torch.device("cpu"))]
    assert list(dict.fromkeys(timed)) == ops.WORDS["op"]


def test_without_a_suite_those_run_that_know_what_is_asked_for():
    def suites(*words: str) -> list[str]:
        return [suite.NAME for suite in run.parse(words).suite]

    assert suites() == [known.NAME for known in run.SUITES] == suites("--suite", "all")
    assert suites("--op", "ema_update_", "--shape", "base") == ["ema"]
    assert "step" in suites("--method", "sdae")
    assert "ops" not in suites("--method", "sdae")


def test_two_processes_of_torchrun_are_measured_against_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    words = ["--suite", "step", "--method", "rc_mae", "--dtype", "fp32", "--smoke"]
    done = _run(*words, "--device", "cpu", "--json", str(path), launch=launch)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of.read(path)
    assert (row["suite"], row["processes"], row["match"]) == ("scaling", 2, True)
    assert row["images_per_second"] == pytest.approx(2 * row["x_value"] / row["y_value_50"] * 1e3)
    assert row["efficiency"] == pytest.approx(row["alone_ms"] / row["y_value_50"])
    assert 0 <= row["overlap"] <= 1


def test_saved_bytes_count_each_storage_once_without_parameters_and_inputs():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4)

    def forward():
        y = (x @ weight).exp()  # exp keeps y, 8 * 4 * 4 bytes; so do both factors of the product
        return (y * y).sum()

    assert measure.saved_bytes(forward, [weight, x]) == 128


def test_busy_blocks_do_not_count_unless_there_is_no_other():
    busy, quiet = measure.Block([9.0, 9.0], others=0.5), measure.Block([1.0, 2.0, 3.0], others=0.0)
    row = measure.Timing([busy, quiet]).row()
    assert (row["y_value_50"], row["kept"], row["total"], row["quiet"]) == (2000, 3, 5, True)
    row = measure.Timing([busy]).row()
    assert (row["y_value_50"], row["kept"], row["total"], row["quiet"]) == (9000, 0, 2, False)


def test_speedup_compares_within_rounds():
    blocks = [measure.Block([seconds], others=0.0) for seconds in (1.0, 10.0, 100.0)]
    slower = [measure.Block([2 * b.seconds[0]], others=0.0) for b in blocks]
    assert measure.speedup(measure.Timing(blocks), measure.Timing(slower)) == 2.0


@pytest.mark.parametrize(("turns", "ratio"), [(1, 2.0), (2, 0.5)])
def test_programs_that_did_not_take_turns_are_compared_by_medians(turns, ratio):
    mine, other = (
        [measure.Block([seconds], others=0.0) for seconds in times]
        for times in ((1.0, 4.0, 4.0), (2.0, 2.0, 12.0))
    )
    timings = measure.Timing(mine, turns=1), measure.Timing(other, turns=turns)
    assert steps.ratio(*timings) == ratio


CPU = dict(block_seconds=0.0, device=torch.device("cpu"))


@pytest.mark.parametrize("calls_before", [0, 3])
def test_a_program_that_runs_out_of_memory_is_a_row_and_the_others_go_on(calls_before):
    calls = iter(range(100))

    def greedy():
        if next(calls) >= calls_before:
            raise torch.OutOfMemoryError("CUDA out of memory")

    timings = measure.interleave({"greedy": greedy, "modest": lambda: None}, rounds=4, **CPU)
    row = timings["greedy"].row()
    assert (row["status"], row["y_value_50"], row["n"]) == ("oom", None, 0)
    assert row["reason"] == "OutOfMemoryError: CUDA out of memory"
    assert measure.judged(timings["greedy"].lost, 0.0, 1.0) == dict(error=None, match=None)
    assert (timings["modest"].row()["status"], len(timings["modest"].blocks)) == ("ok", 4)
    assert measure.speedup(timings["modest"], timings["greedy"]) is None


def test_any_other_error_is_not_taken_for_a_lack_of_memory():
    def wrong():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    timings = measure.interleave({"wrong": wrong, "right": lambda: None}, rounds=1, **CPU)
    row = timings["wrong"].row()
    assert (row["status"], row["y_value_50"]) == ("failed", None)
    assert row["reason"] == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    assert measure.judged(timings["wrong"].lost, 0.0, 1.0)["match"] is False
    assert len(timings["right"].blocks) == 1


def test_rounds_end_when_their_time_is_over_but_two_are_made():
    timings = measure.interleave({"any": lambda: None}, rounds=50, seconds=0.0, **CPU)
    assert len(timings["any"].blocks) == 2


def _end_by(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_process_that_the_system_ends_has_no_result_and_one_that_crashes_has_failed():
    assert measure.in_fresh_process(dict, [("a", 1)]) == {"a": 1}
    assert measure.in_fresh_process(_end_by, signal.SIGKILL).status == "oom"
    aborted = measure.in_fresh_process(_end_by, signal.SIGABRT)
    assert aborted == measure.Lost("failed", "the process ended with exit status -6")
    limited = measure.in_fresh_process(
        _end_by, signal.SIGABRT, out_of_memory_by=[signal.SIGKILL, signal.SIGABRT]
    )
    assert limited.status == "oom"
    assert measure.in_fresh_process(os._exit, 9).status == "failed"
    assert measure.in_fresh_process(int, "x").reason.startswith("ValueError: invalid literal")


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells no peak")
def test_the_peak_of_a_call_is_what_it_takes_beside_what_was_there():
    kept = torch.ones(2**24)

    def call():
        return (kept + 1).sum()

    for _ in range(2):  # what the first has freed does not hide the second's
        peak = measure.peak_of_call(call, torch.device("cpu"))["peak_memory_gib"] * 2**30
        assert 0.98 * kept.nbytes <= peak <= 1.1 * kept.nbytes


def test_ceilings_are_those_of_the_machine_within_reason():
    ceilings = measure.measure_ceilings(torch.device("cpu"), smoke=True)
    assert 1e8 < ceilings.copy < 1e13
    assert 1e7 < ceilings.matmul["fp32"] < 1e15


def _turns(scale: float, seed: int, blocks: int = 8) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [scale * random.normal(1.0, 0.02, blocks) * random.normal(1.0, 0.01) for _ in range(5)]


def test_the_confidence_of_a_ratio_holds_a_planted_one():
    ratio, low, high = compare.confidence(_turns(1.0, 1), _turns(1.5, 2))
    assert low < 1.5 < high
    assert low < ratio < high
    assert high / low < 1.1


def test_the_confidence_of_equal_programs_is_right_19_times_in_20():
    held = 0
    for seed in range(60):
        _, low, high = compare.confidence(_turns(1.0, 2 * seed), _turns(1.0, 2 * seed + 1))
        held += low <= 1 <= high
    assert held >= 50


def _timed_row(ms: float, **about) -> dict:
    row = dict(suite="ops", kernel_name="norm", kernel_provider="cpp", match=True, status="ok")
    return {**row, "block_ms": [ms, 1.01 * ms, 0.99 * ms], "y_value_50": ms, **about}


def test_compared_rows_are_those_of_both_sides_and_wrong_ones_have_no_time():
    this = [[_timed_row(1.0), _timed_row(1.0, case="other"), _timed_row(1.0, dtype="bf16")]] * 3
    other = [[_timed_row(2.0), _timed_row(2.0, case="other", match=False)]] * 3
    first, second = compare.compared(this, other)
    assert first["ratio"] == pytest.approx(2.0, rel=0.02)
    assert first["verdict"] == "faster"
    assert (second["case"], second.get("ratio")) == ("other", None)


def test_a_comparison_of_which_one_run_broke_off_is_none(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "compare.py"))
    (tmp_path / "run.py").write_text("raise SystemExit(1)")
    with pytest.raises(subprocess.CalledProcessError):
        compare._measured(compare.Side("this", None), [], path)
    (tmp_path / "run.py").write_text("print('\\nwritten: rows')")
    assert compare._measured(compare.Side("this", None), [], path) == [{}]


def test_rows_are_json_that_any_program_reads(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows_of.append(path, dict(error=float("inf"), ratio=float("nan"), ms=1.5))
    assert path.read_text() == '{"error": null, "ratio": null, "ms": 1.5}\n'


def test_the_words_of_compare_itself_are_not_passed_on():
    words = ["--suite", "ema", "--compare", "HEAD", "--json=a", "--turns", "3", "--smoke"]
    assert compare.without(words, ("--compare", "--turns", "--json")) == [
        "--suite", "ema", "--smoke"
    ]  # fmt: skip


@pytest.mark.skipif(not _CHECKOUT, reason="no checkout with commits to compare")
def test_a_commit_is_compared_with_itself(tmp_path):
    path = tmp_path / "ratios.jsonl"
    words = ["--smoke", "--device", "cpu", "--suite", "ema", "--op", "ema_update_"]
    done = _run("--compare", "HEAD", "--turns", "2", *words, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    assert "ema_update_" in done.stdout
    assert "tree" not in machine.git("worktree", "list").split()
    for row in rows_of.read(path):
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["other_commit"] in row["commit"] + machine.git("rev-parse", "HEAD")


def test_a_commit_that_does_not_exist_is_refused():
    done = _run("--compare", "no-such-commit", "--suite", "ema")
    assert done.returncode == 2
    assert "git knows no commit 'no-such-commit'" in done.stderr


def _step_rows() -> list[dict]:
    parts = dict(masks=1.0, encoder=20.0, decoder=30.0, teacher=40.0, backward=90.0, update=5.0)
    return [
        dict(
            suite="step", shape="tiny32", model="mae_vit_micro_patch4", method=method, dtype=dtype,
            kernel_name=f"{method}_step", kernel_provider=program, x_name="batch", x_value=batch,
            y_value_50=186.0, status="ok", match=True, images_per_second=batch / 0.186,
            peak_memory_gib=0.3 + batch / 500, parts_ms=parts, floor_ms=80.0, percent_of_floor=43.0,
        )
        for method in ("mae", "rc_mae")
        for dtype in ("fp32", "bf16")
        for program in ("fastmim", "plain")
        for batch in (16, 64, 256)
    ]  # fmt: skip


def test_pictures_are_drawn_of_what_the_rows_can_tell(tmp_path):
    pytest.importorskip("matplotlib")
    rows = _step_rows()
    assert [p.name for p in plots.draw(rows, tmp_path)] == [
        "throughput.png", "memory.png", "parts.png"
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    oom = [{**row, "status": "oom", "images_per_second": None} for row in rows]
    assert plots.draw(oom, tmp_path) == []


def test_a_table_shows_what_is_wrong_and_what_ran_out_of_memory():
    rows = [
        dict(match=False, status="ok", kept=0, total=3, quiet=False, y_value_50=1.0),
        dict(match=True, status="oom", kept=0, total=0, quiet=False, y_value_50=None),
    ]
    columns = [("ms", "y_value_50", ".2f"), ("match", "match", ""), ("kept", "kept_of", "")]
    assert rows_of.cells(rows, columns) == [["1.00", "NO", "0/3 all"], ["-", "yes", "oom"]]


def test_the_committed_results_are_what_report_makes_of_the_rows():
    suites = [*run.SUITES, *run.APART]
    assert report.PAGE.read_text() == report.render(report.RESULTS, suites), (
        "python benchmarks/run.py report"
    )


def test_measured_and_predicted_stand_apart_and_the_newest_row_counts(tmp_path):
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    about = dict(cpu_name="a CPU", threads=2, torch="2", commit="abc", kept=1, total=1, quiet=True)
    row = dict(
        suite="ema", shape="base", kernel_name="ema_update_", kernel_provider="cuda",
        x_name="parameters", x_value=7, y_value_50=1.0, match=True, status="ok", **about,
    )  # fmt: skip
    lines = [row, {**row, "y_value_50": 2.5}, {**row, "shape": "smoked", "smoke": True}]
    (folder / "2026-01-02.jsonl").write_text("\n".join(map(json.dumps, lines)))
    older = [{**row, "y_value_50": 9.0}, {**row, "shape": "large", "commit": "old"}]
    compared = {**row, "shape": "compared", "other_commit": "old"}
    (folder / "2026-01-01.jsonl").write_text("\n".join(map(json.dumps, [*older, compared])))
    (folder / "notes.jsonl").write_text("no row")
    measured, _, predicted = report.render(tmp_path, run.SUITES).partition("## Predicted")
    assert "| base | ema_update_ | cuda | 7 | 2.50 |" in measured
    assert "| large | ema_update_ | cuda | 7 | 1.00 |" in measured  # the newer file has none
    assert "9.00" not in measured
    assert "smoked" not in measured
    assert "| compared |" not in measured
    assert "H200" not in measured
    assert "RC-MAE" in predicted


def test_what_the_methods_learn_is_part_of_the_results(tmp_path):
    folder = tmp_path / "some-cpu"
    folder.mkdir()
    row = dict(
        suite="learning", method="rc_mae", network="teacher", meant=True, train="a", test="b",
        train_images=90, test_images=100, steps=5, epochs=1, batch_size=18, seed=0, k=20,
        model="vit", cpu_name="a CPU", torch="2", commit="abc", knn_accuracy=0.5,
        linear_accuracy=0.625,
    )  # fmt: skip
    (folder / "2026-01-02.jsonl").write_text(json.dumps(row))
    measured, _, _ = report.render(tmp_path, run.SUITES).partition("## Predicted")
    assert "What the methods learn" in measured
    assert "| RC-MAE | teacher (meant to be used) | 50.0 | 62.5 |" in measured


def test_pinning_takes_one_core_for_each_thread():
    before = os.sched_getaffinity(0)
    try:
        (core,) = machine.pin(1)
        assert os.sched_getaffinity(0) == {core}
        assert machine.pin(len(before) + 1) is None
    finally:
        os.sched_setaffinity(0, before)
