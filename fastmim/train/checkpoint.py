"""Checkpoints that survive a kill, a full disk and a flipped bit: save, load, latest.

A checkpoint is a folder; there is no pickle in it::

    <root>/step-00001234/
        student.safetensors    one file per part
        optimizer.safetensors
        state.json             what the caller gave: config, counters
        manifest.json          size and SHA-256 of every file above, and of itself

It is written as ``<root>/.step-00001234.tmp-<pid>-<token>``, every file and the folder are
fsynced, then it is renamed and ``<root>`` is fsynced. Older ones go only afterwards, so at every
instant the newest or the previous checkpoint is whole. Nothing is trusted by its name: bytes are
hashed first and parsed second, from the same copy in memory. Local Linux file systems; on others
the promise is as good as their fsync and rename. One process saves (rank 0), any may load.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = "fastmim-checkpoint"
VERSION = 1

_MANIFEST = "manifest.json"
_STATE = "state.json"
_MAX_HEADER = 8 << 20  # bytes; 100 times the header of a ViT-H with its optimizer
_MAX_TENSORS = 100_000  # per part
_MAX_MANIFEST = 1 << 20  # bytes
_MAX_STATE = 64 << 20  # bytes
_MAX_DEPTH = 64  # nesting of state; far below the recursion limit of the JSON parser
_CHUNK = 8 << 20  # bytes hashed and written at a time
_SLACK = 1 << 20  # bytes on top of the files: folder, inodes, manifest

_DTYPES = {  # safetensors' names of the dtypes that are written and accepted
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_FILE = re.compile(rf"{_PART.pattern}\.safetensors")
# ".replaced-" marks a checkpoint that makes room for another one of the same step
_FOLDER = re.compile(r"step-([0-9]{8,18})(\.replaced-[0-9a-f]{8})?")
_TEMPORARY = re.compile(r"\.step-[0-9]+\.tmp-[0-9]+-[0-9a-f]{8}")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, hostile, or not the one that was asked for."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written; the older ones are untouched.

    Attributes:
        errno: Error number, e.g. ``errno.ENOSPC``.
        path: Checkpoint that was to be written.
        needed: Bytes it takes.
        free: Bytes that were free before writing, None where that is not known.
    """

    def __init__(self, cause: OSError, path: Path, needed: int, free: int | None) -> None:
        self.errno = cause.errno
        self.path = path
        self.needed = needed
        self.free = free
        name = errno.errorcode.get(cause.errno, type(cause).__name__)
        where = f" at {cause.filename}" if cause.filename else ""
        super().__init__(
            f"checkpoint.save: {name} ({cause.strerror or cause}){where} while saving {path}: "
            f"needs {_mib(needed)}, free {'unknown' if free is None else _mib(free)}. "
            "Older checkpoints are untouched"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        step: Step it was saved at.
        parts: Part name -> tensor name -> tensor on the CPU, contiguous.
        state: What the caller gave to `save`; tuples have become lists.
        path: Folder it came from.
    """

    step: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def save(
    root: str | os.PathLike[str],
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write ``<root>/step-<step>`` so that no instant is without a whole checkpoint.

    An existing checkpoint of the same step is replaced. Those of later steps are left alone, and
    `latest` prefers them: start another run in another root.

    Args:
        root: Folder of the run's checkpoints, made if missing.
        step: In [0, 10**18).
        parts: Part name (letters, digits, ``_`` and ``-``) -> tensor name -> tensor. Any strides,
            device and sharing; stored bitwise. Gather sharded tensors first.
        state: JSON values with string keys: config, counters. Tuples are stored as lists;
            float NaN and infinity are kept.
        keep: How many checkpoints stay, this one included, at least 1. Damaged ones do not count.

    Returns:
        The folder written.

    Raises:
        CheckpointWriteError: Not enough space, quota, no permission, read-only, another process
            saving here, or any other error of the file system. What was written is removed.
        ValueError: A name, the step, ``keep``, a tensor's layout or dtype, or a limit of `load`
            (100 000 tensors and 8 MiB of header a part, 64 MiB of state).
        TypeError: A value that is not a tensor, or not JSON.
    """
    if not _is_int(step) or not 0 <= step < 10**18:
        raise ValueError(f"checkpoint.save: expected a step in [0, 10**18), got {step!r}")
    if not _is_int(keep) or keep < 1:
        raise ValueError(f"checkpoint.save: expected keep >= 1, got {keep!r}")
    files = [_plan_part(name, tensors) for name, tensors in parts.items()]
    files.append(_plan_state(state))
    needed = _SLACK + sum(-(-file.size // 4096) * 4096 for file in files)

    root = Path(root)
    final = root / f"step-{step:08d}"
    free = None
    try:
        _make_folder(root)
        with _lock(root) as alone:
            if alone:
                _remove_temporaries(root)
            free = shutil.disk_usage(root).free
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _write_checkpoint(final, step, files)
            _prune(final, step, keep)
    except OSError as error:
        raise CheckpointWriteError(error, final, needed, free) from error
    return final


@dataclass(frozen=True)
class _File:
    """A file to write: its size is known before a byte is."""

    name: str
    size: int
    chunks: Callable[[], Iterator[bytes | memoryview]]


def _plan_part(part: str, tensors: Mapping[str, Tensor]) -> _File:
    """Lay one part out as safetensors does.

    Not through safetensors' writer: that one needs dense, unshared tensors, holds a second copy
    of them all, and reports a full disk without an errno.
    """
    if not isinstance(part, str) or not _PART.fullmatch(part):
        raise ValueError(
            f"checkpoint.save: expected a part name of letters, digits, _ and -, got {part!r}"
        )
    if len(tensors) > _MAX_TENSORS:
        raise ValueError(
            f"checkpoint.save: part {part} has {len(tensors)} tensors, limit {_MAX_TENSORS}"
        )
    for name, tensor in tensors.items():
        _check_tensor(part, name, tensor)
    # Wide items first: every tensor then starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    layout, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        layout[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _MAX_HEADER:
        raise ValueError(
            f"checkpoint.save: the names of part {part} take {len(header)} bytes, "
            f"limit {_MAX_HEADER}"
        )

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(header).to_bytes(8, "little") + header
        for _, tensor in ordered:
            yield from _bytes_of(tensor)

    return _File(f"{part}.safetensors", 8 + len(header) + end, chunks)


def _check_tensor(part: str, name: str, tensor: Tensor) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"checkpoint.save: {name!r} in part {part} cannot name a tensor")
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"checkpoint.save: expected {part}.{name} to be a tensor, "
            f"got {type(tensor).__name__}; other values belong in state"
        )
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        # DTensor and the like have no bytes of their own: data_ptr() is 0.
        raise ValueError(
            f"checkpoint.save: {part}.{name} is a {type(tensor).__name__}; "
            "gather it into a plain tensor first"
        )
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"checkpoint.save: expected {part}.{name} to be dense, "
            f"got {tensor.layout} on {tensor.device}"
        )
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(
            f"checkpoint.save: {part}.{name} is {tensor.dtype}, which safetensors does not store"
        )


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, without a copy where it is dense on the CPU."""
    # In the caller's thread, so a CUDA copy waits for the caller's current stream.
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = dense.numel() * dense.element_size()
    if not size:
        return
    array = (ctypes.c_ubyte * size).from_address(dense.data_ptr())
    array.owner = dense  # a chunk keeps the array and so the memory, also in the hashing thread
    view = memoryview(array).cast("B")
    for begin in range(0, size, _CHUNK):
        yield view[begin : begin + _CHUNK]


def _plan_state(state: Mapping[str, Any]) -> _File:
    if not isinstance(state, Mapping):
        raise TypeError(f"checkpoint.save: expected state to be a dict, got {type(state).__name__}")
    _check_json(state, "state", 0)
    data = _to_json(dict(state))
    if len(data) > _MAX_STATE:
        raise ValueError(f"checkpoint.save: state takes {len(data)} bytes, limit {_MAX_STATE}")
    return _File(_STATE, len(data), lambda: iter((data,)))


def _check_json(value: object, where: str, depth: int) -> None:
    """Refuse by name what JSON would refuse without one, or change silently (keys 1 and "1")."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"checkpoint.save: {where} is nested deeper than {_MAX_DEPTH}")
    if isinstance(value, Mapping):
        if not isinstance(value, dict) and depth:
            raise TypeError(f"checkpoint.save: {where} is a {type(value).__name__}, not a dict")
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"checkpoint.save: {where} has the key {key!r}, not a string")
            _check_json(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]", depth + 1)
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise TypeError(f"checkpoint.save: {where} is a {type(value).__name__}, not a JSON value")


