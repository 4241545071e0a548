"""From a configuration, or from a saved run, to the objects that train."""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmim.data import Source
from fastmim.methods import METHODS, Method
from fastmim.models import MODELS, create_model, did_you_mean
from fastmim.nn import Encoder, FrozenTeacher, MaskedAutoencoder, resize_pos_embed
from fastmim.train.checkpoint import Checkpoint, CheckpointError, check_parts, load
from fastmim.train.config import OWN_TEACHER, Efficiency, Recipe, recipe_from_dict
from fastmim.train.folder import newest_checkpoint

_NAMES = 1000  # of a data set, looked at to tell it from another one


def build_autoencoder(
    method: str,
    recipe: Recipe,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    efficiency: Efficiency | None = None,
) -> MaskedAutoencoder:
    """The network with its initial weights, a function of the recipe's seed.

    Args:
        method: Name of the method that trains it; decides what it predicts.
        recipe: Model, image size and seed.
        channels: Of the images.
        mean: Of each channel on the scale 0..1, for uint8 images.
        std: Likewise.
        efficiency: Memory mode and residual stream of a network that is trained.
    """
    if recipe.model not in MODELS:
        raise ValueError(f"recipe.model: {did_you_mean('model', recipe.model, MODELS)}")
    options = _method_class(method).student_options(recipe.drop_path)
    if recipe.img_size is not None:
        options["img_size"] = recipe.img_size
    if recipe.stage_depths is not None:
        options["depth"] = recipe.stage_depths[0]
    if efficiency is not None:
        options["memory"] = efficiency.memory
        options["residual_dtype"] = torch.bfloat16 if efficiency.residual == "bf16" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return create_model(
            recipe.model,
            in_chans=channels,
            norm_pix_loss=recipe.norm_pix,
            pixel_mean=mean,
            pixel_std=std,
            **options,
        )


def build_method(name: str, recipe: Recipe, autoencoder: MaskedAutoencoder) -> Method:
    """The method of that name around the network, with the recipe's options that it knows.

    Raises:
        ValueError: If the name is unknown; suggests the nearest.
    """
    cls = _method_class(name)
    known = set(inspect.signature(cls).parameters) & set(vars(recipe))
    options = {option: getattr(recipe, option) for option in known}
    if options.get("teachers"):
        options["teachers"] = [
            None if path == OWN_TEACHER else load_teacher(path, autoencoder)
            for path in options["teachers"]
        ]
    # None, of options that are lists too: as the method has it.
    return cls(autoencoder, **{k: v for k, v in options.items() if v is not None})


def _method_class(name: str) -> type[Method]:
    if name not in METHODS:
        raise ValueError(f"method: {did_you_mean('method', name, METHODS)}")
    return METHODS[name]


def networks(method: Method) -> dict[str, nn.Module]:
    """Student and, where there is one, teacher."""
    named: dict[str, nn.Module] = {"student": method.student}
    if method.teacher is not None:
        named["teacher"] = method.teacher.module
    return named


