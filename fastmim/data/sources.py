"""Where pictures come from: the embedded digits, a folder of image files, or parquet.

A ``Source`` is a fixed, ordered list of pictures. Names and bytes are kept in a few NumPy buffers
and never in a list of Python objects: worker processes forked from this one then share them without
copying a page.
"""

import bisect
import errno
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from fastmim.data.decode import MAX_PIXELS, BadImage, decode_image, require_decoders

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"
)  # fmt: skip
_SPLIT = r"(train|test|validation|valid|val)"


class Source(ABC):
    """A fixed, ordered list of pictures.

    Attributes:
        labels: (n,), int64, on the CPU, -1 where a picture has none; None if the source has no
            labels.
        classes: Class names by label, or None.
        channels: C of every picture ``read`` returns.
        mean, std: C values each, of pixels in 0..1: the normalisation to use by default.
    """

    labels: LongTensor | None = None
    classes: list[str] | None = None
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures, bad ones included."""

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Decode picture ``index``, in [0, len): (C, H, W), uint8, any strides.

        Raises:
            BadImage: If the picture cannot be used; the loader replaces it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person would call picture ``index``; unique in the source."""

    @abstractmethod
    def describe(self) -> str:
        """One line for a log."""

    def _counts(self) -> str:
        classes = f"{len(self.classes):,} classes" if self.classes else "no class names"
        return f"{len(self):,} images, {classes if self.labels is not None else 'no labels'}"


def open_source(path: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Source:
    """Open pictures by path, telling the kind by what is there.

    Args:
        path: None or ``"digits"``: the embedded digits (a folder of that name is ``"./digits"``). A
            ``.parquet`` file, or a folder that holds parquet files and no image files:
            ``ParquetSource``. Any other folder: ``FolderSource``.
        max_pixels: A picture with more (width * height, told by its header) is bad.

    Returns:
        The source, not empty.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If there are no pictures in it, it holds both kinds or several splits (train,
            val, ...), or it cannot be read.
        ImportError: If simplejpeg, Pillow or (for parquet) pyarrow is missing.
    """
    if path is None or path == "digits":
        return DigitsSource()
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"open_source: {str(path)!r} does not exist (looked in {Path.cwd()}); expected a "
            "folder of images, a .parquet file or 'digits'"
        )
    if root.is_dir():
        images, parquets, others = _scan(root)
        if images and parquets:
            raise ValueError(
                f"open_source: {str(path)!r} holds {len(images)} image files and {len(parquets)} "
                "parquet files; pass a folder with one kind, or one parquet file"
            )
        if parquets:
            _check_one_split(root, "parquet", parquets, rf"(?:.*/)?{_SPLIT}\b[^/]*")
            return ParquetSource([root / name for name in parquets], max_pixels=max_pixels)
        if not images:
            raise ValueError(
                f"open_source: no images in {str(path)!r}: looked in it and all its sub-folders "
                f"for {' '.join(IMAGE_EXTENSIONS)} and .parquet, saw {others} other files"
            )
        _check_one_split(root, "image", images, rf"{_SPLIT}/")  # else they would be classes
        return FolderSource(root, images, max_pixels=max_pixels)
    if root.suffix.lower() == ".parquet":
        return ParquetSource([root], max_pixels=max_pixels)
    raise ValueError(
        f"open_source: {str(path)!r} is a file that is not .parquet; expected a folder of images, "
        "a .parquet file or 'digits' (unpack an archive into a folder first)"
    )


class DigitsSource(Source):
    """1,797 handwritten digits, grey, 32x32, 10 classes: small enough to be part of the package.

    The test set of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998,
    UCI Machine Learning Repository, doi:10.24432/C50P49, licence CC BY 4.0; as redistributed by
    scikit-learn (``load_digits``). Changes: stored as uint8 in digits.npz; enlarged as below.

    An 8x8 value v in 0..16 becomes round(255 / 16 * v), where v is first enlarged to 32x32
    bilinearly (align_corners=False); every intermediate value is exact in float32, so the pixels
    are the same everywhere.
    """

    channels = 1
    mean = (0.3052,)  # of all pixels of the enlarged pictures
    std = (0.3236,)

    def __init__(self):
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
            small, labels = stored["images"], stored["labels"]
        enlarged = F.interpolate(
            torch.from_numpy(small[:, None]).float(), size=(32, 32), mode="bilinear"
        )
        self.images = (enlarged * 255 / 16).round().to(torch.uint8)  # (1797, 1, 32, 32)
        self.labels = torch.from_numpy(labels).long()
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"digits[{index}]"

    def describe(self) -> str:
        return f"digits: {self._counts()}, grey, 32x32, embedded"


