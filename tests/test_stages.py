"""dBOT's stages and SdAE's epochs in the engine and in whole runs, interrupted anywhere."""

import json
from pathlib import Path

import pytest
import torch

from fastmim import DBOT, create_model
from fastmim.cli import main
from fastmim.train import Engine, Trainer
from fastmim.train.build import build_method, restore_run
from fastmim.train.checkpoint import CheckpointError
from tests import accuracy
from tests.test_train_engine import batches, engine, everything
from tests.training import arguments, metrics, pretrain, recipe, saved_bytes

SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
# Three stages of 7, 7 and 14 steps with 256 of the 1797 digits each.
STAGES = dict(
    model="nano_deep", epochs=4, warmup_epochs=0.5, stage_epochs=(0, 1, 2, 4), drop_path=0.3
)


def assert_same_run(folder: Path, expected: Path) -> None:
    ours, theirs = saved_bytes(folder), saved_bytes(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert metrics(folder) == metrics(expected)


def student(**options):
    torch.manual_seed(0)
    return create_model("nano", target="tokens", **options)


def whole(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in module.state_dict().values()])


@pytest.mark.parametrize("recorded", SCHEDULES["dbot_lr_schedule"], ids=["B", "L"])
def test_learning_rate_and_teacher_of_each_stage_are_the_recorded_ones(recorded):
    per_epoch, depth = recorded["iters_per_epoch"], recorded["depth"]
    chosen = recipe(
        epochs=recorded["stage_epochs"][-1],
        stage_epochs=tuple(recorded["stage_epochs"]),
        stage_depths=tuple(depth),
        teacher_depth=recorded["init_teacher_encoder_depth"],
        warmup_epochs=recorded["warmup_epochs"],
        base_lr=recorded["lr"],
        min_lr=recorded["min_lr"],
    )  # of 256 images: the peak is base_lr
    run = Engine(
        build_method("dbot", chosen, student(depth=depth[0])),
        chosen,
        precision="fp32",
        steps_per_epoch=per_epoch,
    )
    expected = recorded["per_iteration_lr"]
    found = [run.lr_at(step) for step in range(len(expected))]
    accuracy.golden(*(torch.tensor(v, dtype=torch.float64) for v in (found, expected)))
    for epoch, stage in enumerate(recorded["stage_index_per_epoch"]):
        assert chosen.stage_at(epoch) == stage
        run.begin_stage(stage)
        blocks = run.method.teacher.module.blocks
        assert len(blocks) == recorded["teacher_depth_per_epoch"][epoch]


@pytest.mark.parametrize("carry", [True, False])
def test_optimizer_is_carried_over_or_starts_anew(carry):
    run = engine("dbot", epochs=2, stage_epochs=(0, 1, 2), stage_carry=carry)
    for step in range(4):
        run.run_step(step, batches(step))
    before, trained = everything(run), whole(run.method.student.blocks)
    run.begin_stage(1)
    after = everything(run)
    accuracy.exact(whole(run.method.teacher.module.blocks), trained)
    bias = "student.patch_embed.proj.bias"
    assert torch.equal(after[bias], before[bias]) == carry
    for name, tensor in after.items():
        if name.startswith("exp_avg") or name == "step":
            accuracy.exact(tensor, before[name] if carry else torch.zeros_like(before[name]))
    assert not run.run_step(4, batches(4)).skipped


def test_moments_of_another_depth_are_carried_as_far_as_they_fit():
    run = engine("dbot", epochs=2, stage_epochs=(0, 1, 2), stage_depths=(1, 2))
    for step in range(4):
        run.run_step(step, batches(step))
    before = everything(run)
    run.run_step(4, batches(4))
    assert len(run.method.student.blocks) == 2
    assert len(run.method.teacher.module.blocks) == 1
    assert before.keys() < everything(run).keys()
    assert everything(run)["step"] == before["step"] + 1


def test_weights_of_a_stage_are_a_function_of_seed_and_stage():
    def after(seed, disturb):
        method = DBOT(student(), seed=seed)
        torch.manual_seed(disturb)  # as another process would have it
        method.begin_stage(1)
        return whole(method.student)

    accuracy.exact(after(0, 1), after(0, 2))
    assert not torch.equal(after(0, 1), after(1, 1))
    method = DBOT(student())
    method.begin_stage(1)
    first = whole(method.student)
    method.begin_stage(2)
    assert not torch.equal(first, whole(method.student))
    with pytest.raises(ValueError, match="expected stage 3, got 5"):
        method.begin_stage(5)