def _write_checkpoint(final: Path, step: int, files: Sequence[_File]) -> None:
    temporary = _temporary(final)
    os.mkdir(temporary)
    try:
        with ThreadPoolExecutor(1) as hasher:
            written = {
                file.name: _write(temporary / file.name, file.chunks(), hasher) for file in files
            }
            manifest = _manifest(step, written)
            _write(temporary / _MANIFEST, (manifest,), hasher)
        _sync(temporary)
        if os.path.lexists(final):
            # Two renames: at the instant between them `latest` finds the old one, set aside.
            os.rename(final, final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}"))
        os.rename(temporary, final)
        _sync(final.parent)
    except BaseException:  # also Ctrl-C: gigabytes of a useless folder
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(
    path: Path, chunks: Iterable[bytes | memoryview], hasher: ThreadPoolExecutor
) -> dict[str, int | str]:
    """Write and fsync a new file; hash each chunk in ``hasher`` while it is written.

    752 MB: 0.50 s so, 0.68 s one after the other (median of 5, 2 cores, SHA-256 at 2.2 GB/s).
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            hashing = hasher.submit(digest.update, chunk)
            try:
                done = 0
                while done < len(chunk):  # a write may stop short, at 2 GiB or at a limit
                    done += os.write(descriptor, chunk[done:])
            finally:
                hashing.result()
            size += len(chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _prune(final: Path, step: int, keep: int) -> None:
    """Remove what ``final`` supersedes. It is in place by now: a failure here only warns."""
    kept = 1
    try:
        for folder in _folders(final.parent):
            if folder.path == final or folder.step > step:
                continue
            if folder.step < step and kept < keep:
                kept += _is_whole(folder.path)
            else:
                # Renamed first, so that a kill leaves no half checkpoint under a real name.
                trash = _temporary(final)
                os.rename(folder.path, trash)
                shutil.rmtree(trash)
    except OSError as error:
        warnings.warn(
            f"checkpoint.save: old checkpoints not removed: {error}", RuntimeWarning, stacklevel=3
        )


def _is_whole(path: Path) -> bool:
    """Whether the manifest holds and all sizes agree; cheap, the content is not read."""
    try:
        _, files = _read_manifest(path)
        return all((path / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (CheckpointError, OSError):
        return False


def _remove_temporaries(root: Path) -> None:
    """Under the lock no other save is under way: every temporary is of a dead process."""
    for entry in os.listdir(root):
        if _TEMPORARY.fullmatch(entry):
            try:
                shutil.rmtree(root / entry)
            except OSError as error:
                warnings.warn(
                    f"checkpoint.save: {entry} not removed: {error}", RuntimeWarning, stacklevel=3
                )


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[bool]:
    """Hold ``root`` against other savers; the kernel lets go when the process dies.

    Yields False where the file system has no locks.
    """
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError as error:
            raise OSError(error.errno, "another process is saving here", str(root)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _make_folder(path: Path) -> None:
    """``mkdir -p`` that also survives a power loss."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint; every byte is checked against the manifest before it is parsed.

    The SHA-256 sums find damage; they do not tell who wrote the checkpoint. A hostile one can
    hold wrong numbers, but runs no code, and its headers are bounded.

    Args:
        path: The folder, under any name.

    Returns:
        The checkpoint; tensors on the CPU. Peak memory is its size plus its largest part.

    Raises:
        CheckpointError: Names the file and what differs.
    """
    path = Path(path)
    step, files = _read_manifest(path)
    parts, state = {}, {}
    for name, expected in files.items():
        data = _read_verified(path / name, expected)
        if name == _STATE:
            state = _parse_state(path / name, data)
        else:
            parts[name.removesuffix(".safetensors")] = parse_safetensors(path / name, data)
    return Checkpoint(step, parts, state, path)


def latest(
    root: str | os.PathLike[str],
    *,
    on_invalid: Callable[[Path, str], None],
    refuse_nonfinite: bool = False,
) -> Checkpoint | None:
    """Load the checkpoint of the highest step that proves valid.

    Args:
        root: Folder of the run's checkpoints; it need not exist.
        on_invalid: Called with folder and reason for each later one that is refused.
        refuse_nonfinite: Refuse also those with a NaN or an infinity in a tensor: an EMA teacher
            never recovers from one.

    Returns:
        The checkpoint, or None if there is no valid one. None after a call of ``on_invalid`` means
        that all are damaged, not that the run is new.

    Raises:
        CheckpointError: If ``root`` itself cannot be read.
    """
    try:
        folders = _folders(Path(root))
    except OSError as error:
        raise CheckpointError(f"checkpoint.latest: {root}: {error.strerror}") from error
    for folder in folders:
        checkpoint = _load_if_valid(folder, on_invalid, refuse_nonfinite)
        if checkpoint is not None:
            return checkpoint
    return None


@dataclass(frozen=True)
class _Folder:
    step: int
    path: Path


def _load_if_valid(
    folder: _Folder, on_invalid: Callable[[Path, str], None], refuse_nonfinite: bool
) -> Checkpoint | None:
    try:
        checkpoint = load(folder.path)
        if checkpoint.step != folder.step:
            raise CheckpointError(f"{folder.path}: holds step {checkpoint.step}")
        if refuse_nonfinite:
            _refuse_nonfinite(checkpoint)
    except CheckpointError as error:
        on_invalid(folder.path, str(error))
        return None
    return checkpoint


def _folders(root: Path) -> list[_Folder]:
    """Checkpoints by name, highest step first; one that was set aside after its successor."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    matches = [match for match in map(_FOLDER.fullmatch, names) if match]
    matches.sort(key=lambda match: (-int(match[1]), match[2] or ""))
    return [_Folder(int(match[1]), root / match[0]) for match in matches]


