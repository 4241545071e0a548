"""From any known layout to another: read, recognise, choose, write."""

import os
from dataclasses import replace
from pathlib import Path

from fastmim.interop.choose import Choice, chosen, network_of
from fastmim.interop.describe import Description, describe
from fastmim.interop.layouts import TRAINING, Contents, recognise
from fastmim.interop.read import read
from fastmim.interop.write import WRITERS


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
        CheckpointError, ValueError: As :func:`fastmim.interop.load_weights`, or the layout cannot
            hold this.
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