def run_identity(method: str, recipe: dict, source: Source) -> dict:
    """What a checkpoint must agree in with the run that goes on from it.

    Args:
        method: Its name.
        recipe: As plain values.
        source: The images; told from others by number, kind, and names within their folder.
    """
    count = len(source)
    names = [source.name(i * count // _NAMES) for i in range(_NAMES)]
    return {
        "method": method,
        "recipe": recipe,
        "data": {
            "images": count,
            "names": hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[
                :16
            ],
            "channels": source.channels,
            "mean": list(source.mean),
            "std": list(source.std),
        },
    }


def check_checkpoint(checkpoint: Checkpoint, wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compare every tensor of some parts of a checkpoint with what shall take them.

    Args:
        checkpoint: Its other parts are not looked at.
        wanted: Part name to the tensors' names and tensors.

    Raises:
        CheckpointError: If a part is missing or names, shapes or dtypes differ.
    """
    for part, tensors in wanted.items():
        if part not in checkpoint.parts:
            raise CheckpointError(
                f"{checkpoint.path}: holds no {part}, only {', '.join(checkpoint.parts)}; "
                "it is of another method"
            )
        check_parts(checkpoint.parts[part], tensors, part)


def load_parts(method: Method, checkpoint: Checkpoint) -> None:
    """Copy student and teacher of a checkpoint into a method, after comparing every tensor.

    Raises:
        CheckpointError: If a part is missing or names, shapes or dtypes differ.
    """
    modules = networks(method)
    check_checkpoint(checkpoint, {part: module.state_dict() for part, module in modules.items()})
    for part, module in modules.items():
        module.load_state_dict(checkpoint.parts[part])


def untrained_network(identity: dict) -> MaskedAutoencoder:
    """The network of a run as it was before training.

    Args:
        identity: From :func:`run_identity`.

    Raises:
        KeyError, TypeError: If it is something else.
    """
    data = identity["data"]
    return build_autoencoder(
        identity["method"],
        recipe_from_dict(identity["recipe"]),
        data["channels"],
        tuple(data["mean"]),
        tuple(data["std"]),
    )


def load_teacher(path: str | Path, student: Encoder) -> FrozenTeacher:
    """The encoder of a saved run, of any size and patch size, as teacher of a student.

    It sees as many patches as the student: its position table is interpolated to their grid, and
    with another patch size its images are resized.

    Args:
        path: Folder of a run, or of one checkpoint, of any method.
        student: Tells the grid of patches and the channels.

    Raises:
        CheckpointError: If there is no valid checkpoint, or the images have other channels.
    """
    found = _checkpoint_at(path)
    with _of_a_run(found):
        identity = found.state["identity"]
        network = untrained_network(identity)
        depths = identity["recipe"].get("stage_depths")
        part = _method_class(identity["method"]).features_of
    if network.patch_embed.in_chans != student.patch_embed.in_chans:
        raise CheckpointError(
            f"{found.path}: a teacher of {network.patch_embed.in_chans} channels for a student of "
            f"{student.patch_embed.in_chans}"
        )
    size = tuple(side * network.patch_size for side in student.grid_size)
    depth = depths[found.state["stage"]] if depths else len(network.blocks)
    encoder = network.fresh_encoder(img_size=size, depth=depth, drop_path=0.0)
    saved = found.parts[part]
    table = resize_pos_embed(saved["pos_embed"], network.grid_size, student.grid_size)
    wanted = encoder.state_dict()
    state = {**{name: saved[name] for name in wanted if name in saved}, "pos_embed": table}
    check_parts(state, wanted, f"{found.path}: teacher")
    encoder.load_state_dict(state)
    return FrozenTeacher(encoder, img_size=size)


def teacher_identity(paths: tuple[str, ...]) -> list[str]:
    """What tells the teachers of :class:`Recipe` from others at the same paths.

    Args:
        paths: As ``Recipe.teachers`` has them.
    """
    return [
        path
        if path == OWN_TEACHER
        else hashlib.sha256(
            (_checkpoint_at(path).path / "manifest.json").read_bytes()  # holds sums of the weights
        ).hexdigest()[:16]
        for path in paths
    ]


def restore_run(path: str | Path) -> tuple[Checkpoint, Method]:
    """The method of a saved run with its newest valid weights.

    Args:
        path: Folder of a run, or of one checkpoint.

    Raises:
        CheckpointError: If there is no valid checkpoint.
    """
    found = _checkpoint_at(path)
    with _of_a_run(found):
        identity = found.state["identity"]
        recipe = recipe_from_dict(identity["recipe"])
        method = build_method(identity["method"], recipe, untrained_network(identity))
        for stage in range(1, found.state.get("stage", 0) + 1):
            method.begin_stage(stage)
    load_parts(method, found)
    return found, method


def _checkpoint_at(path: str | Path) -> Checkpoint:
    path = Path(path)
    found = load(path) if (path / "manifest.json").is_file() else newest_checkpoint(path)
    if found is None:
        raise CheckpointError(
            f"{path}: holds no checkpoint; expected the folder of a run that fastmim pretrain has "
            "written"
        )
    return found


@contextlib.contextmanager
def _of_a_run(found: Checkpoint) -> Iterator[None]:
    """Say of a state without the entries of a run that it is none."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{found.path}: not of a pre-training run, or of another version of fastmim: {error}"
        ) from error
