"""Tiny pre-training runs, in this process and in others, for the tests of training."""

import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from fastmim.models import MODELS
from fastmim.train import Data, Efficiency, Engine, Evaluation, Output, Pretrain, Recipe
from fastmim.train.config import to_dict

# Registered in every process that imports this module.
MODELS["nano"] = dict(
    img_size=16,
    patch_size=4,
    embed_dim=32,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
MODELS["nano_deep"] = {**MODELS["nano"], "depth": 3, "decoder_depth": 2}
# Imported once for all processes that tests start; DDP and FSDP2 take seconds for theirs.
PRELOADED = ["fastmim.cli", "pytest", "torch._dynamo", "torch.distributed.fsdp"]
LIMIT = 300  # seconds after which a process hangs; 60 were too few where thirty used each core
# Fields of metrics.jsonl that depend on the clock.
TIMES = ("images_per_second", "data_wait", "teacher_time", "peak_memory_gib", "seconds")


def recipe(**changes) -> Recipe:
    small = dict(model="nano", batch_size=256, epochs=4, warmup_epochs=1, base_lr=1e-2)
    return Recipe(**{**small, **changes})


def pretrain(
    folder: Path,
    *,
    data=None,
    efficiency=None,
    eval=None,
    output=None,
    recipe=recipe(),  # noqa: B008 - frozen
    **options,
) -> Pretrain:
    """A run of 28 steps on the digits, of a fiftieth of a second each."""
    output = {"name": "run", "log_every": 4, "checkpoint_every": 5, "pictures": 0, **(output or {})}
    return Pretrain(
        data=Data(**(data or {})),
        recipe=recipe,
        efficiency=Efficiency(**{"threads": 1, **(efficiency or {})}),
        eval=Evaluation(**{"knn_at_end": False, **(eval or {})}),
        output=Output(folder=folder, **output),
        **options,
    )


def arguments(folder: Path, *more: str) -> list[str]:
    """The run of :func:`pretrain` as words of the command line."""
    options = folder.with_name(f"{folder.name}.yaml")
    options.write_text(yaml.safe_dump(to_dict(pretrain(folder))))
    return ["pretrain", "--config", str(options), *more]


def saved_bytes(folder: Path) -> dict[str, bytes]:
    """Every tensor file of the newest checkpoint of a run, and its step, to the byte."""
    newest = max((folder / "checkpoints").glob("step-*"))
    files = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    return {"newest": newest.name.encode(), **files}


def metrics(folder: Path) -> list[dict]:
    """The lines of a run without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def write_images(folder: Path, count: int, *, prefix: str = "image", size: int = 16) -> None:
    """JPEG files of noise, each unlike the others."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{prefix}-{i:03}.jpg")


class Command:
    """``fastmim <argv>`` in a process of its own; what it prints goes to a file.

    The process is forked from a server that has imported torch once.

    Args:
        argv: Words of the command line, or what is called instead.
        log: File for standard output and error.
        prepare: Called first in the process, to inject a fault.
    """

    def __init__(self, argv, log: Path, prepare=None) -> None:
        root = str(Path(__file__).parents[1])
        if root not in sys.path:  # the server takes it over, and imports this module by its name
            sys.path.append(root)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.log = log
        self.process = context.Process(target=_command, args=(argv, log, prepare))
        here = os.getcwd()
        # The server looks for fastmim where it starts before it looks among installed packages,
        # and a checkout may lack the compiled kernels that the installed package has.
        os.chdir(log.parent)
        try:
            forkserver.ensure_running()
        finally:
            os.chdir(here)
        self.process.start()

    def wait_for(self, happened) -> None:
        """Until ``happened()`` is true or the process has ended."""
        while self.process.is_alive() and not happened():
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def finish(self) -> int:
        """Exit status; negative: killed by that signal."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, f"hangs: {self.printed()}"
        return self.process.exitcode

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def start_ranks(argv, folder: Path, prepare=None, world: int = 2) -> list[Command]:
    """Processes that train together, started as torchrun does.

    Args:
        argv: As of :class:`Command`; or a list of these, one for each.
        folder: For the files of what each rank prints.
        prepare: Called with the rank, first in each.
        world: How many.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    several = isinstance(argv, list) and isinstance(argv[0], list)
    argvs = argv if several else [argv] * world
    return [
        Command(words, folder / f"rank-{rank}.log", partial(_as_rank, rank, world, port, prepare))
        for rank, words in enumerate(argvs)
    ]


def _as_rank(rank: int, world: int, port: int, prepare) -> None:
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    if prepare is not None:
        prepare(rank)


def _command(argv, log: Path, prepare) -> None:
    from fastmim.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    raise SystemExit(argv() if callable(argv) else main(argv))


def slow_steps(seconds: float) -> None:
    """Every optimizer step takes that much longer, and says that it begins."""
    run_step = Engine.run_step

    def slow(*args):
        os.write(1, b"a step begins\n")
        time.sleep(seconds)
        return run_step(*args)

    Engine.run_step = slow


def die_in_save(call: int) -> None:
    """SIGKILL to itself at that fsync or rename, all of which belong to checkpoints."""
    calls = itertools.count(1)

    def deadly(function):
        def counted(*args):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return counted

    os.fsync, os.rename = deadly(os.fsync), deadly(os.rename)


def refuse_large_files() -> None:
    """As on a full disk: metrics fit, checkpoints do not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