def _to_json(value: object) -> bytes:
    """One form for one value: a manifest in any other form is damaged."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _manifest(step: int, files: Mapping[str, Mapping[str, int | str]]) -> bytes:
    content = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    return _to_json({**content, "sha256": hashlib.sha256(_to_json(content)).hexdigest()})


def _read_manifest(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Step and files of a manifest that is bit for bit what `save` wrote."""
    where = path / _MANIFEST
    data = _read(where, _MAX_MANIFEST)
    manifest = _parse_json(where, data)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not a manifest of {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: version {manifest.get('version')!r}, this fastmim reads {VERSION}"
        )
    step, files = manifest.get("step"), manifest.get("files")
    if not _is_int(step) or not isinstance(files, dict) or _manifest(step, files) != data:
        raise CheckpointError(f"{where}: damaged, its own SHA-256 differs")
    if _STATE not in files:
        raise CheckpointError(f"{where}: does not list {_STATE}")
    for name, file in files.items():
        if name != _STATE and not _FILE.fullmatch(name):
            raise CheckpointError(f"{where}: lists a file {name!r}")
        if not isinstance(file, dict) or not _is_int(file.get("bytes")):
            raise CheckpointError(f"{where}: no size for {name}")
    return step, files


def _read_verified(path: Path, expected: Mapping[str, Any]) -> bytes:
    data = _read(path, expected["bytes"], exactly=True)
    found = hashlib.sha256(data).hexdigest()
    if found != expected.get("sha256"):
        raise CheckpointError(
            f"{path}: damaged, SHA-256 is {found}, the manifest says {expected.get('sha256')}"
        )
    return data


