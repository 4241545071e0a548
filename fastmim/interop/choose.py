"""Which part of a file is wanted, and in which form."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fastmim.interop.describe import Description, count_parameters, describe
from fastmim.interop.layouts import Contents, State
from fastmim.interop.names import CLASSIFIER, ENCODER, Sizes, published_shapes
from fastmim.interop.positions import resized
from fastmim.train.checkpoint import CheckpointError


class Choice(NamedTuple):
    """Which part of a file, and in which form.

    Attributes:
        which: "student" or "teacher"; None: the one the authors fine-tune.
        encoder_only: Without decoder and mask token.
        img_size: Height and width whose position tables are wanted, or None.
        sincos: Compute the tables for ``img_size`` anew instead of resampling them.
        partial: Go on without missing tensors and leave unexpected ones out.
        model: Name in ``fastmim.MODELS`` that the sizes must be those of, or None.
    """

    which: str | None = None
    encoder_only: bool = False
    img_size: int | tuple[int, int] | None = None
    sincos: bool = False
    partial: bool = False
    model: str | None = None


def network_of(contents: Contents, which: str | None) -> str:
    """The network asked for, or the one that the authors' own fine-tuning takes."""
    there = contents.networks
    if which is None:
        return (
            "teacher" if "teacher" in there and contents.method == "rc_mae" else next(iter(there))
        )
    if which not in there:
        raise ValueError(f"convert: the file holds no {which}, only {', '.join(there)}")
    return which


def chosen(
    contents: Contents, network: str, choice: Choice, path: Path
) -> tuple[Contents, Description]:
    """The contents with one network in the form that was asked for, and its description."""
    description = describe(contents, network, path, choice.model)
    wrong = {"missing": description.missing, "unexpected": description.unexpected}
    wrong = {what: names for what, names in wrong.items() if names}
    if wrong and not choice.partial:
        lists = "; ".join(f"{len(n)} {what}: {', '.join(n)}" for what, n in wrong.items())
        raise CheckpointError(
            f"{path}: not the tensors of {description.sizes.kind} in {contents.layout}: {lists}; "
            "pass --partial to go on without them"
        )
    state = contents.networks[network]
    sizes = description.sizes
    if choice.encoder_only:
        if sizes.kind == CLASSIFIER and sizes.pool == "mean":
            raise ValueError(
                "convert: a fine-tuned network with mean pooling has no encoder norm, so no "
                "encoder alone; leave --encoder-only out"
            )
        sizes = _encoder_of(sizes)
    if choice.img_size is not None:
        state, sizes = _at_size(state, sizes, description, choice)
    wanted = published_shapes(sizes)
    state = {name: state[name] for name in wanted if name in state}
    grid = description.grid if choice.img_size is None else _grid(choice.img_size, sizes)
    return (
        replace(contents, networks={**contents.networks, network: state}),
        replace(
            description,
            sizes=sizes,
            grid=grid,
            parameters=count_parameters(state),
        ),
    )


def _encoder_of(sizes: Sizes) -> Sizes:
    return Sizes(
        ENCODER,
        sizes.embed_dim,
        sizes.depth,
        sizes.patch_size,
        sizes.in_chans,
        sizes.tokens,
        sizes.hidden,
    )


def _grid(img_size: int | tuple[int, int], sizes: Sizes) -> tuple[int, int]:
    pixels = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pixels) != 2 or any(n < 1 or n % sizes.patch_size for n in pixels):
        raise ValueError(
            f"convert: expected --img-size to be a multiple of the patch size {sizes.patch_size}, "
            f"got {' x '.join(map(str, pixels))}"
        )
    return tuple(n // sizes.patch_size for n in pixels)


def _at_size(
    state: State, sizes: Sizes, description: Description, choice: Choice
) -> tuple[State, Sizes]:
    if description.grid is None:
        raise ValueError(
            f"convert: {sizes.tokens - 1} learnt positions, and nothing says of which grid; the "
            "tables cannot be resized"
        )
    grid = _grid(choice.img_size, sizes)
    state = resized(state, description.grid, grid, sincos=choice.sincos)
    return state, replace(sizes, tokens=grid[0] * grid[1] + 1)
