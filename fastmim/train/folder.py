"""The folder of a run: which one, what it already holds, and that one process writes to it."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from fastmim.train import checkpoint as checkpoints
from fastmim.train.checkpoint import Checkpoint, CheckpointError
from fastmim.train.config import Pretrain, to_dict
from fastmim.train.log import say

CHECKPOINTS = "checkpoints"  # folder within the folder of a run


def run_folder(config: Pretrain) -> Path:
    """Where the run is written: ``output.folder/output.name``, or with a number if it must be new.

    Args:
        config: Of the run.
    """
    name = config.output.name or f"{config.preset}-{config.method}"
    folder = Path(config.output.folder).expanduser() / name
    number = 2
    while config.resume == "never" and folder.exists():
        folder = folder.with_name(f"{name}-{number}")
        number += 1
    return folder


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint of a run, None if it has none yet; says which are refused.

    Raises:
        CheckpointError: If there are checkpoints and none is valid.
    """
    refused = []

    def refuse(path: Path, reason: str) -> None:
        refused.append(path)
        say(f"warning: checkpoint {path.name} is refused: {reason}")

    found = checkpoints.latest(folder / CHECKPOINTS, on_invalid=refuse, refuse_nonfinite=True)
    if found is None and refused:
        raise CheckpointError(
            f"{folder / CHECKPOINTS}: none of the {len(refused)} checkpoints is valid; nothing was "
            "changed. Bring one back from a backup, or train anew with --resume never"
        )
    return found


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it; the kernel lets go when the process dies.

    Raises:
        ValueError: If another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            # Not flock: the loader's workers would inherit it, and they outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
                raise ValueError(
                    f"{folder}: another process is training in it; wait for it, or pass another "
                    "--output.name"
                ) from error
        yield


def write_config(folder: Path, config: Pretrain) -> Path:
    """config.yaml, with which ``fastmim pretrain --config`` goes on with this very run.

    Args:
        folder: Of the run.
        config: Of the run.
    """
    output = replace(config.output, folder=folder.parent, name=folder.name)
    config = replace(config, resume="auto", stop_after=None, output=output)
    path = folder / "config.yaml"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    os.replace(temporary, path)
    return path
