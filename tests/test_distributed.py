"""Two processes that train one model: the run of one, whatever happens to either."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmim import create_model
from fastmim.methods import METHODS
from fastmim.nn import FrozenTeacher
from fastmim.train import Engine, Trainer
from fastmim.train import trainer as trainer_module
from fastmim.train.build import build_method, restore_run
from fastmim.train.distributed import World, process_group, rank
from tests import accuracy
from tests.test_train_engine import everything, spoil_gradient, spoil_loss
from tests.training import (
    Command,
    arguments,
    metrics,
    pretrain,
    recipe,
    slow_steps,
    start_ranks,
    write_images,
)

SECONDS = 30  # within which an error has ended all processes, where six others use each core
small = partial(recipe, batch_size=448, epochs=2)
# Whole runs of 8 steps, with every loss in metrics.jsonl.
RUNS = {
    "mae": dict(method="mae", workers=1),
    "rc_mae": dict(method="rc_mae", recipe=small(clip_grad=0.5)),
    # The teacher moves between the micro-batches of a step, which hold as many images in all.
    "rc_mae_official": dict(
        method="rc_mae", recipe=small(momentum_schedule="official"), micro_batch=224
    ),
    "dbot": dict(
        method="dbot",
        recipe=small(model="nano_deep", warmup_epochs=0.5, stage_epochs=(0, 1, 2), drop_path=0.3),
    ),
    "sdae": dict(method="sdae"),
    "sdae_step": dict(method="sdae", recipe=small(teacher_update="step"), micro_batch=224),
}
SHARDED = ("mae", "rc_mae", "rc_mae_official", "dbot", "sdae")
SPREAD = [(name, "ddp") for name in RUNS] + [(name, "fsdp2") for name in SHARDED]
# And after how many steps another number of processes goes on; dBOT's second stage begins after 4.
RESUMED = (("rc_mae", "ddp", 3), ("dbot", "fsdp2", 3), ("dbot", "ddp", 5))
WITH_KNN = {"knn_every": 1, "limit": 200, "k": 5}


def config(folder: Path, name: str, parallel: str, **options):
    chosen = dict(RUNS[name])
    micro_batch, workers = chosen.pop("micro_batch", None), chosen.pop("workers", 0)
    if micro_batch and parallel != "none":
        micro_batch //= 2
    return pretrain(
        folder,
        **{"recipe": small(), **chosen},
        efficiency={"parallel": parallel, "micro_batch": micro_batch, "workers": workers},
        output={"name": f"{name}-{parallel}", "log_every": 1},
        eval=WITH_KNN,
        **options,
    )


def half_of_one(folder: Path, name: str, parallel: str, **options):
    """One process in the folder of the run of two."""
    made = config(folder / "halves", name, "none", **options)
    return replace(made, output=replace(made.output, name=f"{name}-{parallel}"))


def finish(commands: list[Command]) -> list[int]:
    return [command.finish() for command in commands]


def printed(commands: list[Command]) -> str:
    return "\n".join(command.printed() for command in commands)


def together(function, folder: Path, world: int = 2) -> list:
    """What ``function()`` returns in each of some processes."""
    commands = start_ranks(partial(_save_result, function, folder), folder, world=world)
    assert finish(commands) == [0] * world, printed(commands)
    return [torch.load(folder / f"{i}.pt") for i in range(world)]


def _save_result(function, folder: Path) -> int:
    with process_group():
        torch.save(function(), folder / f"{rank()}.pt")
    return 0


def train_all(folder: Path, alone: Path) -> dict:
    """Whole runs; those of DDP give the state of this process where stages begin, and at the end.

    Args:
        folder: Where they go.
        alone: With halves of one process, to go on with.
    """
    found = {}
    for name, parallel in SPREAD:
        trainer = Trainer(config(folder, name, parallel))
        begun = []
        trainer.engine._begin = partial(_note_begin, trainer.engine, begun)
        outcome = trainer.run()
        assert outcome.finished
        assert outcome.saved
        if parallel == "ddp":  # of shards every process has its own
            found[name] = [*begun, everything(trainer.engine)]
    for name, parallel, stop in RESUMED:
        assert Trainer(config(alone / "halves", name, parallel)).run().finished
        stopped = Trainer(config(folder / "halves", name, parallel, stop_after=stop)).run()
        assert (stopped.steps, stopped.saved) == (stop, True)
    return found


def _note_begin(engine: Engine, states: list) -> None:
    """Begin a stage, and keep what it begins with."""
    Engine._begin(engine)
    states.append(everything(engine))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The runs of one process, and halves that two go on with."""
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        Trainer(config(folder, name, "none")).run()
    for name, parallel, stop in RESUMED:
        Trainer(half_of_one(folder, name, parallel, stop_after=stop)).run()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, alone) -> tuple[Path, list[dict]]:
    """The runs of two processes, and the states of each."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, together(partial(train_all, folder, alone), folder)


def determined(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Without the bias of the keys.

    The softmax cancels it, so its gradient is rounding alone, which AdamW divides by its own size.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    queries, _keys, values = tensor.chunk(3)
    return torch.cat([queries, values])


def assert_same_run(folder: Path, expected: Path) -> None:
    """Losses, accuracies and final weights, within the tolerance of a run."""
    ours, theirs = metrics(folder), metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm", "lr", "momentum"):
        values = [[line[name] for line in lines if line.get(name)] for lines in (ours, theirs)]
        accuracy.run(*values, torch.float32)
    found, right = (restore_run(path)[0].parts for path in (folder, expected))
    for part, tensors in right.items():
        assert found[part].keys() == tensors.keys()
        values = [
            torch.cat([determined(n, p[part][n]).flatten() for n in tensors])
            for p in (found, right)
        ]
        error = (values[0] - values[1]).norm() / values[1].norm()
        accuracy.scalar(1 + error, 1.0, torch.float32)


@pytest.mark.parametrize(("name", "parallel"), SPREAD)
def test_two_processes_make_the_run_of_one(trained, alone, name, parallel):
    folder, _ = trained
    assert_same_run(folder / f"{name}-{parallel}", alone / f"{name}-none")


def train_in_thirds(folder: Path, parallel: str) -> int:
    """A run whose batch three processes divide; returns its steps."""
    run = config(folder, "rc_mae", parallel)
    return Trainer(replace(run, recipe=replace(run.recipe, batch_size=444))).run().steps


def test_three_processes_make_the_run_of_one(tmp_path):
    steps = train_in_thirds(tmp_path, "none")
    assert together(partial(train_in_thirds, tmp_path, "ddp"), tmp_path, 3) == [steps] * 3
    assert_same_run(tmp_path / "rc_mae-ddp", tmp_path / "rc_mae-none")


@pytest.mark.parametrize(("name", "parallel", "stop"), RESUMED)
def test_any_number_of_processes_goes_on_with_a_run(trained, alone, name, parallel, stop):
    of_one = Trainer(half_of_one(trained[0], name, parallel))
    assert of_one.done == stop
    assert of_one.run().finished
    for folder in (trained[0], alone):
        assert_same_run(folder / "halves" / f"{name}-{parallel}", alone / f"{name}-none")


@pytest.mark.parametrize("name", RUNS)
def test_processes_hold_the_same_bits_when_a_stage_begins_and_at_the_end(trained, name):
    first, second = (states[name] for states in trained[1])
    assert len(first) == len(second) == 1 + (name == "dbot")
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            accuracy.exact(tensor, theirs[key])


# Options of the network or of the engine, and the micro-batches of a step.
ENGINES = {
    "one channel, not square": (dict(in_chans=1, img_size=(16, 24)), 1),
    "four channels, not square": (dict(in_chans=4, img_size=(24, 8)), 2),
    "lean": (dict(memory="lean"), 1),
    "checkpoint": (dict(memory="checkpoint"), 2),
    "lean MAE, four channels, not square": (
        dict(method="mae", in_chans=4, img_size=(16, 24), memory="lean"),
        2,
    ),
    "SdAE that keeps little, one channel, not square": (
        dict(method="sdae", in_chans=1, img_size=(24, 16), memory="recompute_mlp"),
        1,
    ),
    "dBOT of one teacher in two stages, not square": (
        dict(method="dbot", img_size=(8, 16), memory="checkpoint", in_chans=2),
        1,
    ),
    "compiled": (dict(compiled=True, memory="lean", depth=3, decoder_depth=3), 2),
    "compiled dBOT": (dict(compiled=True, method="dbot", drop_path=0.5), 1),
}


def make_engine(
    parallel: str,
    method: str = "rc_mae",
    compiled: bool = False,
    drop_path: float = 0.0,
    **options,
) -> Engine:
    """Of dBOT in two stages, with one teacher for both where nothing is dropped."""
    stages = (0, 1, 2) if method == "dbot" else None
    chosen = recipe(batch_size=8, warmup_epochs=0, epochs=2, stage_epochs=stages)
    torch.manual_seed(rank())  # rank 0's weights are everyone's
    options = {"norm_pix_loss": True, **METHODS[method].student_options(drop_path), **options}
    network = create_model("nano", **options)
    world = World(timeout_minutes=5)
    world.choose(parallel)
    teachers = None
    if stages and not drop_path:
        teachers = [FrozenTeacher(network.fresh_encoder(depth=2))] * 2
    method = build_method(method, chosen, network, teachers)
    options = dict(precision="fp32", steps_per_epoch=2, compiled=compiled, world=world)
    return Engine(method, chosen, **options)


def micro_batches(run: Engine, step: int, count: int = 1) -> list:
    """This process's part of each micro-batch of a step of eight images."""
    embed = run.method.student.patch_embed
    torch.manual_seed(100 + step)
    imgs, ids = torch.randn(8, embed.in_chans, *embed.img_size), torch.arange(8) + 8 * step
    return [
        SimpleNamespace(
            imgs=i.chunk(run.world.size)[run.world.rank],
            sample_ids=s.chunk(run.world.size)[run.world.rank],
            epoch=0,
        )
        for i, s in zip(imgs.chunk(count), ids.chunk(count), strict=True)
    ]