def test_frozen_teacher_does_not_move():
    run = engine("dbot")
    before = whole(run.method.teacher)
    result = run.run_step(0, batches(0))
    assert result.momentum is None
    accuracy.exact(whole(run.method.teacher), before)


@pytest.mark.parametrize(("update", "steps"), [("epoch", [3, 7]), ("step", range(8))])
def test_sdae_teacher_moves_when_it_is_told_to(update, steps):
    run = engine("sdae", teacher_update=update, epochs=2, momentum=0.5, momentum_end=0.9)
    for step in range(8):
        before = everything(run)
        momentum = run.run_step(step, batches(step)).momentum
        accuracy.scalar(momentum, 0.5 if step < 4 else 0.7, torch.float32)
        after = everything(run)
        for name in run.method.teacher.module.state_dict():
            expected = before[f"teacher.{name}"]
            if step in steps:
                new = after[f"student.{name}"].double()
                expected = (momentum * expected.double() + (1 - momentum) * new).float()
            accuracy.golden(after[f"teacher.{name}"], expected)


@pytest.mark.parametrize(("update", "moving"), [("epoch", {7, 15}), ("step", {1, 3, 5, 7})])
def test_sdae_teacher_moves_every_other_time_if_told_to(update, moving):
    run = engine("sdae", teacher_update=update, teacher_every=2, epochs=4, momentum=0.5)
    moved = set()
    for step in range(16 if update == "epoch" else 8):
        before = whole(run.method.teacher)
        run.run_step(step, batches(step))
        if not torch.equal(whole(run.method.teacher), before):
            moved.add(step)
    assert moved == moving


def test_sdae_teacher_moves_although_the_last_step_of_an_epoch_is_skipped():
    run = engine("sdae", momentum=0.5)
    before = everything(run)
    bad = batches(3)
    bad[0].imgs.fill_(float("nan"))
    assert run.run_step(3, bad).skipped
    after = everything(run)
    name = "blocks.0.mlp.fc1.weight"
    expected = 0.5 * before[f"teacher.{name}"] + 0.5 * before[f"student.{name}"]
    accuracy.golden(after[f"teacher.{name}"], expected)


@pytest.mark.parametrize("method", ["dbot", "sdae"])
def test_micro_batches_draw_the_same_numbers(method):
    runs = [engine(method, torch.float64, model="nano_deep", drop_path=0.5) for _ in range(2)]
    losses = [
        [run.run_step(i, batches(i, parts, torch.float64), parts).losses["loss"] for i in range(4)]
        for run, parts in zip(runs, (1, 4), strict=True)
    ]
    accuracy.run(*losses, torch.float32)
    other = engine(method, torch.float64, model="nano_deep")
    assert other.run_step(0, batches(0, 1, torch.float64)).losses["loss"] != losses[0][0]


@pytest.fixture(scope="module", params=["dbot", "sdae"])
def unbroken(request, tmp_path_factory):
    """A run that nothing disturbed, and how it is started."""
    folder, method = tmp_path_factory.mktemp("unbroken"), request.param
    options = STAGES if method == "dbot" else {**STAGES, "stage_epochs": None}
    if method == "dbot":
        options = {**options, "stage_depths": (3, 2, 3), "teacher_depth": 0}

    def start(folder, **more):
        return Trainer(pretrain(folder, method=method, recipe=recipe(**options), **more))

    assert start(folder).run().finished
    return start, folder / "run"


@pytest.mark.parametrize("stops", [[3], [7], [8, 14], [9, 13, 15, 27], [14, 14, 21]])
def test_run_interrupted_in_any_stage_ends_as_the_unbroken_one(tmp_path, unbroken, stops):
    start, expected = unbroken
    for stop in stops:
        assert start(tmp_path, stop_after=stop).run().steps == stop
    assert start(tmp_path).run().finished
    assert_same_run(tmp_path / "run", expected)


def test_stage_ends_with_a_checkpoint_of_the_trained_student(tmp_path, capsys):
    chosen = recipe(**STAGES)
    output = {"checkpoint_every": 0, "keep": 9}
    Trainer(pretrain(tmp_path, method="dbot", recipe=chosen, output=output)).run()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000007", "step-00000014", "step-00000028"]
    printed = capsys.readouterr().err
    assert "stage 2 of 3: teacher: 0.0 M parameters" in printed
    stages = {}
    for name in names:
        found, method = restore_run(tmp_path / "run" / "checkpoints" / name)
        stages[name] = found.state["stage"], method.stage
    assert list(stages.values()) == [(0, 0), (1, 1), (2, 2)]
    first, second = (restore_run(tmp_path / "run" / "checkpoints" / name)[1] for name in names[:2])
    accuracy.exact(whole(second.teacher.module.blocks), whole(first.student.blocks))


