"""Whole runs: what they leave, and that no interruption changes the result by a bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fastmim.cli import main
from fastmim.train import Engine, NonFiniteError, Trainer
from fastmim.train.checkpoint import CheckpointError
from tests import accuracy
from tests.training import (
    Command,
    arguments,
    die_in_save,
    metrics,
    pretrain,
    recipe,
    refuse_large_files,
    saved_bytes,
    slow_steps,
    write_images,
)

KILLS = int(os.environ.get("FASTMIM_TEST_KILLS", "10"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    outcome = Trainer(pretrain(folder)).run()
    assert outcome == (folder / "run", 28, True, None, True)
    return folder / "run"


def assert_same_run(folder: Path, unbroken: Path) -> None:
    got, expected = saved_bytes(folder), saved_bytes(unbroken)
    assert [n for n in expected if got.get(n) != expected[n]] == []  # a diff of bytes takes minutes
    assert got.keys() == expected.keys()
    assert metrics(folder) == metrics(unbroken)


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def damage(checkpoint: Path) -> None:
    file = checkpoint / "teacher.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def fail_at(monkeypatch, steps, spoil) -> None:
    """Call ``spoil(engine)`` before these optimizer steps, counted from 0."""
    run_step = Engine.run_step

    def spoilt(engine, step, *args):
        if step in steps:
            spoil(engine)
        return run_step(engine, step, *args)

    monkeypatch.setattr(Engine, "run_step", spoilt)


def infinite_gradient(engine: Engine) -> None:
    weight = engine.method.student.decoder_pred.weight
    hook = weight.register_hook(lambda grad: hook.remove() or torch.full_like(grad, float("inf")))


def test_run_leaves_checkpoints_metrics_config_and_pictures(tmp_path, capsys):
    Trainer(pretrain(tmp_path, output={"pictures": 2})).run()
    run = tmp_path / "run"
    files = sorted(path.name for path in run.iterdir() if path.name != ".lock")
    assert files == [
        "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "reconstruction.png",
    ]  # fmt: skip
    assert checkpoint_names(run) == ["step-00000025", "step-00000028"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24, 28]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["epoch"] == 4
    assert lines[-1].keys() == {
        "step", "epoch", "loss", "pixel", "consistency", "lr", "momentum", "grad_norm",
        "skipped_steps", "images_per_second", "data_wait", "teacher_time", "peak_memory_gib",
        "seconds",
    }  # fmt: skip
    printed = capsys.readouterr().err
    assert "28 steps of 256 images (4 epochs)" in printed
    assert "step 1/28" in printed
    assert "step 28/28" in printed


def test_run_can_be_told_where_to_stop(tmp_path, unbroken):
    for stop in (3, 6, 17, 17):
        outcome = Trainer(pretrain(tmp_path, stop_after=stop)).run()
        assert outcome == (tmp_path / "run", stop, False, None, True)
    assert Trainer(pretrain(tmp_path)).run().finished
    assert_same_run(tmp_path / "run", unbroken)


def test_method_without_teacher(tmp_path):
    for stop in (9, None):
        Trainer(pretrain(tmp_path, method="mae", stop_after=stop)).run()
    assert saved_bytes(tmp_path / "run").keys() == {
        "newest", "student.safetensors", "optimizer.safetensors",
    }  # fmt: skip
    assert [line["momentum"] for line in metrics(tmp_path / "run")] == [None] * 7


@pytest.mark.parametrize("efficiency", [{"workers": 2}, {"workers": 1, "micro_batch": 256}])
def test_loading_processes_change_nothing(tmp_path, unbroken, efficiency):
    Trainer(pretrain(tmp_path, efficiency=efficiency)).run()
    assert_same_run(tmp_path / "run", unbroken)


def test_compiled_run_resumes_exactly_and_is_the_run(tmp_path, unbroken):
    torch.compiler.reset()
    config = partial(pretrain, efficiency={"compile": True})
    assert Trainer(config(tmp_path / "a")).run().finished
    for stop in (10, None):
        Trainer(config(tmp_path / "b", stop_after=stop)).run()
    run = tmp_path / "a" / "run"
    assert_same_run(tmp_path / "b" / "run", run)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (run, unbroken)]
    accuracy.run(*losses, torch.float32)


def test_micro_batch_of_more_than_a_step_is_the_step(tmp_path, unbroken):
    Trainer(pretrain(tmp_path, efficiency={"micro_batch": 300})).run()
    assert_same_run(tmp_path / "run", unbroken)


def test_compiler_that_is_missing_is_told_at_the_start(tmp_path):
    absent = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    words = ["pretrain", "--efficiency.compile=true", "--efficiency.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "fastmim", *words, f"--output.folder={tmp_path / 'runs'}"],
        env={**os.environ, **absent},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert re.search(r"efficiency.compile: .*nonexistent.*needs a C\+\+ compiler", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_micro_batch_may_change_at_a_resumption(tmp_path, unbroken):
    for micro_batch, stop in ((64, 10), (128, None)):
        config = pretrain(tmp_path, efficiency={"micro_batch": micro_batch}, stop_after=stop)
        Trainer(config).run()
    losses = [[line["loss"] for line in metrics(run)] for run in (tmp_path / "run", unbroken)]
    accuracy.run(*losses, torch.float32)


def test_official_teacher_depends_on_the_micro_batch_so_it_may_not_change(tmp_path):
    config = partial(pretrain, tmp_path, recipe=recipe(momentum_schedule="official"))
    Trainer(config(stop_after=1)).run()
    with pytest.raises(
        CheckpointError, match=r"differ in\n  micro_batch: checkpoint 256, run 64\n"
    ):
        Trainer(config(efficiency={"micro_batch": 64}))
    Trainer(config(efficiency={"micro_batch": 256}))


def test_trainer_writes_nothing_before_it_runs(tmp_path):
    Trainer(pretrain(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_killed_at_any_instant_it_ends_as_the_unbroken_run(tmp_path, unbroken):
    draw = random.Random(0)
    assert Command(["presets"], tmp_path / "log").finish() == 0  # the server starts
    begin = time.perf_counter()
    assert Command(arguments(tmp_path / "whole"), tmp_path / "log").finish() == 0
    whole = time.perf_counter() - begin
    assert_same_run(tmp_path / "whole" / "run", unbroken)
    kills = runs = 0
    while kills < KILLS:
        status = None
        while status != 0:
            command = Command(arguments(tmp_path / f"{runs}"), tmp_path / "log")
            if kills < KILLS:
                time.sleep(draw.uniform(0, whole))
                command.signal(signal.SIGKILL)
            status = command.finish()
            assert status in (0, -signal.SIGKILL), command.printed()
            kills += status != 0
        assert_same_run(tmp_path / f"{runs}" / "run", unbroken)
        shutil.rmtree(tmp_path / f"{runs}")
        runs += 1


def test_killed_at_each_stage_of_a_save_it_ends_as_the_unbroken_run(tmp_path, unbroken):
    for call in range(1, 10):
        prepare = partial(die_in_save, call)
        command = Command(arguments(tmp_path), tmp_path / "log", prepare)
        assert command.finish() == -signal.SIGKILL, command.printed()
    assert Command(arguments(tmp_path), tmp_path / "log").finish() == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130),
    (signal.SIGTERM, 0),
    (signal.SIGUSR1, 0),
])  # fmt: skip
def test_signal_saves_and_says_how_to_go_on(tmp_path, unbroken, number, status):
    log, run = tmp_path / "log", tmp_path / "run"
    command = Command(arguments(tmp_path, "--efficiency.workers=1"), log, partial(slow_steps, 0.2))
    command.wait_for(lambda: command.printed().count("a step begins") == 4)
    command.signal(number)
    assert command.finish() == status
    printed = command.printed()
    assert f"{number.name}: finishing this step and saving; again to stop at once" in printed
    config = run / "config.yaml"
    assert f"and saved; to go on: fastmim pretrain --config {config}" in printed
    assert len(checkpoint_names(run)) >= 1
    assert main(["pretrain", "--config", str(config)]) == 0
    assert_same_run(run, unbroken)


def test_second_ctrl_c_stops_at_once(tmp_path, unbroken):
    log, run = tmp_path / "log", tmp_path / "run"
    Trainer(pretrain(tmp_path, stop_after=6)).run()
    command = Command(arguments(tmp_path), log, partial(slow_steps, 50))
    command.wait_for(lambda: "a step begins" in command.printed())
    command.signal(signal.SIGINT)
    command.wait_for(lambda: "again to stop at once" in command.printed())
    command.signal(signal.SIGINT)
    begin = time.perf_counter()
    assert command.finish() == 130
    assert time.perf_counter() - begin < 20
    assert "stopped at once; of a training run, the last checkpoint is kept" in command.printed()
    assert "Traceback" not in command.printed()
    assert Trainer(pretrain(tmp_path)).run().finished
    assert_same_run(run, unbroken)


def test_signal_at_the_end_of_an_epoch_loses_no_evaluation(tmp_path, monkeypatch):
    config = partial(pretrain, eval={"knn_every": 2, "limit": 100, "k": 5})
    Trainer(config(tmp_path / "a")).run()
    knn = [line["step"] for line in metrics(tmp_path / "a" / "run") if "knn_accuracy" in line]
    assert knn == [14, 28]

    with monkeypatch.context() as patch:
        fail_at(patch, [13, 27], lambda engine: os.kill(os.getpid(), signal.SIGTERM))
        for steps, finished in ((14, False), (28, True)):
            outcome = Trainer(config(tmp_path / "b")).run()
            assert outcome == (tmp_path / "b" / "run", steps, finished, signal.SIGTERM, True)
            assert "knn_accuracy" not in metrics(tmp_path / "b" / "run")[-1]  # it did not wait
    for _ in range(2):
        assert Trainer(config(tmp_path / "b")).run().signal is None
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


def test_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, unbroken, capsys):
    Trainer(pretrain(tmp_path, stop_after=12)).run()
    run = tmp_path / "run"
    assert checkpoint_names(run) == ["step-00000010", "step-00000012"]
    damage(run / "checkpoints" / "step-00000012")
    trainer = Trainer(pretrain(tmp_path))
    assert trainer.done == 10
    assert "checkpoint step-00000012 is refused: " in capsys.readouterr().err
    trainer.run()
    assert "run: resumed after step 10" in capsys.readouterr().err
    assert_same_run(run, unbroken)


def test_run_with_damaged_checkpoints_only_is_not_started_anew(tmp_path, capsys):
    Trainer(pretrain(tmp_path, stop_after=12)).run()
    run = tmp_path / "run"
    for name in checkpoint_names(run):
        damage(run / "checkpoints" / name)
    before = modified(run)
    assert main(arguments(tmp_path)) == 2
    assert "none of the 2 checkpoints is valid; nothing was changed" in capsys.readouterr().err
    assert modified(run) == before
    assert main(["knn", str(run)]) == 2
    assert main(arguments(tmp_path, "--resume=never", "--stop_after=1")) == 0
    assert checkpoint_names(tmp_path / "run-2") == ["step-00000001"]


def test_starting_anew_takes_a_fresh_folder(tmp_path):
    for number in range(3):
        trainer = Trainer(pretrain(tmp_path, resume="never", stop_after=2 + number))
        assert trainer.done == 0
        trainer.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2", "run-3"]
    assert checkpoint_names(tmp_path / "run") == ["step-00000002"]
    # config.yaml of a numbered run goes on with it, not with the first
    config = str(tmp_path / "run-3" / "config.yaml")
    assert main(["pretrain", "--config", config, "--stop_after=5"]) == 0
    assert checkpoint_names(tmp_path / "run-3") == ["step-00000004", "step-00000005"]


def test_finished_run_says_so_and_makes_up_for_its_pictures(tmp_path, capsys):
    config = pretrain(tmp_path, output={"pictures": 2})
    Trainer(config).run()
    before = saved_bytes(tmp_path / "run"), metrics(tmp_path / "run")
    pictures = [tmp_path / "run" / name for name in ("loss.png", "reconstruction.png")]
    contents = [path.read_bytes() for path in pictures]
    for path in pictures:
        path.unlink()
    capsys.readouterr()
    assert Trainer(config).run() == (tmp_path / "run", 28, True, None, True)
    assert "this run is complete: 28 of 28 steps. To train anew" in capsys.readouterr().err
    assert [path.read_bytes() for path in pictures] == contents
    assert (saved_bytes(tmp_path / "run"), metrics(tmp_path / "run")) == before


@pytest.mark.parametrize(("changes", "fields"), [
    ({"recipe": recipe(seed=1, base_lr=2e-2)}, ["recipe.base_lr: checkpoint 0.01, run 0.02",
                                                "recipe.seed: checkpoint 0, run 1"]),
    ({"recipe": recipe(img_size=8)}, ["recipe.img_size: checkpoint None, run 8"]),
    ({"method": "mae"}, ["method: checkpoint 'rc_mae', run 'mae'"]),
])  # fmt: skip
def test_another_run_in_the_folder_is_refused_by_its_differences(tmp_path, changes, fields):
    Trainer(pretrain(tmp_path, stop_after=1)).run()
    with pytest.raises(CheckpointError) as error:
        Trainer(pretrain(tmp_path, **changes))
    lines = str(error.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == fields
    assert "--output.name or --resume never" in lines[-1]


def test_another_data_set_of_the_same_size_is_refused(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 8, prefix=name)
    chosen = recipe(batch_size=4)
    Trainer(pretrain(tmp_path, recipe=chosen, data={"path": str(tmp_path / "a")})).run()
    with pytest.raises(CheckpointError, match=r"differ in\n  data.names: checkpoint "):
        Trainer(pretrain(tmp_path, recipe=chosen, data={"path": str(tmp_path / "b")}))
    shutil.move(tmp_path / "a", tmp_path / "moved")
    Trainer(pretrain(tmp_path, recipe=chosen, data={"path": str(tmp_path / "moved")}))


def test_checkpoint_of_something_else_is_refused(tmp_path):
    from fastmim.train.checkpoint import save

    save(tmp_path / "run" / "checkpoints", 3, {"student": {}}, {"note": "mine"})
    with pytest.raises(CheckpointError, match="method: checkpoint has none, run 'rc_mae'"):
        Trainer(pretrain(tmp_path))


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    first = Command(arguments(tmp_path), tmp_path / "log1", partial(slow_steps, 0.2))
    first.wait_for(lambda: "a step begins" in first.printed())
    second = Command(arguments(tmp_path), tmp_path / "log2")
    assert second.finish() == 2
    assert "another process is training in it" in second.printed()
    first.signal(signal.SIGKILL)
    assert first.finish() == -signal.SIGKILL
    assert Command(arguments(tmp_path, "--stop_after=1"), tmp_path / "log2").finish() == 0


def test_config_of_the_run_holds_all_options(tmp_path):
    config = pretrain(tmp_path, stop_after=1)
    Trainer(config).run()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["recipe"]["model"] == "nano"
    assert written["output"]["folder"] == str(tmp_path)
    assert (written["resume"], written["stop_after"]) == ("auto", None)


def test_single_bad_step_is_skipped_counted_and_survived(tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, [5, 6, 9], infinite_gradient)
    trainer = Trainer(pretrain(tmp_path))
    assert trainer.run().finished
    assert trainer.skipped == 3
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 2, 1, 0, 0, 0, 0]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "step 10: loss" in capsys.readouterr().err


def test_bad_steps_in_a_row_stop_the_run_with_a_report(tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, [7, 8, 9], infinite_gradient)
    assert main(arguments(tmp_path)) == 3
    printed = capsys.readouterr().err
    assert "stopped after 3 steps in a row with a loss or gradient that is not finite" in printed
    assert "Traceback" not in printed
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["step"] == 10
    assert report["grad_norm"] == "inf"
    assert len(report["sample_ids"]) == len(set(report["sample_ids"])) == 256
    assert report["images"][0] == f"digits[{report['sample_ids'][0]}]"
    assert checkpoint_names(tmp_path / "run") == ["step-00000005"]


def test_bad_steps_are_counted_across_a_resumption(tmp_path, monkeypatch):
    fail_at(monkeypatch, [7, 8, 9], infinite_gradient)
    Trainer(pretrain(tmp_path, stop_after=9)).run()
    with pytest.raises(NonFiniteError):
        Trainer(pretrain(tmp_path)).run()


def test_disk_full_for_a_while_costs_only_checkpoints(tmp_path, unbroken, monkeypatch, capsys):
    free = iter([0, 0, 2**40, 0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free, 2**40)))
    trainer = Trainer(pretrain(tmp_path))
    assert trainer.run().saved
    printed = capsys.readouterr().err
    for step in (5, 10, 20):
        assert f"warning: checkpoint of step {step} not written" in printed
    assert printed.count("not written") == 3
    assert_same_run(tmp_path / "run", unbroken)


def test_last_checkpoint_not_written_is_an_error(tmp_path, unbroken):
    command = Command(arguments(tmp_path), tmp_path / "log", refuse_large_files)
    assert command.finish() == 5, command.printed()
    assert command.printed().count("EFBIG") == 6  # steps 5, 10, 15, 20, 25 and 28
    assert "the last checkpoint, of step 28, could not be written; make room" in command.printed()
    assert checkpoint_names(tmp_path / "run") == []
    assert main(arguments(tmp_path)) == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_evaluation_sees_the_teacher_and_no_gradients(tmp_path, monkeypatch):
    trainer = Trainer(pretrain(tmp_path, eval={"knn_every": 4, "limit": 50, "k": 3}))
    seen = []

    def accuracy_of(encoder):
        assert all(p.grad is None for p in trainer.method.parameters())
        seen.append(encoder)
        return 0.5

    monkeypatch.setattr(trainer.evaluation, "accuracy", accuracy_of)
    trainer.run()
    assert seen == [trainer.method.teacher.module]
    assert metrics(tmp_path / "run")[-1] == {"step": 28, "epoch": 4, "knn_accuracy": 0.5}


def test_processes_that_have_not_joined_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    Trainer(pretrain(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        Trainer(pretrain(tmp_path))
