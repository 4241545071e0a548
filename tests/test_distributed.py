"""Two processes that train one model: the run of one, whatever happens to either."""

from functools import partial
from pathlib import Path

import pytest
import torch

from fastmim.train import Engine, Trainer
from fastmim.train.build import restore_run
from fastmim.train.distributed import process_group, rank
from tests import accuracy
from tests.test_train_engine import everything
from tests.training import (
    Command,
    metrics,
    pretrain,
    recipe,
    start_ranks,
)

SECONDS = 10  # within which an error has ended all processes, on a busy machine
# Whole runs of 14 steps, with every loss in metrics.jsonl.
RUNS = {
    "mae": dict(method="mae"),
    "rc_mae": dict(method="rc_mae", recipe=recipe(epochs=2, clip_grad=0.5)),
    # The teacher moves between the micro-batches of a step, which hold as many images in all.
    "rc_mae_official": dict(
        method="rc_mae", recipe=recipe(epochs=2, momentum_schedule="official"), micro_batch=128
    ),
    "dbot": dict(
        method="dbot",
        recipe=recipe(
            model="nano_deep", epochs=2, warmup_epochs=0.5, stage_epochs=(0, 1, 2), drop_path=0.3
        ),
    ),
    "sdae": dict(method="sdae"),
    "sdae_step": dict(
        method="sdae", recipe=recipe(epochs=2, teacher_update="step"), micro_batch=64
    ),
}
WITH_KNN = {"knn_every": 1, "limit": 200, "k": 5}


def config(folder: Path, name: str, parallel: str = "auto", **options):
    chosen = dict(RUNS[name])
    micro_batch = chosen.pop("micro_batch", None)
    if micro_batch:
        micro_batch //= 1 if parallel == "none" else 2
    return pretrain(
        folder,
        **{"recipe": recipe(epochs=2), **chosen},
        efficiency={"parallel": parallel, "micro_batch": micro_batch},
        output={"name": f"{name}-{parallel}", "log_every": 1},
        eval=WITH_KNN,
        **options,
    )


def finish(commands: list[Command]) -> list[int]:
    return [command.finish() for command in commands]


def printed(commands: list[Command]) -> str:
    return "\n".join(command.printed() for command in commands)


def together(function, folder: Path) -> list:
    """What ``function()`` returns in each of two processes."""
    commands = start_ranks(partial(_save_result, function, folder), folder)
    assert finish(commands) == [0, 0], printed(commands)
    return [torch.load(folder / f"{i}.pt") for i in range(2)]


def _save_result(function, folder: Path) -> int:
    with process_group():
        torch.save(function(), folder / f"{rank()}.pt")
    return 0


def state_of(run: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of networks and optimizer, whole."""
    return run.world.full(everything(run), everywhere=True)


def train_all(folder: Path) -> dict:
    """Whole runs of every method in both ways, and some that one process goes on with."""
    found = {}
    for name in RUNS:
        for parallel in ("ddp", "fsdp2"):
            trainer = Trainer(config(folder, name, parallel))
            begun = []
            trainer.engine._begin = partial(_note_begin, trainer.engine, begun)
            outcome = trainer.run()
            assert outcome.finished
            assert outcome.saved
            if parallel == "ddp":  # of shards every process has its own
                found[name] = [*begun, state_of(trainer.engine)]
    return found


def _note_begin(engine: Engine, states: list) -> None:
    """Begin a stage, and keep what it begins with."""
    Engine._begin(engine)
    states.append(engine.world.full(everything(engine), everywhere=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        Trainer(config(folder, name, "none")).run()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The runs of two processes, and the states of each."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, together(partial(train_all, folder), folder)


def assert_same_run(folder: Path, expected: Path) -> None:
    """Losses, accuracies and final weights, within the tolerance of a run."""
    ours, theirs = metrics(folder), metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm", "lr", "momentum"):
        values = [[line[name] for line in lines if line.get(name)] for lines in (ours, theirs)]
        accuracy.run(*values, torch.float32)
    parts = [restore_run(path)[0].parts for path in (folder, expected)]
    for part, tensors in parts[1].items():
        assert parts[0][part].keys() == tensors.keys()
        found, right = ([p[part][name].double() for name in tensors] for p in parts)
        off = sum((f - r).square().sum() for f, r in zip(found, right, strict=True)).sqrt()
        size = sum(r.square().sum() for r in right).sqrt()
        accuracy.run([(size + off).item()], [size.item()], torch.float32)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_run_of_one(trained, alone, name, parallel):
    folder, _ = trained
    assert_same_run(folder / f"{name}-{parallel}", alone / f"{name}-none")


@pytest.mark.parametrize("name", RUNS)
def test_processes_hold_the_same_bits_when_a_stage_begins_and_at_the_end(trained, name):
    first, second = (states[name] for states in trained[1])
    assert len(first) == len(second) == 1 + (name == "dbot")
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            accuracy.exact(tensor, theirs[key])