def losses_of_engines(parallel: str) -> dict[str, list[float]]:
    """Of four steps of each of ``ENGINES``."""
    found = {}
    for name, (options, count) in ENGINES.items():
        run = make_engine(parallel, **options)
        results = [run.run_step(i, micro_batches(run, i, count), count) for i in range(4)]
        found[name] = [result.losses["loss"] for result in results]
    return found


def bad_steps() -> list[tuple]:
    """What this process has after a step of which rank 1's part alone was not finite."""
    found = []
    for spoil in (spoil_loss, spoil_gradient):
        run = make_engine("ddp")
        run.run_step(0, micro_batches(run, 0))
        before, parts = everything(run), micro_batches(run, 1)
        if rank() == 1:
            spoil(run, parts)
        skipped = run.run_step(1, parts).skipped
        kept = all(torch.equal(tensor, before[name]) for name, tensor in everything(run).items())
        good = not run.run_step(2, micro_batches(run, 2)).skipped
        found.append((skipped, kept, good, everything(run)))
    return found


def check_engines() -> tuple:
    return losses_of_engines("ddp"), losses_of_engines("fsdp2"), bad_steps()


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> list[tuple]:
    return together(check_engines, tmp_path_factory.mktemp("checked"))


@pytest.fixture(scope="module")
def losses_of_one() -> dict[str, list[float]]:
    with torch.compiler.set_stance("force_eager"):
        return losses_of_engines("none")