class FolderSource(Source):
    """Image files below a folder, in the order of their relative paths (by code point).

    Labels are the first-level sub-folders, sorted by name, if every picture lies inside one and
    there are at least two. Files and folders whose name begins with a dot are left out; links are
    followed.

    Args:
        root: The folder.
        names: Sorted relative paths of its pictures.
        max_pixels: As in ``open_source``.
    """

    def __init__(self, root: Path, names: list[str], *, max_pixels: int = MAX_PIXELS):
        require_decoders()
        self.root = root
        self.max_pixels = max_pixels
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        folders = [name.partition("/")[0] for name in names if "/" in name]
        classes = sorted(set(folders))
        if len(folders) == len(names) and len(classes) >= 2:
            position = {name: label for label, name in enumerate(classes)}
            self.labels = torch.tensor([position[folder] for folder in folders])
            self.classes = classes

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> Tensor:
        name = self.name(index)
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # not the picture's fault
                raise
            raise BadImage(name, f"cannot be read: {error.strerror or error}") from None
        return decode_image(data, name, max_pixels=self.max_pixels)

    def name(self, index: int) -> str:
        """Path relative to the folder."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._names[start : int(self._ends[index])])

    def describe(self) -> str:
        return f"folder {self.root}: {self._counts()}"


class ParquetSource(Source):
    """Pictures in parquet files, in the layout of Hugging Face's image data sets; held encoded.

    The image column is the one the ``huggingface`` schema metadata calls Image, else ``image``,
    ``img``, ``image.bytes`` or ``img.bytes``; its type is struct<bytes: binary, ...> or binary. The
    label column is ``label`` or the first ClassLabel of the metadata (integers; -1 and null: no
    label); class names are in the metadata.

    Args:
        paths: The files, read in this order; all with the same columns and classes.
        max_pixels: As in ``open_source``.
    """

    def __init__(self, paths: list[Path], *, max_pixels: int = MAX_PIXELS):
        require_decoders()
        _check_memory(paths)
        self.paths = paths
        self._folder = Path(os.path.commonpath([path.parent for path in paths]))
        self.max_pixels = max_pixels
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []  # bytes uint8, offsets (rows + 1,)
        self._starts = [0]  # first row of each chunk, then n
        self._file_starts = []  # first row of each file
        labels: list[np.ndarray] = []
        layout = None
        for path in paths:
            self._file_starts.append(self._starts[-1])
            found = self._read_file(path, labels)
            if layout is not None and found != layout:
                raise ValueError(
                    f"open_source: {paths[0]} and {path} differ in columns or classes: {layout} "
                    f"and {found}; put files of one data set into a folder of their own"
                )
            layout = found
        if not len(self):
            raise ValueError(f"open_source: no rows in {paths[0]} (of {len(paths)} parquet files)")
        _, label_column, classes = layout
        if label_column is not None:
            self.labels = torch.from_numpy(np.concatenate(labels))
            self.classes = classes
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < -1 or (classes is not None and high >= len(classes)):
                raise ValueError(
                    f"open_source: column {label_column!r} of {paths[0]} holds labels "
                    f"{low}..{high}; expected -1 (none) to "
                    f"{'any' if classes is None else len(classes) - 1}"
                )

    def _read_file(self, path: Path, labels: list[np.ndarray]) -> tuple:
        """Append the file's chunks and labels; return (image column, label column, classes)."""
        pa, pq = _import_pyarrow()
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                image_column, label_column, classes = _find_columns(schema, path)
                columns = [image_column] if label_column is None else [image_column, label_column]
                # few rows at a time: Arrow cannot read 2 GiB of nested bytes at once
                for batch in file.iter_batches(batch_size=1000, columns=columns):
                    self._append_chunk(batch.column(image_column))
                    if label_column is not None:
                        labels.append(_label_values(batch.column(label_column)))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"open_source: {path} is not a readable parquet file: {error}; fetch it again"
            ) from error
        return image_column, label_column, classes

    def _append_chunk(self, column) -> None:
        """Keep the pictures of an Arrow column as views of its buffers; null becomes 0 bytes."""
        import pyarrow as pa

        if pa.types.is_struct(column.type):
            column = column.flatten()[column.type.get_field_index("bytes")]
        column = column.fill_null(b"").cast(pa.large_binary())
        _, offsets, data = column.buffers()
        offsets = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        self._chunks.append((np.frombuffer(data or b"", np.uint8), offsets))
        self._starts.append(self._starts[-1] + len(column))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Tensor:
        chunk = bisect.bisect_right(self._starts, index) - 1
        data, offsets = self._chunks[chunk]
        row = index - self._starts[chunk]
        encoded = data[offsets[row] : offsets[row + 1]]
        return decode_image(memoryview(encoded), self.name(index), max_pixels=self.max_pixels)

    def name(self, index: int) -> str:
        """File, relative to the folder of all of them, and row: ``train.parquet[17]``."""
        file = bisect.bisect_right(self._file_starts, index) - 1
        path = self.paths[file].relative_to(self._folder).as_posix()
        return f"{path}[{index - self._file_starts[file]}]"

    def describe(self) -> str:
        files = f"{len(self.paths)} files" if len(self.paths) > 1 else self.paths[0].name
        mib = sum(int(offsets[-1] - offsets[0]) for _, offsets in self._chunks) / 2**20
        return f"parquet {self._folder} ({files}): {self._counts()}, {mib:.1f} MiB in memory"


