"""One network of a checkpoint of any known layout, as tensors or into a model."""

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from fastmim.interop.choose import Choice, chosen, network_of
from fastmim.interop.describe import Description
from fastmim.interop.layouts import State, recognise
from fastmim.interop.read import read
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