@pytest.mark.parametrize("saved", ["mae", "rc_mae", "dbot", "sdae"])
@pytest.mark.parametrize("wanted", ["mae", "rc_mae", "dbot", "sdae"])
def test_checkpoint_of_another_method_is_refused(tmp_path, saved, wanted):
    Trainer(pretrain(tmp_path, method=saved, stop_after=1)).run()
    if saved == wanted:
        assert Trainer(pretrain(tmp_path, method=wanted)).done == 1
        return
    with pytest.raises(CheckpointError, match=f"method: checkpoint '{saved}', run '{wanted}'"):
        Trainer(pretrain(tmp_path, method=wanted))


def test_stages_of_a_method_without_any_are_refused(tmp_path):
    with pytest.raises(ValueError, match="SdAE is trained in one stage"):
        Trainer(pretrain(tmp_path, method="sdae", recipe=recipe(stage_epochs=(0, 2, 4))))


@pytest.mark.parametrize("method", ["dbot", "sdae"])
def test_commands_know_methods_that_predict_features(tmp_path, method, capsys):
    Trainer(pretrain(tmp_path, method=method, stop_after=2)).run()
    run = str(tmp_path / "run")
    assert main(["knn", run, "--eval.limit=60", "--eval.k=3"]) == 0
    printed = capsys.readouterr().out
    for name in ("teacher", "student", "untrained network", "raw pixels"):
        assert name in printed
    assert main(["visualize", run]) == 2
    assert "not pixels; there is no picture of these" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["rc_mae", "dbot", "sdae"])
@pytest.mark.parametrize("schedule", ["cosine", "official"])
def test_teacher_may_see_all_micro_batches_at_once(method, schedule):
    def run(once):
        made = engine(method, momentum_schedule=schedule)
        options = dict(precision="fp32", steps_per_epoch=4, teacher_once=once)
        made = Engine(made.method, made.recipe, **options)
        return [made.run_step(i, batches(i, 4), 4).losses["loss"] for i in range(6)]

    if schedule == "official" and method == "rc_mae":
        with pytest.raises(ValueError, match="teacher moves after every micro-batch"):
            run(True)
    else:
        accuracy.run(run(True), run(False), torch.float32)


@pytest.mark.parametrize("method", ["rc_mae", "dbot", "sdae"])
def test_teacher_in_bf16_changes_rounding_only(method, tmp_path):
    losses = []
    for precision in ("same", "bf16"):
        efficiency = {"precision": "fp32", "teacher_precision": precision, "micro_batch": 64}
        efficiency["teacher_once"] = precision == "bf16"
        Trainer(pretrain(tmp_path / precision, method=method, efficiency=efficiency)).run()
        lines = metrics(tmp_path / precision / "run")
        losses.append([line["loss"] for line in lines])
        written = (tmp_path / precision / "run" / "metrics.jsonl").read_text().splitlines()
        assert all(0 < json.loads(line)["teacher_time"] < 1 for line in written)
    assert losses[0] != losses[1]
    accuracy.run(*losses, torch.bfloat16)


@pytest.mark.parametrize("method", ["dbot", "sdae"])
def test_loss_falls_on_real_images(tmp_path, method, capsys):
    config = pretrain(tmp_path, method=method)
    Trainer(config).run()
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[1] < losses[0]
    assert (tmp_path / "run" / "loss.png").is_file()
    assert not (tmp_path / "run" / "reconstruction.png").exists()
    assert "warning" not in capsys.readouterr().err


def test_stages_on_the_command_line_and_in_the_file_of_the_run(tmp_path):
    options = ["--method=dbot", "--recipe.stage_epochs=[0,2,4]", "--recipe.stage_depths=[1,2]"]
    assert main(arguments(tmp_path / "a", *options)) == 0
    assert main(arguments(tmp_path / "b", *options, "--stop_after=15")) == 0
    assert main(["pretrain", "--config", str(tmp_path / "b" / "run" / "config.yaml")]) == 0
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")
    assert restore_run(tmp_path / "a" / "run")[1].stage == 1