def _scan(root: Path) -> tuple[list[str], list[str], int]:
    """Sorted relative paths of image files and of parquet files, and the number of other files."""
    images, parquets, others = [], [], 0
    for name, entry in _walk(root, "", frozenset()):
        suffix = os.path.splitext(name)[1].lower()
        # a broken link is a picture, to be reported and not lost; a pipe or device is none
        usable = entry.is_file() or not os.path.exists(entry.path)
        if suffix in IMAGE_EXTENSIONS and usable:
            images.append(name)
        elif suffix == ".parquet" and usable:
            parquets.append(name)
        else:
            others += 1
    return sorted(images), sorted(parquets), others


def _walk(folder: Path, prefix: str, parents: frozenset) -> Iterator[tuple[str, os.DirEntry]]:
    """Every file below ``folder`` as (relative path with '/', entry)."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            listed = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(
            f"open_source: folder {folder} cannot be read: {error.strerror}; mend its permissions "
            "or remove it"
        ) from error
    identity = (status.st_dev, status.st_ino)
    if identity in parents:  # a link to a folder above: a circle
        return
    for entry in listed:
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", parents | {identity})
        else:
            yield prefix + entry.name, entry


def _check_one_split(root: Path, kind: str, names: list[str], pattern: str) -> None:
    """Refuse to mix train and test; ``pattern`` gives the split of a path as its first group."""
    matches = [re.match(pattern, name, re.IGNORECASE) for name in names]
    examples = {match[1].lower(): match[0] for match in matches if match}
    if len(examples) > 1:
        example = root / examples.get("train", min(examples.values()))
        raise ValueError(
            f"open_source: {str(root)!r} holds {kind} files of several splits "
            f"({', '.join(sorted(examples))}); pass one (a folder or a file), such as {example}"
        )


def _check_memory(paths: list[Path]) -> None:
    needed = sum(path.stat().st_size for path in paths)
    if not hasattr(os, "sysconf"):
        return
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise ValueError(
            f"open_source: {len(paths)} parquet files of {needed / 2**30:.1f} GiB are held in "
            f"memory, this machine has {present / 2**30:.1f} GiB; write the images into a folder "
            "instead"
        )


def _import_pyarrow():
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "open_source: reading parquet needs pyarrow: pip install pyarrow, or pip install "
            "'fastmim[hf]'"
        ) from error
    return pa, pq


def _find_columns(schema, path: Path) -> tuple[str, str | None, list[str] | None]:
    """(image column, label column or None, class names or None) of an Arrow schema."""
    import pyarrow as pa

    features = _huggingface_features(schema.metadata)
    declared = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    for image_column in [*declared, "image", "img", "image.bytes", "img.bytes"]:
        at = schema.get_field_index(image_column)
        if at >= 0 and _holds_bytes(schema.field(at).type):
            break
    else:
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(
            f"open_source: no image column in {path}: expected 'image' or 'img' of type "
            f"struct<bytes: binary, path: string> or binary, found {columns or 'no columns'}; "
            "rename or convert the column"
        )
    class_labels = [name for name, f in features.items() if f.get("_type") == "ClassLabel"]
    for label_column in ["label", *class_labels]:
        at = schema.get_field_index(label_column)
        if at >= 0 and pa.types.is_integer(schema.field(at).type):
            return image_column, label_column, features.get(label_column, {}).get("names")
    return image_column, None, None


def _holds_bytes(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _huggingface_features(metadata: dict[bytes, bytes] | None) -> dict[str, dict]:
    """Column name -> feature, of the ``huggingface`` entry; {} if it is missing or malformed."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):  # foreign, and optional
        return {}


def _label_values(column) -> np.ndarray:
    """(rows,) int64; null -> -1."""
    import pyarrow as pa

    return column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False).copy()
