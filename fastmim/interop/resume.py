"""An official run as a run of fastmim, for ``fastmim pretrain`` to go on with."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmim.data import Source, open_source
from fastmim.interop.describe import Description, differing
from fastmim.interop.layouts import Contents
from fastmim.interop.names import published_shapes
from fastmim.interop.optimizer import by_name, check_named
from fastmim.interop.options import recipe_options, script_options
from fastmim.train import checkpoint as checkpoints
from fastmim.train.build import run_identity
from fastmim.train.checkpoint import CheckpointError
from fastmim.train.config import (
    Data,
    Efficiency,
    Output,
    Pretrain,
    Recipe,
    recipe_from_dict,
    to_dict,
)
from fastmim.train.folder import CHECKPOINTS, write_config
from fastmim.train.log import Window

# The recipe that the configuration of a run names as its start.
_PRESETS = {
    "mae": "mae_script_defaults",
    "rc_mae": "rc_mae_base_1600",
    "dbot": "dbot_base_1600",
    "sdae": "sdae_base_300",
}


def named_optimizer(
    contents: Contents, description: Description
) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """AdamW's state by name and the options of its groups, None if the file has none."""
    training, shapes = contents.training, published_shapes(description.sizes)
    if "named" in training:
        check_named(training["named"], shapes)
        return training["named"], training.get("groups") or _groups(training["recipe"])
    if not training.get("optimizer"):
        return None
    return by_name(training["optimizer"], shapes)