def _read(path: Path, size: int, *, exactly: bool = False) -> bytes:
    """Read a regular file of at most, or exactly, ``size`` bytes; nothing is read of another."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            if status.st_size > size or (exactly and status.st_size != size):
                limit = "expected" if exactly else "at most"
                raise CheckpointError(f"{path}: {status.st_size} bytes, {limit} {size}")
            data = file.read(status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if len(data) != status.st_size:
        raise CheckpointError(f"{path}: {len(data)} bytes, expected {status.st_size}")
    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would wait for a writer


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def _parse_state(path: Path, data: bytes) -> dict[str, Any]:
    if len(data) > _MAX_STATE:
        raise CheckpointError(f"{path}: {len(data)} bytes, at most {_MAX_STATE}")
    state = _parse_json(path, data)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(state).__name__}")
    return state


def parse_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose header is bounded before it is parsed.

    Args:
        path: For messages.
        data: The whole file.

    Raises:
        CheckpointError: Names the file and what is wrong with it.
    """
    _check_header(path, data)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not safetensors: {error}") from error


def _check_header(path: Path, data: bytes) -> None:
    """Bound what safetensors will parse: size, count, dtypes, and dimensions against the data."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise CheckpointError(f"{path}: a header of {size} bytes in a file of {len(data)}")
    if size > _MAX_HEADER:
        raise CheckpointError(f"{path}: a header of {size} bytes, at most {_MAX_HEADER}")
    header = _parse_json(path, data[8 : 8 + size])
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no object")
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors, at most {_MAX_TENSORS}")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = (
            (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name!r} has the dtype {dtype!r}")
        if not isinstance(shape, list) or not all(_is_int(n) and 0 <= n < 2**63 for n in shape):
            raise CheckpointError(f"{path}: {name!r} has the shape {str(shape)[:100]}")


def _refuse_nonfinite(checkpoint: Checkpoint) -> None:
    for part, tensors in checkpoint.parts.items():
        for name, tensor in tensors.items():
            if not _is_finite(tensor):
                raise CheckpointError(
                    f"{checkpoint.path / part}.safetensors: {name} holds NaN or infinity"
                )


def _is_finite(tensor: Tensor) -> bool:
    """No mask is made: least and greatest value are NaN if any is."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # no minimum of float8
        tensor = tensor.float()
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Fields in which two nested configs differ, as ``model.depth: checkpoint 12, run 24``.

    Tuples equal lists, 1 equals 1.0 but not True, and NaN equals NaN: ``saved`` went through JSON.

    Args:
        saved: Config of the checkpoint.
        wanted: Config of the run.

    Returns:
        One line a field, in the order of ``wanted``, then those only in ``saved``. Empty if equal.
    """
    ours, theirs = _flatten(wanted), _flatten(saved)
    return [
        f"{field}: checkpoint {_show(theirs, field)}, run {_show(ours, field)}"
        for field in {**ours, **theirs}
        if field not in ours or field not in theirs or not _same(theirs[field], ours[field])
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _same(a: object, b: object) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _show(flat: Mapping[str, Any], field: str) -> str:
    if field not in flat:
        return "has none"
    text = repr(flat[field])
    return text if len(text) <= 80 else text[:77] + "..."


def check_parts(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that do not fit, before any of them is copied.

    Args:
        saved: Tensors of the checkpoint.
        wanted: Tensors they are to be copied into.
        what: What they are, for the message: ``"student"``.

    Raises:
        CheckpointError: Lists the first five missing and unexpected names, and the first five of
            another shape or dtype.
    """
    missing = [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    misshapen = [
        f"{name} (checkpoint {_describe(saved[name])}, run {_describe(wanted[name])})"
        for name in wanted
        if name in saved and _describe(saved[name]) != _describe(wanted[name])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": misshapen}
    found = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if found:
        raise CheckpointError(f"{what}: the checkpoint does not fit: {'; '.join(found)}")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
