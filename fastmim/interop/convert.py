"""Weights of others in and out: read, recognise, choose a network, write."""

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from fastmim.interop.choose import Choice, chosen, network_of
from fastmim.interop.describe import Description, describe
from fastmim.interop.layouts import TRAINING, Contents, State, recognise
from fastmim.interop.read import read
from fastmim.interop.write import WRITERS
from fastmim.train.checkpoint import check_parts


def load_weights(path: str | os.PathLike[str], **choice) -> tuple[State, Description]:
    """One network of a checkpoint of any known layout, under its published names.

    Args:
        path: See :func:`fastmim.interop.read.read`.
        **choice: Fields of :class:`Choice`: which network, and in which form.

    Returns:
        Tensors on the CPU in the published order, and what was found.

    Raises:
        CheckpointError: The file is damaged, hostile or of an unknown layout, or its tensors are
            not all there, too many, or of the wrong sizes: names them.
        ValueError: The choice does not fit the file.
    """
    path, wanted = Path(path), Choice(**choice)
    contents = recognise(read(path))
    network = network_of(contents, wanted.which)
    contents, description = chosen(contents, network, wanted, path)
    return contents.networks[network], description


def load_into(model: nn.Module, path: str | os.PathLike[str], **choice) -> Description:
    """Load one network of a checkpoint into a model with published names.

    Every name and shape is compared before anything is copied. With ``partial=True`` what both
    have is copied and the rest of the model stays as it is.

    Args:
        model: For example from ``fastmim.create_model``.
        path: See :func:`fastmim.interop.read.read`.
        **choice: Fields of :class:`Choice`.

    Returns:
        What was found. ``missing`` are the model's tensors that the file lacks, ``unexpected``
        those of the file that the model lacks.

    Raises:
        CheckpointError: As :func:`load_weights`, or the model differs; names the tensors.
    """
    state, description = load_weights(path, **choice)
    target = model.state_dict()
    missing = [name for name in target if name not in state]
    unexpected = [name for name in state if name not in target]
    if choice.get("partial"):
        state = {name: tensor for name, tensor in state.items() if name in target}
        target = {name: target[name] for name in state}
    state = {n: t.to(target[n].dtype) if n in target else t for n, t in state.items()}
    check_parts(state, target, str(path))
    model.load_state_dict(state, strict=not choice.get("partial"))
    return replace(description, missing=missing, unexpected=description.unexpected + unexpected)


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    to: str = "fastmim",
    data: str | None = None,
    **choice,
) -> tuple[Description, list[Path]]:
    """Recognise a checkpoint and write it in another layout.

    Args:
        path: See :func:`fastmim.interop.read.read`.
        out: For ``to="fastmim"`` a ``.safetensors`` file for one network, or a folder for all of
            them with the optimizer's state; for ``authors`` a ``.pth`` file; for ``timm`` a
            ``.safetensors`` file; for ``hf`` a folder. None: only say what the file is.
        to: ``fastmim``, ``authors``, ``timm`` or ``hf``.
        data: Images with which the run in a folder goes on.
        **choice: Fields of :class:`Choice`.

    Returns:
        What was found, and the files written.

    Raises:
        CheckpointError, ValueError: As :func:`load_weights`, or the layout cannot hold this.
        OSError: If the file cannot be written.
    """
    path, wanted = Path(path), Choice(**choice)
    if to not in WRITERS:
        raise ValueError(f"convert: expected --to {', '.join(WRITERS)}; got {to}")
    contents = recognise(read(path))
    network = network_of(contents, wanted.which)
    if out is None:
        return describe(contents, network, path, wanted.model), []
    out = Path(out).expanduser()
    if data is not None and (to != "fastmim" or out.suffix == ".safetensors"):
        raise ValueError("convert: --data makes a run to go on with; give --out a folder")
    whole = to == "authors" or (to == "fastmim" and (data is not None or not out.suffix))
    if whole and wanted.which is None:
        contents, description = _all_chosen(contents, wanted, path)
    else:
        contents, description = chosen(contents, network, wanted, path)
        contents = replace(contents, networks={network: contents.networks[network]})
    if not whole or wanted != Choice(model=wanted.model, partial=wanted.partial):
        contents = _without_training(contents)
    out.parent.mkdir(parents=True, exist_ok=True)
    description = replace(description, left_out=contents.left_out)
    return description, WRITERS[to](out, contents, description, data)


def _all_chosen(contents: Contents, wanted: Choice, path: Path) -> tuple[Contents, Description]:
    """Every network in the form that was asked for; the description is of the student."""
    for network in sorted(contents.networks, reverse=True):
        # dBOT's teacher may have another depth than the model.
        told = wanted if network == "student" else wanted._replace(model=None)
        contents, description = chosen(contents, network, told, path)
    return contents, description


def _without_training(contents: Contents) -> Contents:
    left = [key for key in contents.training if key in TRAINING]
    return replace(contents, training={}, left_out=contents.left_out + left)