def _groups(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Options of the groups of a run that fastmim trained."""
    try:
        common = dict(lr=0.0, betas=tuple(recipe["betas"]), eps=recipe["adam_eps"], amsgrad=False)
        return [{"weight_decay": decay, **common} for decay in (0.0, recipe["weight_decay"])]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"optimizer: the checkpoint does not tell the options of its groups: {error}"
        ) from error


def recipe_of(contents: Contents, description: Description, groups: list[dict[str, Any]]) -> Recipe:
    """The recipe that the options of an official run stand for.

    Raises:
        CheckpointError: If an option is missing, or no model of fastmim has these sizes.
    """
    if contents.method not in _PRESETS:
        raise CheckpointError(
            f"convert: {contents.layout} does not tell the method, so pretrain cannot go on; leave "
            "--data out to keep all of it in the folder"
        )
    if description.model is None or differing(description.model, description.sizes):
        raise CheckpointError(
            "convert: no model in fastmim.MODELS has these sizes, so no run can go on from here; "
            "for the weights alone give --out a name that ends in .safetensors"
        )
    options = recipe_options(contents.method, contents.training.get("args", {}), description)
    try:
        return Recipe(
            model=description.model,
            img_size=description.img_size,
            betas=tuple(groups[0]["betas"]),
            adam_eps=groups[0]["eps"],
            **options,
        )
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"convert: the file's options make no recipe: {error}") from error


def args_of(recipe: dict[str, Any], method: str | None, description: Description) -> dict[str, Any]:
    """The options of the authors' scripts that a recipe stands for.

    Args:
        recipe: As plain values.
        method: Whose script it is.
        description: Of the student.

    Raises:
        CheckpointError: If it is no recipe of this version.
    """
    try:
        known = recipe_from_dict(recipe)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's recipe is of another version: {error}") from error
    return script_options(known, method, description)


def write_run(folder: Path, contents: Contents, description: Description, data: str | None) -> Path:
    """Write a checkpoint with all that the file holds, by name.

    With ``data``, the images that the run goes on with, it is a run of fastmim: config.yaml beside
    it continues with these weights, moments, epoch and schedules. Order of samples, crops and masks
    are fastmim's from there on. Without, it keeps everything for another conversion.

    Returns:
        The folder of the checkpoint, or config.yaml if the run can go on.

    Raises:
        CheckpointError: If the file has no such state.
        ValueError: If ``data`` cannot be trained on.
    """
    if (folder / CHECKPOINTS).exists():
        raise ValueError(f"convert: {folder} holds a run already; choose another --out")
    optimizer = named_optimizer(contents, description)
    parts = dict(contents.networks)
    told = {
        "layout": contents.layout,
        "method": contents.method,
        "model": description.model,
        "norm_pix_loss": contents.norm_pix,
        "args": _plain(contents.training.get("args", {})),
    }
    told |= {k: _plain(contents.training[k]) for k in ("epoch", "scaler") if k in contents.training}
    state: dict[str, Any] = {"converted": told}
    step = 0
    if optimizer is not None:
        parts["optimizer"], groups = optimizer
        told["groups"] = groups
        step = int(parts["optimizer"]["step"])
    config = None
    if data is not None:
        if optimizer is None or "epoch" not in contents.training:
            raise CheckpointError(
                f"convert: {contents.layout} holds no optimizer state and epoch to go on from; "
                "leave --data out, and give --out a name that ends in .safetensors"
            )
        recipe = recipe_of(contents, description, groups)
        _check_teacher(contents, recipe)
        config, step, more = _run(folder, contents, recipe, data)
        state |= more
    path = checkpoints.save(folder / CHECKPOINTS, step, parts, state)
    return path if config is None else write_config(folder, config)


def _run(
    folder: Path, contents: Contents, recipe: Recipe, data: str
) -> tuple[Pretrain, int, dict[str, Any]]:
    """Configuration, step and trainer's state of the run that goes on."""
    args = contents.training["args"]
    source: Source = open_source(data)
    per_epoch = len(source) // recipe.batch_size
    if not per_epoch:
        raise ValueError(
            f"convert: {data} has {len(source)} images, fewer than the run's batch of "
            f"{recipe.batch_size}"
        )
    channels = contents.networks["student"]["patch_embed.proj.weight"].shape[1]
    if source.channels != channels:
        raise ValueError(
            f"convert: the images of {data} have {source.channels} channels, the network takes "
            f"{channels}"
        )
    official = recipe.momentum_schedule == "official"
    # As released the teacher moves after every micro-batch, of all processes together.
    micro_batch = args["batch_size"] * (args.get("world_size", 1) if official else 1)
    config = Pretrain(
        method=contents.method,
        preset=_PRESETS[contents.method],
        data=Data(path=data),
        recipe=recipe,
        efficiency=Efficiency(micro_batch=micro_batch),
        output=Output(folder=folder.parent, name=folder.name),
    )
    identity = run_identity(contents.method, to_dict(recipe), source)
    if official:
        identity["micro_batch"] = micro_batch
    epoch = contents.training["epoch"]
    state = {
        "identity": identity,
        "stage": _stage(contents, recipe, epoch),
        "config": to_dict(config),
        "precision": "fp16",
        "skipped_steps": 0,
        "bad_in_a_row": 0,
        "log_window": asdict(Window()),
    }
    return config, (epoch + 1) * per_epoch, state


def _check_teacher(contents: Contents, recipe: Recipe) -> None:
    """Refuse to go on without the teacher that the method has."""
    if contents.method == "mae" or "teacher" in contents.networks:
        return
    where = "model_teacher in the file" if contents.method == "sdae" else "teacher in the file"
    if contents.method == "dbot":
        where = "checkpoint-teacher-X.pth beside checkpoint-X.pth, both with their own names"
    raise CheckpointError(f"convert: the run cannot go on without its teacher; expected {where}")


def _stage(contents: Contents, recipe: Recipe, epoch: int) -> int:
    """Stage of the networks in a file that was written after an epoch.

    Where a stage ends, dBOT writes one file before student and teacher are replaced; in one that
    is written after it, the student is new.
    """
    student = contents.networks["student"]
    new = all(
        bool((tensor == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all())
        for name, tensor in student.items()
        if tensor.ndim == 1 and not name.startswith("patch_embed.")
    )
    return recipe.stage_at(epoch + new)


def _plain(value: Any) -> Any:
    """JSON values; what has none becomes its text."""
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else repr(value)