@pytest.mark.parametrize("name", ENGINES)
def test_shapes_memory_modes_and_compilation_change_nothing(checked, losses_of_one, name):
    for losses in (found[name] for process in checked for found in process[:2]):
        accuracy.run(losses, losses_of_one[name], torch.float32)


def test_a_step_that_is_bad_in_one_process_is_skipped_by_all(checked):
    for first, second in zip(*(process[2] for process in checked), strict=True):
        assert first[:3] == second[:3] == (True, True, True)
        for name, tensor in first[3].items():
            accuracy.exact(tensor, second[3][name])


def assert_soon(commands: list[Command], *statuses: int) -> str:
    """All end within seconds, with these exit statuses; returns what they printed."""
    begin = time.perf_counter()
    assert tuple(finish(commands)) == statuses, printed(commands)
    assert time.perf_counter() - begin < SECONDS
    return printed(commands)


def test_batch_that_cannot_be_divided_is_refused_once(tmp_path):
    words = arguments(tmp_path, "--recipe.batch_size=255")
    told = assert_soon(start_ranks(words, tmp_path), 2, 2)
    assert told.count("error:") == 1
    assert "batch_size 255 cannot be divided among 2 processes; use 256, or" in told


def test_unknown_option_is_told_once(tmp_path):
    told = assert_soon(start_ranks(["pretrain", "--epochs=3"], tmp_path), 2, 2)
    assert told.count("did you mean --recipe.epochs?") == 1


