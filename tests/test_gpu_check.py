"""The suite gpu-check as far as it goes without a GPU: its stages, and how it reads them."""

import ast
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SANITIZED = "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: {} errors"


@pytest.fixture(scope="module")
def modules():
    """Of the folder benchmarks, which is no package."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu_check"), importlib.import_module("stages")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in {"gpu_check", "stages"} - before:
        del sys.modules[name]


@pytest.fixture
def run_stages(modules):
    """Runs stages; returns their rows."""

    def run(stages: list, seconds: float = 60) -> dict[str, dict]:
        rows = list(modules[1].run_stages(stages, seconds=seconds, say=lambda text: None))
        assert json.loads(json.dumps(rows)) == rows
        return {row["stage"]: row for row in rows}

    return run


def python(stages, name: str, program: str, **about):
    return stages.Stage(
        name, [sys.executable, "-c", program], **{"budget": 30, "least": 1, **about}
    )


def test_a_stage_that_hangs_is_cut_off_and_the_next_one_runs(modules, run_stages):
    _, stages = modules
    start = time.monotonic()
    rows = run_stages(
        [
            python(stages, "hangs", "import time; time.sleep(60)", budget=1),
            python(stages, "works", ""),
        ]
    )
    assert time.monotonic() - start < 30
    assert rows["hangs"]["status"] == "timed out"
    assert rows["works"]["status"] == "passed"


def test_what_ignores_the_interrupt_is_killed_with_its_children(modules, run_stages):
    _, stages = modules
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    start = time.monotonic()
    assert run_stages([python(stages, "deaf", program, budget=2)])["deaf"]["status"] == "timed out"
    assert time.monotonic() - start < 30


def test_stages_without_time_are_left_out_and_later_ones_keep_theirs(modules, run_stages):
    _, stages = modules
    rows = run_stages(
        [
            python(stages, "too long", "", budget=60, least=50),
            python(stages, "long", "import time; time.sleep(60)", budget=60),
            python(stages, "short", "", least=16),
        ],
        seconds=20,
    )
    assert rows["too long"]["status"] == "left out"
    assert "it needs 50" in rows["too long"]["reason"]
    assert rows["long"]["status"] == "timed out"
    assert rows["long"]["seconds"] < 15
    assert rows["short"]["status"] == "passed"


def test_a_failed_stage_shows_its_last_words_and_stops_those_that_need_it(modules, run_stages):
    _, stages = modules
    rows = run_stages(
        [
            python(stages, "build", "raise SystemExit('no compiler')"),
            python(stages, "tests", "", needs="build"),
            stages.Stage("absent", ["/nonexistent/tool"], budget=9, least=1),
        ]
    )
    assert (rows["build"]["status"], rows["build"]["failures"]) == ("failed", ["no compiler"])
    assert rows["tests"]["status"] == "left out"
    assert "no compiler" not in rows["tests"]["reason"]
    assert rows["absent"]["status"] == "failed"
    assert "/nonexistent/tool" in rows["absent"]["failures"][0]


def test_a_failing_test_is_counted_and_named(modules, run_stages, tmp_path):
    gpu_check, _ = modules
    (tmp_path / "empty").mkdir()
    file = tmp_path / "test_planted.py"
    file.write_text(
        "import fastmim.ops, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_skipped(): pytest.skip('no reason')\n"
    )
    about = dict(budget=60, least=1, folder=tmp_path / "empty", variables={"PYTHONPATH": str(ROOT)})
    stage = gpu_check.run_of_tests("planted", [file], **about)
    row = run_stages([stage])["planted"]
    assert row["status"] == "failed"
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 1, 1)
    assert [name.rpartition("::")[2] for name in row["failures"]] == ["test_bad"]
    stage = gpu_check.run_of_tests("gone", [tmp_path / "test_gone.py"], **about)
    assert run_stages([stage])["gone"]["status"] == "failed"


def test_an_interrupted_run_of_tests_reports_what_it_knows(modules, run_stages, tmp_path):
    gpu_check, _ = modules
    (tmp_path / "empty").mkdir()
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_good(): pass\ndef test_slow(): time.sleep(60)\n")
    about = dict(budget=30, least=1, folder=tmp_path / "empty")
    row = run_stages([gpu_check.run_of_tests("slow", [file], **about)])["slow"]
    assert row["status"] == "timed out"
    assert (row["passed"], row["failed"]) == (1, 0)
    assert row["failures"] == [f"{file}:3: KeyboardInterrupt"]


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (9, SANITIZED.format(3), "failed"),
        (1, "1 failed\n========= ERROR SUMMARY: 0 errors", "failed"),
        (0, "no tool was here", "failed"),
    ],
)
def test_the_sanitizers_summary_decides(modules, status, output, verdict):
    result = modules[0].by_sanitizer(status, output)
    assert result.status == verdict
    if verdict == "failed":
        assert result.reason
        assert result.failures


def test_a_sanitizer_that_finds_no_planted_fault_is_not_asked_again(modules, run_stages):
    gpu_check, stages = modules
    assert gpu_check.by_planted_fault(9, SANITIZED.format(1)).status == "passed"
    probe = stages.Stage("probe", ["/none"], budget=9, least=1, judge=gpu_check.by_planted_fault)
    rows = run_stages([probe, python(stages, "memcheck", "", needs="probe")])
    assert {row["status"] for row in rows.values()} == {"skipped"}
    assert "/none" in rows["memcheck"]["reason"]


def test_the_plan_builds_for_the_gpu_at_hand_and_fits_into_its_time(modules, monkeypatch, tmp_path):
    gpu_check, _ = modules
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plan = gpu_check.plan(tmp_path, tmp_path / "rows.jsonl", torch.device("cuda"))
    build, *others = plan
    assert build.variables["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert {"test_ops", "test_gpu", "memcheck", "time ops", "time ema"} <= {s.name for s in others}
    for stage in others:
        assert stage.variables["PYTHONPATH"].startswith(str(tmp_path / "library"))
        assert stage.needs in ("build", "compute-sanitizer")
        assert not list(stage.folder.iterdir())
    assert sum(stage.least for stage in plan) < gpu_check.SECONDS < 9 * 60


def asks_for_the_gpu(source: str) -> bool:
    """Whether a file of tests has some that are others, or more, where there is a GPU."""
    nodes = list(ast.walk(ast.parse(source)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return (
        bool({"needs_cuda", "DEVICE"} & names)
        or any(ast.unparse(node) == "conftest.DEVICE" for node in nodes)
        or any(
            argument.arg == "device" for f in functions if is_test(f) for argument in f.args.args
        )
    )


def is_test(function: ast.FunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return function.name.startswith("test_") or any("fixture" in d for d in decorators)


@pytest.mark.parametrize(
    ("source", "asks"),
    [
        ("def test_any(backend, device): pass", True),
        ("@pytest.fixture\ndef batch(device): pass", True),
        ("@needs_cuda\ndef test_any(): pass", True),
        ("from tests.conftest import DEVICE\nx = torch.zeros(2, device=DEVICE)", True),
        ("def usable(device): pass\ndef test_any(): usable(torch.device('cpu'))", False),
    ],
)
def test_a_file_that_asks_for_the_gpu_is_recognised(source, asks):
    assert asks_for_the_gpu(source) == asks


def test_every_test_of_the_gpu_has_a_stage_or_a_reason(modules):
    gpu_check, _ = modules
    stages = [file for files, _ in gpu_check.TESTS.values() for file in files]
    named = [*stages, *gpu_check.TESTS_LEFT_OUT]
    assert len(named) == len(set(named))
    ask = {f.name for f in (ROOT / "tests").glob("*.py") if asks_for_the_gpu(f.read_text())}
    # They define the device and serve the others.
    assert ask - {"conftest.py", "operators.py"} == set(named)


def test_files_are_run_as_they_are_named(modules, monkeypatch, tmp_path):
    gpu_check, _ = modules
    monkeypatch.setattr(gpu_check, "missing_kernels", lambda device: None)
    plan = gpu_check.plan(tmp_path, tmp_path / "rows.jsonl", torch.device("cuda"))
    for name, (files, _) in gpu_check.TESTS.items():
        (stage,) = [stage for stage in plan if stage.name == name]
        run = [Path(word) for word in stage.command if word.endswith(".py")]
        assert run == [ROOT / "tests" / file for file in files]
    assert [stage.name for stage in plan][: len(gpu_check.TESTS)] == list(gpu_check.TESTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "said"), [([], "needs a CUDA GPU"), (["--suite", "gpu-check,ops"], "times the other")]
)
def test_the_suite_refuses_and_names_the_remedy(words, said):
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--suite", "gpu-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert said in done.stderr
