"""From a configuration, or from a saved run, to the objects that train."""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmim.data import Source
from fastmim.methods import METHODS, Method, seeded
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
    with seeded(recipe.seed):
        return create_model(
            recipe.model,
            in_chans=channels,
            norm_pix_loss=recipe.norm_pix,
            pixel_mean=mean,
            pixel_std=std,
            **options,
        )


def build_method(
    name: str,
    recipe: Recipe,
    autoencoder: MaskedAutoencoder,
    teachers: Sequence[FrozenTeacher | None] | None = None,
) -> Method:
    """The method of that name around the network, with the recipe's options that it knows.

    Args:
        name: Of the method.
        recipe: Its options.
        autoencoder: The student.
        teachers: Of each stage, in place of the files that the recipe names.

    Raises:
        ValueError: If the name is unknown; suggests the nearest.
    """
    cls = _method_class(name)
    known = set(inspect.signature(cls).parameters) & set(vars(recipe))
    options = {option: getattr(recipe, option) for option in known}
    if teachers is not None:
        options["teachers"] = teachers
    elif options.get("teachers"):
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
    """The encoder of a saved run or of a published file, of any size, as teacher of a student.

    It sees as many patches as the student: its position table is interpolated to their grid, and
    with another patch size its images are resized.

    Args:
        path: Folder of a run, or of one checkpoint, of any method; or a file of any layout that
            ``fastmim convert`` reads, of which it takes the network that the authors fine-tune.
        student: Tells the grid of patches and the channels.

    Raises:
        CheckpointError: If there is no valid checkpoint, the images have other channels, or the
            file does not tell the sizes.
    """
    place = Path(path)
    found = _published_encoder(place, student) if place.is_file() else _encoder_of_run(place)
    if found.in_chans != student.patch_embed.in_chans:
        raise CheckpointError(
            f"{path}: a teacher of {found.in_chans} channels for a student of "
            f"{student.patch_embed.in_chans}"
        )
    size = tuple(side * found.patch_size for side in student.grid_size)
    encoder = found.make(img_size=size, drop_path=0.0)
    table = resize_pos_embed(found.state["pos_embed"], found.grid, student.grid_size)
    wanted = encoder.state_dict()
    state = {n: found.state[n].to(wanted[n].dtype) for n in wanted if n in found.state}
    state["pos_embed"] = table.to(wanted["pos_embed"].dtype)
    check_parts(state, wanted, f"{path}: teacher")
    encoder.load_state_dict(state)
    return FrozenTeacher(encoder, img_size=size)


class _SavedEncoder(NamedTuple):
    """What a teacher is made of."""

    state: dict[str, Tensor]  # a decoder's tensors may be among them
    grid: tuple[int, int]
    patch_size: int
    in_chans: int
    make: Callable[..., Encoder]


def _encoder_of_run(path: Path) -> _SavedEncoder:
    found = _checkpoint_at(path)
    with _of_a_run(found):
        identity = found.state["identity"]
        network = untrained_network(identity)
        depths = identity["recipe"].get("stage_depths")
        part = _method_class(identity["method"]).features_of
    return _SavedEncoder(
        found.parts[part],
        network.grid_size,
        network.patch_size,
        network.patch_embed.in_chans,
        functools.partial(
            network.fresh_encoder,
            depth=depths[found.state["stage"]] if depths else len(network.blocks),
        ),
    )


def _published_encoder(path: Path, student: Encoder) -> _SavedEncoder:
    state, found, sizes = _published(path)
    make = functools.partial(  # it normalises uint8 images as the student does
        student.fresh_encoder, **sizes, memory="standard", residual_dtype=None
    )
    return _SavedEncoder(state, found.grid, found.sizes.patch_size, found.sizes.in_chans, make)


def published_encoders(path: str | Path, source: Source) -> dict[str, Encoder]:
    """Every network of a published file, without its decoder, and one with initial weights.

    Args:
        path: Of any layout that ``fastmim convert`` reads.
        source: Tells how uint8 images are normalised.

    Raises:
        CheckpointError: If the file is damaged or unknown, or does not tell the sizes.
    """
    path, which, encoders = Path(path), [None], {}
    while which:
        state, found, sizes = _published(path, which.pop())
        if source.channels == sizes["in_chans"]:
            sizes |= dict(pixel_mean=source.mean, pixel_std=source.std)
        encoder = Encoder(img_size=found.img_size, **sizes)
        check_parts(state, encoder.state_dict(), str(path))
        encoder.load_state_dict(state)
        encoders[found.network] = encoder
        which = [name for name in found.available if name not in encoders]
    return {**encoders, "untrained network": encoder.fresh_encoder()}


def _published(path: Path, which: str | None = None) -> tuple[dict[str, Tensor], Any, dict]:
    """Tensors of an encoder, their description, and the arguments of :class:`Encoder`."""
    from fastmim.interop import load_weights  # it makes runs, so its modules import this one

    state, found = load_weights(path, which=which, encoder_only=True)
    if found.grid is None or found.num_heads is None:
        raise CheckpointError(
            f"{path}: the file does not tell the {'heads' if found.grid else 'grid of patches'}; "
            "name its model in fastmim convert --model NAME --out X.safetensors, and take that file"
        )
    sizes = dict(
        embed_dim=found.sizes.embed_dim,
        depth=found.sizes.depth,
        num_heads=found.num_heads,
        patch_size=found.sizes.patch_size,
        in_chans=found.sizes.in_chans,
        mlp_ratio=found.sizes.hidden / found.sizes.embed_dim,
    )
    return state, found, sizes


def teacher_identity(paths: tuple[str, ...]) -> list[str]:
    """What tells the teachers of :class:`Recipe` from others at the same paths.

    Args:
        paths: As ``Recipe.teachers`` has them.
    """
    return [path if path == OWN_TEACHER else _digest(Path(path)) for path in paths]


def _digest(path: Path) -> str:
    """Of a file, or of the manifest of a checkpoint, which holds sums of the weights."""
    if not path.is_file():
        path = _checkpoint_at(path).path / "manifest.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def restore_run(path: str | Path) -> tuple[Checkpoint, Method]:
    """The method of a saved run with its newest valid weights; needs no file of its teachers.

    Args:
        path: Folder of a run, or of one checkpoint.

    Raises:
        CheckpointError: If there is no valid checkpoint.
    """
    found = _checkpoint_at(path)
    with _of_a_run(found):
        identity = found.state["identity"]
        recipe = recipe_from_dict(identity["recipe"])
        last, teachers = found.state.get("stage", 0), None
        if "teacher" in found.state:  # the files that the recipe names may be gone
            encoder = Encoder(**found.state["teacher"])
            teachers = [None] * last + [
                FrozenTeacher(encoder, img_size=encoder.patch_embed.img_size)
            ]
        network = untrained_network(identity)
        method = build_method(identity["method"], recipe, network, teachers)
        for stage in range(1, last + 1):
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
