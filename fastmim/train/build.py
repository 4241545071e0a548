"""From a configuration, or from a saved run, to the objects that train."""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch

from fastmim.data import Source
from fastmim.methods import METHODS, Method
from fastmim.models import MODELS, create_model, did_you_mean
from fastmim.nn import MaskedAutoencoder
from fastmim.train.checkpoint import Checkpoint, CheckpointError, check_parts, latest, load
from fastmim.train.config import Recipe, recipe_from_dict

CHECKPOINTS = "checkpoints"  # folder within the folder of a run


def build_autoencoder(
    recipe: Recipe, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> MaskedAutoencoder:
    """The network with its initial weights, a function of the recipe's seed.

    Args:
        recipe: Model, image size and seed.
        channels: Of the images.
        mean: Of each channel on the scale 0..1, for uint8 images.
        std: Likewise.
    """
    if recipe.model not in MODELS:
        raise ValueError(f"recipe.model: {did_you_mean('model', recipe.model, MODELS)}")
    size = {} if recipe.img_size is None else {"img_size": recipe.img_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return create_model(
            recipe.model,
            in_chans=channels,
            norm_pix_loss=recipe.norm_pix,
            pixel_mean=mean,
            pixel_std=std,
            **size,
        )


def build_method(name: str, recipe: Recipe, autoencoder: MaskedAutoencoder) -> Method:
    """The method of that name around the network, with the recipe's options that it knows.

    Raises:
        ValueError: If the name is unknown; suggests the nearest.
    """
    if name not in METHODS:
        raise ValueError(f"method: {did_you_mean('method', name, METHODS)}")
    cls = METHODS[name]
    known = set(inspect.signature(cls).parameters) & set(vars(recipe))
    return cls(autoencoder, **{option: getattr(recipe, option) for option in known})


def run_identity(method: str, recipe: dict, source: Source) -> dict:
    """What a checkpoint must agree in with the run that goes on from it."""
    return {
        "method": method,
        "recipe": recipe,
        "data": {
            "images": len(source),
            "channels": source.channels,
            "mean": list(source.mean),
            "std": list(source.std),
        },
    }


def load_parts(method: Method, checkpoint: Checkpoint) -> None:
    """Copy student and teacher of a checkpoint into a method, after comparing every tensor.

    Raises:
        CheckpointError: If a part is missing or names, shapes or dtypes differ.
    """
    modules = {"student": method.student}
    if method.teacher is not None:
        modules["teacher"] = method.teacher.module
    for part, module in modules.items():
        if part not in checkpoint.parts:
            raise CheckpointError(
                f"{checkpoint.path}: holds no {part}, only {', '.join(checkpoint.parts)}; "
                "it is of another method"
            )
        check_parts(checkpoint.parts[part], module.state_dict(), part)
    for part, module in modules.items():
        module.load_state_dict(checkpoint.parts[part])


def restore_run(
    path: str | Path, *, on_invalid: Callable[[Path, str], None]
) -> tuple[Checkpoint, Method, Recipe]:
    """The method of a saved run with its newest valid weights.

    Args:
        path: Folder of a run, or of one checkpoint.
        on_invalid: Called with folder and reason for each checkpoint that is refused.

    Raises:
        CheckpointError: If there is no valid checkpoint.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        checkpoint = load(path)
    else:
        checkpoint = latest(path / CHECKPOINTS, on_invalid=on_invalid)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: no valid checkpoint in {path / CHECKPOINTS}; expected the folder of a run "
            "that fastmim pretrain has written"
        )
    identity = checkpoint.state["identity"]
    recipe, data = recipe_from_dict(identity["recipe"]), identity["data"]
    autoencoder = build_autoencoder(
        recipe, data["channels"], tuple(data["mean"]), tuple(data["std"])
    )
    method = build_method(identity["method"], recipe, autoencoder)
    load_parts(method, checkpoint)
    return checkpoint, method, recipe