def lose_disk(number: int) -> None:
    def broken(_path):
        raise OSError("the disk is gone")

    if number == 1:
        trainer_module.open_source = broken


def test_error_of_one_process_at_the_start_ends_all(tmp_path):
    told = assert_soon(start_ranks(arguments(tmp_path), tmp_path, lose_disk), 2, 2)
    assert told.count("error: rank 1: OSError: the disk is gone") == told.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_processes_of_different_runs_are_refused(tmp_path):
    words = [arguments(tmp_path, f"--recipe.seed={seed}") for seed in (0, 1)]
    told = assert_soon(start_ranks(words, tmp_path), 2, 2)
    assert "error: rank 1: ValueError: processes 1 and 0 train different runs, they" in told
    assert "differ in identity.recipe.seed, config.recipe.seed; start all with the same" in told


def slow_rank(_number: int) -> None:
    slow_steps(0.2)


def test_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    commands = start_ranks(arguments(tmp_path), tmp_path, slow_rank)
    commands[1].wait_for(lambda: commands[1].printed().count("a step begins") == 4)
    commands[1].signal(signal.SIGTERM)
    commands[1].signal(signal.SIGTERM)  # by the scheduler, and by torchrun
    told = assert_soon(commands, 0, 0)
    steps = [command.printed().count("a step begins") for command in commands]
    assert steps[0] == steps[1] < 28
    assert told.count(f"stopped after step {steps[0]} and saved; to go on:") == 1
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps[0]:08}").is_dir()


def strike_rank_1(number: int, struck: int) -> None:
    """Send rank 1 a signal when it begins its fourth step."""
    run_step = Engine.run_step

    def fatal(engine, step, *rest):
        if (step, struck) == (3, 1):
            os.kill(os.getpid(), number)
        return run_step(engine, step, *rest)

    Engine.run_step = fatal


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_others_do_not_wait_for_ever_for_a_process_that_is_gone(tmp_path, number):
    words = arguments(tmp_path, "--efficiency.timeout_minutes=0.1")
    commands = start_ranks(words, tmp_path, partial(strike_rank_1, number))
    try:
        assert commands[0].finish() == 1, printed(commands)
    finally:
        commands[1].signal(signal.SIGKILL)
        commands[1].finish()
    assert commands[0].printed().count("step 3/28") <= 1


def test_bad_images_of_all_processes_are_named_and_counted_together(tmp_path):
    write_images(tmp_path / "images", 40)
    for i in range(0, 18, 2):
        (tmp_path / "images" / f"image-{i:03}.jpg").write_bytes(b"no picture")
    options = (f"--data.path={tmp_path / 'images'}", "--recipe.batch_size=16")
    told = assert_soon(start_ranks(arguments(tmp_path, *options), tmp_path), 4, 4)
    assert told.count("warning: image skipped:") == 9
    assert "error: PretrainLoader: 9 of 40 images cannot be used, 8 are allowed" in told


def test_torchrun_trains_evaluates_and_draws(tmp_path):
    model = ("--recipe.model=rc_vit_micro_patch8", "--recipe.img_size=32", "--recipe.epochs=1")
    ends = ("--efficiency.parallel=fsdp2", "--eval.knn_at_end=true", "--output.pictures=2")
    words = ["-m", "fastmim", *arguments(tmp_path, *model, *ends)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, *words], env=env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 processes (fsdp2) of 128 images each") == 1
    assert done.stdout.count("kNN accuracy") == 1
    assert (tmp_path / "run" / "reconstruction.png").is_file()
    assert metrics(tmp_path / "run")[-1]["step"] == 7
