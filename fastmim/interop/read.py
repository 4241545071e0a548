"""Other people's checkpoint files, read without running anything that is in them."""

import argparse
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.train.checkpoint import Checkpoint, CheckpointError, load, parse_safetensors
from fastmim.train.folder import CHECKPOINTS, newest_checkpoint

METADATA = "fastmim"  # key of our own header in a safetensors file
_MAX_CONFIG = 1 << 20  # bytes of a config.json


@dataclass(frozen=True)
class File:
    """A file as it lies there; nothing is renamed or judged yet.

    Attributes:
        path: Where it is.
        contents: Tensors by name, or what the authors' scripts saved around them.
        header: What `fastmim convert` wrote beside the tensors; empty for other files.
        config: config.json of a Hugging Face folder; empty for other files.
        checkpoint: The checkpoint, if the file is one of fastmim.
    """

    path: Path
    contents: dict[str, Any]
    header: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


def read(path: str | os.PathLike[str]) -> File:
    """Read a checkpoint of any known kind.

    A ``.pth`` passes ``torch.load`` with ``weights_only=True``; of classes only
    ``argparse.Namespace`` is allowed, which the authors' training files hold. There is no other
    way in: what needs more is refused and was not run.

    Args:
        path: A ``.pth``/``.pt``/``.bin`` or ``.safetensors`` file, a Hugging Face folder, or the
            folder of a fastmim run or checkpoint.

    Raises:
        CheckpointError: The file is not there, damaged, or holds more than plain data.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    file = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    _check_tensors(file)
    return file


def _read_folder(path: Path) -> File:
    weights, config = path / "model.safetensors", path / "config.json"
    if weights.is_file():
        file = read(weights)
        values = _read_config(config) if config.is_file() else {}
        return File(path, file.contents, file.header, values)
    if (path / "manifest.json").is_file():
        checkpoint = load(path)
    elif (path / CHECKPOINTS).is_dir():
        checkpoint = newest_checkpoint(path)
    else:
        checkpoint = None
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: expected a folder with model.safetensors (Hugging Face), or a run or "
            "checkpoint of fastmim; sharded weights are not read"
        )
    return File(path, dict(checkpoint.parts), checkpoint=checkpoint)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise CheckpointError(f"{path}: more than {_MAX_CONFIG} bytes")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def _read_safetensors(path: Path) -> File:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    tensors = parse_safetensors(path, data)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    try:
        header = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {METADATA} header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its {METADATA} header is no object")
    return File(path, tensors, header)


def _read_pth(path: Path) -> File:
    try:
        _check_zip(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of formats that are read all the same
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can make the parser raise anything
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(
            f"{path}: expected a dict of tensors or of state_dicts, got {type(contents).__name__}"
        )
    return File(path, contents)


def _check_zip(path: Path) -> None:
    """torch.load inflates what it is given, and compares no record's CRC-32."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: {record.filename} is compressed; expected a file of torch.save, "
                    "which compresses nothing"
                )
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, the CRC-32 of {damaged} differs")


def _reason(error: Exception) -> str:
    """One line. torch's own text advises to switch the protection off."""
    text = str(error)
    plain = "tensors, plain values and argparse.Namespace only"
    named = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"instantiate class ([\w.]+)", text)
    if type(error).__name__ == "UnpicklingError" and named:
        return f"refused, nothing in it was run: it holds {named[1]}; expected {plain}"
    if "weights_only" in text:
        return f"refused, nothing in it was run: expected a file of torch.save with {plain}"
    first = (text.strip().splitlines() or [type(error).__name__])[0]
    return f"damaged, or not written by torch.save: {first[:200]}"


def _check_tensors(file: File) -> None:
    size = file.path.stat().st_size
    for name, tensor in _tensors(file.contents, ""):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(
                f"{file.path}: expected {name} to be dense, got {tensor.layout} on {tensor.device}"
            )
        # Strides of 0 make a small file fill the memory once the tensor is copied.
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{file.path}: {name} has the shape {tuple(tensor.shape)}, more than the file holds"
            )


def _tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
