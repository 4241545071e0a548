"""The authors' files: what their scripts' ``torch.load`` and ``load_state_dict`` expect."""

import argparse
from pathlib import Path
from typing import Any

import torch

from fastmim.interop.describe import Description
from fastmim.interop.layouts import Contents, State
from fastmim.interop.measure import measure
from fastmim.interop.names import published_shapes
from fastmim.interop.optimizer import by_index
from fastmim.interop.resume import args_of, named_optimizer


def authors_files(
    path: Path, contents: Contents, description: Description
) -> dict[Path, dict[str, Any]]:
    """Name and contents of each file, in the layout of the method's own scripts.

    Args:
        path: Of the (student's) file.
        contents: All networks and the training state.
        description: Of the student.
    """
    networks = {
        name: _ordered(state, contents.method, path) for name, state in contents.networks.items()
    }
    student, teacher = networks.get("student"), networks.get("teacher")
    beside = {}
    file: dict[str, Any] = {"model": teacher if student is None else student}
    if student is not None and teacher is not None:
        if contents.method == "rc_mae":
            file = {
                "student": {f"module.{name}": tensor for name, tensor in student.items()},
                "teacher": teacher,
                "student_without_ddp": student,
                "teacher_without_ddp": teacher,
            }
        elif contents.method == "sdae":
            file["model_teacher"] = teacher
        else:
            beside[_teacher_path(path)] = {"model": teacher}
    if student is not None:
        file |= _training(contents, description)
    return {path: file, **beside}


def _teacher_path(path: Path) -> Path:
    """Where dBOT's scripts look for the teacher of checkpoint-X.pth."""
    if path.name.startswith("checkpoint-"):
        return path.with_name(path.name.replace("checkpoint-", "checkpoint-teacher-", 1))
    return path.with_name(f"{path.stem}-teacher{path.suffix}")


def _ordered(state: State, method: str | None, path: Path) -> State:
    """The tensors in the published order: the authors' optimizers go by it."""
    wanted = published_shapes(measure(state, method, path))
    return {name: state[name].contiguous() for name in wanted if name in state}


def _training(contents: Contents, description: Description) -> dict[str, Any]:
    training = contents.training
    optimizer = named_optimizer(contents, description)
    if optimizer is None:
        return {}
    named, groups = optimizer
    saved = {"optimizer": by_index(named, published_shapes(description.sizes), groups)}
    saved |= {key: training[key] for key in ("epoch", "scaler") if key in training}
    args = training.get("args")
    if args is None and training.get("recipe"):
        args = args_of(training["recipe"], contents.method, description)
    if args is not None:
        saved["args"] = argparse.Namespace(**args)
    return saved


def save_pth(path: Path, contents: dict[str, Any]) -> None:
    """torch.save, so that no half file is ever under the name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(contents, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
